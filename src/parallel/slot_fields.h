#pragma once

// Which tensors the slots of an attention layer are made of (FieldsOf of annulus/parallel/choose_plan.h), and
// which of their columns hold which heads.
//
//   kQuery     forward: q                backward: q, dout, lse, delta, and out where a kernel reads it
//   kKv        kv: keys of all heads, then values
//   kOutput    out, lse, and sum where it is carried
//   kQueryGrad dq
//   kKvGrad    dkv: as kv
//
// A layer with latents: kKv and kKvGrad hold those, of one KV head; the gradient in the accumulator dtype.

#include "annulus/ops/columns.h"
#include "annulus/parallel/choose_plan.h"

namespace annulus {

// Places of fields in SlotMemory.
namespace query_field {
enum { kQ, kDout, kLse, kDelta, kOut };
}
namespace output_field {
enum { kOut, kLse, kSum };
}

// Whether some kernel of the layer's backward reads its output.
bool BackwardReadsOutput(const AttentionCase& layer);

// Columns of a KV head's keys and values, or of the latents in their place.
int64_t KvColumns(const AttentionCase& layer);

// Whether partial outputs have their sums of weights (AttentionPartial).
bool CarriesSums(const AttentionCase& layer);

HeadGroup GroupOf(const AttentionCase& layer, const ExchangePlan& plan, const SlotSpec& slot);

// Bytes of one row of all its fields.
int64_t BytesOfRow(const AttentionCase& layer, Pass pass, const HeadGroup& group, const SlotSpec& slot);

// By field: where the heads that both groups have lie in the columns of each. A gradient that is in `from` in
// several summands has as many runs.
std::vector<std::vector<ColumnRun>> RunsBetween(const AttentionCase& layer, Pass pass, Payload payload,
                                                const HeadGroup& from, const HeadGroup& to);

}  // namespace annulus
