#pragma once

// Kernel calls of one computing step of an exchange plan. The plan speaks of pairs of chunks; where their
// union is a rectangle of which every query sees every key (or a causal square), one call does it, and
// kernels that know no bounds can serve it. Zigzag, P = 4, rank 1 (chunks 1 and 6), in order of local rows:
//
//     own block      block of rank 0 (0, 7)    block of rank 2 (2, 5)
//       1 6                0 7                       2 5
//     1 \ .              1 x .                     1 . .           \ causal   x full   . masked
//     6 x \              6 x .                     6 x x
//     one causal call    one full call             one full call
//
// The same with the roles of queries and keys exchanged where queries travel; and for super-blocks, whose
// rows are in order of position: all of a causal sequence is one causal call.

#include <vector>

#include "annulus/comm/exchange_plan.h"
#include "annulus/ops/attention_arrival.h"
#include "annulus/parallel/mask.h"

namespace annulus {

// Which rows a slot holds: those of a block, or of the super-block of that number.
struct SlotBlock {
  Span span = Span::kBlock;
  int index = 0;
  friend auto operator<=>(const SlotBlock&, const SlotBlock&) = default;
};
// What a slot of the span holds where it holds rows of the block of cp rank `owner`.
SlotBlock SlotBlockOf(const ExchangePlan& plan, Span span, int owner);

// Bounds that a call's kernel reads.
enum class BoundsSource {
  kMask,        // the mask's own, with the keys' global positions
  kEverything,  // key rows 0 .. of the call, all visible
  kIndex,       // query row i of the call sees key rows 0 .. i
};

struct AttendCall {
  SlotBlock queries;  // of which q_rows are rows
  RowRange q_rows;    // of the query slot
  RowRange keys;      // of the KV slot
  MaskShape shape = MaskShape::kGeneral;
  BoundsSource bounds = BoundsSource::kMask;
  KeyPositions key_positions;
};

// The call of a step that takes keys as they come, and what comes together. The flags of parts are those of a
// run.
struct ArrivingCall {
  AttendCall call;  // by the mask; its keys are those of all parts, wherever they are
  std::vector<KeyPart> parts;
};

// Of such a step of rank `cp_rank`, whose queries are at home: all of them. Parts are first those of receives
// (ArrivesDuring), in the order of step.after, then what is there before.
ArrivingCall ArrivingCallOf(const SequenceLayout& layout, const ExchangePlan& plan, int cp_rank,
                            const Step& step);

// Calls that together compute the pairs of a step of rank `cp_rank`, each (query, key) pair once. `plan` is
// one for MakeExchangeProblem(layout, sequences, ...). Costs the same whatever the number of rows.
std::vector<AttendCall> CallsOf(const SequenceLayout& layout, const SequenceBatch& sequences,
                                const ExchangePlan& plan, int cp_rank, const Attend& attend);

// Rows [begin, end) of a slot, ascending and apart, that `rows` name.
std::vector<RowRange> RowsInSlot(const ExchangePlan& plan, const SlotSpec& slot,
                                 const std::vector<BlockRows>& rows);

// The bounds of a slot's rows in their order, index row * batch + item.
BoundsTable BoundsOf(const SequenceLayout& layout, const SequenceBatch& sequences, int64_t window,
                     const ExchangePlan& plan, const SlotBlock& rows);

}  // namespace annulus
