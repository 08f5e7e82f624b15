#pragma once

// Attention of a block of queries on a block of keys, with a carry: the online softmax continues from the
// partial result (O, LSE) of the blocks before, so a ring of blocks equals one call up to rounding, in any
// order.
//
//   s_ij = scale q_i . k_j   where lo_i <= position(j) < hi_i, else -inf
//   O_i = sum_j softmax(s)_ij v_j        LSE_i = log sum_j exp(s_ij), -inf where no key was allowed (then O_i
//   = 0)
//
// Keys outside every row's range are not read. Between ranges they may meet a weight of zero: K and V must be
// finite. Query head h reads KV head h / (heads / kv_heads). Sums are carried in the accumulator dtype (f32;
// f64 for f64).

#include "absl/strings/string_view.h"
#include "annulus/base/pass.h"
#include "annulus/base/status.h"
#include "annulus/device/context.h"
#include "annulus/ops/heads.h"
#include "annulus/ops/write.h"

namespace annulus {

// Per query row and batch item the half-open range of key positions it sees: causal, window and document
// masks in one form. Index row * batch + item, the order of tokens everywhere.   lo, hi: i64 [rows * batch]
struct MaskBounds {
  ConstTensorRef lo, hi;
};

// What the caller knows of a block's bounds, so that libraries which know no bounds can serve it.
enum class MaskShape {
  kGeneral,
  kFull,    // every query sees every key of the block
  kCausal,  // as many keys as queries, and query row i sees key rows 0 .. i
};

// Key row j of a block is at global position offset + stride * j.
struct KeyPositions {
  int64_t offset = 0, stride = 1;
};

struct AttentionBlock {
  ConstHeadsRef q;    // [q_rows, batch, heads, dim]
  ConstHeadsRef k;    // [k_rows, batch, kv_heads, dim]
  ConstHeadsRef v;    // [k_rows, batch, kv_heads, v_dim]
  MaskBounds bounds;  // q_rows * batch entries
  MaskShape mask_shape = MaskShape::kGeneral;
  KeyPositions key_positions;
  double scale = 1.0;
};

// Softmax partial over the keys seen so far, in the accumulator dtype.
struct AttentionPartial {
  HeadsRef out;   // [q_rows, batch, heads, v_dim], normalised but where there is a sum
  TensorRef lse;  // [q_rows, batch, heads]
  // As lse; CPUs only. Where given, nothing is normalised before FinishPartial:
  //   lse_i = m_i = max_j s_ij      out_i = sum_j exp(s_ij - m_i) v_j      sum_i = sum_j exp(s_ij - m_i)
  // so that carrying on rounds nothing, and any number of blocks is as exact as one. Without it every block
  // rounds the LSE, one of 8 by up to 2^-21 in f32, which weighs the keys before it against those after.
  TensorRef sum = {};
  bool has_sum() const { return sum.raw() != nullptr; }
};

// out = 0, lse = -inf, sum = 0: no keys seen.
absl::Status ResetPartial(Context& ctx, const AttentionPartial& partial);

// From sums to the normalised output and its LSE.
absl::Status FinishPartial(Context& ctx, const AttentionPartial& partial);

// Folds the block into `partial`. A block whose keys are all masked for a row leaves that row bit-identical.
absl::Status AttentionForward(Context& ctx, const AttentionBlock& block, const AttentionPartial& partial);

// Folds a partial result over keys that `into` has not seen into it: the carry between blocks that are
// computed apart. Order-independent up to rounding. Where an LSE is -inf its output is not used, whatever it
// holds: the other stays as it is, bit by bit; where both are, the output is 0.
//   out: [rows, batch, heads, v_dim], compute or accumulator dtype   into_out: the same, accumulator dtype
//   lse, into_lse: [rows, batch, heads, 1], accumulator dtype
//   sum, into_sum: as lse, where the partial results have them (AttentionPartial)
struct PartialMerge {
  ConstHeadsRef out, lse;
  HeadsRef into_out, into_lse;
  ConstHeadsRef sum = {};
  HeadsRef into_sum = {};
  bool has_sums() const { return sum.data != nullptr || into_sum.data != nullptr; }
};
absl::Status MergePartials(Context& ctx, const PartialMerge& merge);

// delta[q_rows, batch, heads] = sum over dim of dout * out; once per attention, before the blocks' backward.
//   out, dout: compute dtype   delta: accumulator dtype
absl::Status AttentionDelta(Context& ctx, ConstHeadsRef out, ConstHeadsRef dout, TensorRef delta);

struct AttentionGradients {
  // [q_rows, batch, heads, v_dim], of all blocks together, compute dtype. May be left out where
  // ChooseAttentionKernel gives another kernel for the backward than kCudnn.
  ConstHeadsRef out;
  ConstHeadsRef dout;                   // [q_rows, batch, heads, v_dim]
  ConstTensorRef lse;                   // [q_rows, batch, heads], of all blocks together
  ConstTensorRef delta;                 // [q_rows, batch, heads]
  HeadsRef dq, dk, dv;                  // accumulator dtype; added to
  Write kv_write = Write::kAccumulate;  // kOverwrite: dk and dv hold nothing yet
};

absl::Status AttentionBackward(Context& ctx, const AttentionBlock& block,
                               const AttentionGradients& gradients);

// The same where the block holds all keys of its queries, so nothing is carried: out is overwritten, in the
// compute dtype, and so are dq, dk and dv.
//   out: [q_rows, batch, heads, v_dim]   lse: [q_rows, batch, heads]
absl::Status AttentionForwardWhole(Context& ctx, const AttentionBlock& block, HeadsRef out, TensorRef lse);
absl::Status AttentionBackwardWhole(Context& ctx, const AttentionBlock& block,
                                    const AttentionGradients& gradients);

// Which kernel serves a block.
enum class AttentionKernel {
  kCpuTiles,    // tiles through BLAS
  kF32,         // f32 arithmetic on GPUs, for parity
  kTensorCore,  // our own on every GPU: every mask, with carry
  kCudnn,       // full and causal blocks; partial results merged in f32
  kHopper,      // our own for Hopper: every mask, with carry
};
absl::string_view Name(AttentionKernel kernel);  // "cpu tiles", "cuda f32", "cuda mma", "cudnn", "hopper"

// Whether the program has cuDNN.
bool HasCudnn();

struct AttentionKernelCase {
  DeviceKind device = DeviceKind::kCpu;
  bool hopper = false;  // RunsHopperKernels
  bool cudnn = HasCudnn();
  DType dtype = DType::kF32;
  int64_t dim = 0, v_dim = 0;
  MaskShape mask_shape = MaskShape::kGeneral;
  Pass pass = Pass::kForward;
  Determinism determinism = Determinism::kOff;
  AttentionChoice asked = AttentionChoice::kFastest;
};
AttentionKernel ChooseAttentionKernel(const AttentionKernelCase& c);

// Says why what is asked for cannot serve the case, if it cannot. The ops refuse such blocks.
absl::Status CheckAttentionChoice(const AttentionKernelCase& c);

// Whether the same bits on every run cost the kernel another order of sums.
bool OrdersSums(AttentionKernel kernel, Pass pass);

// Whether there is a kernel for heads of `dim` with values of `v_dim`.
bool AttentionSupports(DeviceKind device, DType dtype, int64_t dim, int64_t v_dim);

// "cuDNN 9.19.0", or why this build has none.
std::string CudnnVersion();

}  // namespace annulus
