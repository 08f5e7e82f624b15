// The passes around block attention through cuDNN on raw pointers, and what the op costs over the library
// alone. The op's results are checked by tests/gpu/attention_test.cc.

#include <functional>
#include <utility>

#include "annulus/ops/attention.h"
#include "cuda/harness.h"
#include "kernels/attention/attention_merge_cuda.h"
#include "kernels/attention/cudnn_attention.h"

namespace annulus::testing {
namespace {

using namespace annulus::kernels;

struct MergeCase {
  int64_t rows, batch, heads, dim, padding;
  int64_t columns() const { return heads * dim + padding; }
  int64_t stats() const { return rows * batch * heads; }
};

struct Partial {
  Doubles out, lse;  // [rows, batch, columns], [rows, batch, heads]
};

// The sum of two partial results in arithmetic of type W. Padding keeps what the carry holds there.
template <typename W>
Partial MergedIn(const MergeCase& c, const Partial& carry, const Partial& block) {
  Partial sum = carry;
  for (int64_t stat = 0; stat < c.stats(); ++stat) {
    const auto s = static_cast<size_t>(stat);
    const W a = static_cast<W>(carry.lse[s]), b = static_cast<W>(block.lse[s]), top = std::max(a, b);
    const W weight_a = std::isinf(top) ? 0 : std::exp(a - top),
            weight_b = std::isinf(top) ? 0 : std::exp(b - top);
    if (!std::isinf(top)) sum.lse[s] = static_cast<double>(top + std::log(weight_a + weight_b));
    for (int64_t e = 0; e < c.dim; ++e) {
      const auto o = static_cast<size_t>(stat / c.heads * c.columns() + stat % c.heads * c.dim + e);
      const W value = (weight_a * static_cast<W>(carry.out[o]) + weight_b * static_cast<W>(block.out[o])) /
                      (weight_a + weight_b);
      sum.out[o] = std::isinf(top) ? 0 : static_cast<double>(value);
    }
  }
  return sum;
}

// Zeros where `like` is -inf.
Doubles Finite(Doubles values, const Doubles& like) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (std::isinf(like[i])) values[i] = 0;
  }
  return values;
}

void CheckMerge() {
  for (const MergeCase& c :
       {MergeCase{1, 1, 1, 4, 0}, MergeCase{33, 2, 3, 128, 8}, MergeCase{70, 1, 5, 64, 0},
        MergeCase{31, 2, 2, 32, 16}, MergeCase{65, 1, 2, 16, 0}, MergeCase{40, 3, 1, 8, 8}}) {
    const int64_t elements = c.rows * c.batch * c.columns();
    Partial carry{Random<float>(elements), Random<float>(c.stats(), 3)},
        block{Random<Bf16>(elements), Random<float>(c.stats(), 3)};
    for (int64_t i = 0; i < c.stats(); ++i) {
      if (i % 7 == 1) carry.lse[static_cast<size_t>(i)] = -INFINITY;
      if (i % 5 == 1) block.lse[static_cast<size_t>(i)] = -INFINITY;
    }
    const Partial wide = MergedIn<double>(c, carry, block), naive = MergedIn<float>(c, carry, block);
    // What is not to be read: the results of rows without keys.
    for (int64_t stat = 0; stat < c.stats(); ++stat) {
      const auto first = stat / c.heads * c.columns() + stat % c.heads * c.dim;
      for (Partial* x : {&carry, &block}) {
        if (std::isinf(x->lse[static_cast<size_t>(stat)])) std::fill_n(x->out.begin() + first, c.dim, NAN);
      }
    }
    Array<Bf16> block_out(block.out);
    Array<float> out(carry.out), lse(carry.lse), block_lse(block.lse), rows_last(c.stats());
    const auto rows_first = [&](float* data) { return RowsFirst(data, c.batch, c.heads); };
    Must(CudaCopyLse({.rows = c.rows,
                      .batch = c.batch,
                      .heads = c.heads,
                      .from = RowsFirst<const float>(block_lse.data(), c.batch, c.heads),
                      .to = RowsLast(rows_last.data(), c.rows, c.heads)},
                     g_stream),
         "copy lse");
    Must(CudaMergeBlock(
             MergeBlockArgs<Bf16>{.rows = c.rows,
                                  .batch = c.batch,
                                  .heads = c.heads,
                                  .dim = c.dim,
                                  .block_out = {block_out.data(), c.batch * c.columns(), c.columns()},
                                  .block_lse = RowsLast<const float>(rows_last.data(), c.rows, c.heads),
                                  .out = {out.data(), c.batch * c.columns(), c.columns()},
                                  .lse = rows_first(lse.data())},
             g_stream),
         "merge");
    const std::string detail = std::to_string(c.rows) + " rows of " + std::to_string(c.dim);
    const Doubles got_lse = lse.Get("merged lse");
    bool same_infinities = true;
    for (size_t i = 0; i < got_lse.size(); ++i)
      same_infinities &= std::isinf(got_lse[i]) == std::isinf(wide.lse[i]);
    Expect(same_infinities, "merge " + detail + ": -inf where there are no keys");
    Compare("merge: out", detail, out.Get("merged out"), naive.out, wide.out);
    Compare("merge: lse", detail, Finite(got_lse, wide.lse), Finite(naive.lse, wide.lse),
            Finite(wide.lse, wide.lse));
    rows_last.Get("copied lse");
  }
}

struct Problem {
  int64_t rows, heads, kv_heads, dim, v_dim;
  MaskShape mask_shape;
  double Pairs() const {
    return static_cast<double>(rows) * static_cast<double>(rows * heads) *
           (mask_shape == MaskShape::kCausal ? 0.5 : 1);
  }
  double ForwardFlops() const { return 2 * Pairs() * static_cast<double>(dim + v_dim); }
  double BackwardFlops() const { return 2 * Pairs() * static_cast<double>(3 * dim + 2 * v_dim); }
};

// One block's operands as the model has them: q, k and v in the columns of one tensor.
class Operands {
 public:
  Operands(Context& ctx, const Problem& p) : ctx_(ctx), p_(p) {
    const auto allocate = [&](DType dtype, int64_t columns) {
      return ctx.saved.Allocate(dtype, {p.rows, 1, columns});
    };
    const int64_t width = p.heads * p.dim + p.kv_heads * (p.dim + p.v_dim), out_width = p.heads * p.v_dim;
    qkv = allocate(DType::kBF16, width), dqkv = allocate(DType::kBF16, width);
    out = allocate(DType::kBF16, out_width), dout = allocate(DType::kBF16, out_width);
    out_sum = allocate(DType::kF32, out_width), dqkv_sum = allocate(DType::kF32, width);
    lse = allocate(DType::kF32, p.heads), delta = allocate(DType::kF32, p.heads);
    bounds = ctx.saved.Allocate(DType::kI64, {p.rows});
    FillNormal(static_cast<Bf16*>(qkv.raw()), qkv.elements(), 1, 1);
    FillNormal(static_cast<Bf16*>(dout.raw()), dout.elements(), 1, 2);
    ANNULUS_CHECK(ResetPartial(ctx, PartialResult()).ok());
  }

  HeadsRef Q(const TensorRef& x) const { return HeadsOf(x, 0, p_.heads, p_.dim); }
  HeadsRef K(const TensorRef& x) const { return HeadsOf(x, p_.heads * p_.dim, p_.kv_heads, p_.dim); }
  HeadsRef V(const TensorRef& x) const {
    return HeadsOf(x, (p_.heads + p_.kv_heads) * p_.dim, p_.kv_heads, p_.v_dim);
  }
  HeadsRef Out(const TensorRef& x) const { return HeadsOf(x, 0, p_.heads, p_.v_dim); }
  AttentionPartial PartialResult() const { return {Out(out_sum), lse}; }
  // The library does not read the bounds.
  AttentionBlock Block() const {
    return {.q = Q(qkv),
            .k = K(qkv),
            .v = V(qkv),
            .bounds = {bounds, bounds},
            .mask_shape = p_.mask_shape,
            .key_positions = {},
            .scale = Scale()};
  }
  AttentionGradients Gradients(const TensorRef& to) const {
    return {.out = Out(out),
            .dout = Out(dout),
            .lse = lse,
            .delta = delta,
            .dq = Q(to),
            .dk = K(to),
            .dv = V(to)};
  }
  double Scale() const { return 1 / std::sqrt(static_cast<double>(p_.dim)); }

  Context& ctx_;
  const Problem& p_;
  TensorRef qkv, dqkv, out, dout, out_sum, dqkv_sum, lse, delta, bounds;
};

// What is timed of a problem: the library alone, the op on a whole block, and the op on one step of a ring.
using Run = std::function<void()>;
struct Runs {
  Run library, whole, carried;
};

// Prints the median times of the three, which take turns: a GPU under load slows down with time.
void TimeInTurn(const std::string& name, double flops, const Runs& runs) {
  constexpr int kRounds = 5;
  const Run* const run[] = {&runs.library, &runs.whole, &runs.carried};
  std::vector<double> ms[3];
  for (int round = 0; round < kRounds; ++round) {
    for (int i = 0; i < 3; ++i) ms[i].push_back(Milliseconds(1, *run[i]));
  }
  for (std::vector<double>& one : ms) std::sort(one.begin(), one.end());
  const double library = ms[0][kRounds / 2], whole = ms[1][kRounds / 2], carried = ms[2][kRounds / 2];
  std::printf("time  %-47s cudnn %8.3f ms %4.0f TFLOP/s, whole op %6.2f%%, carried op %6.2f%% of its speed\n",
              name.c_str(), library, flops / library * 1e-9, 100 * library / whole, 100 * library / carried);
}

CudnnBlock LibraryBlock(const Problem& p, const Operands& x) {
  const auto strides = [&](const TensorRef& t) { return CudnnStrides{t.dim(2), p.rows * t.dim(2)}; };
  return {.heads = p.heads,
          .kv_heads = p.kv_heads,
          .q_rows = p.rows,
          .k_rows = p.rows,
          .dim = p.dim,
          .v_dim = p.v_dim,
          .mask = p.mask_shape == MaskShape::kCausal ? CudnnMask::kCausal : CudnnMask::kFull,
          .scale = static_cast<float>(x.Scale()),
          .q = strides(x.qkv),
          .k = strides(x.qkv),
          .v = strides(x.qkv),
          .out = strides(x.out),
          .dout = strides(x.out),
          .dq = strides(x.qkv),
          .dk = strides(x.qkv),
          .dv = strides(x.qkv)};
}

void TimeProblem(Context& ctx, CudnnAttention& cudnn, const Problem& p) {
  ArenaScope scope(ctx.saved);
  const Operands x(ctx, p);
  const CudnnBlock block = LibraryBlock(p, x);
  const auto forward = cudnn.ForwardWorkspaceBytes(block), backward = cudnn.BackwardWorkspaceBytes(block);
  Ok(forward.status());
  Ok(backward.status());
  if (!forward.ok() || !backward.ok()) return;
  const int64_t bytes = std::max(*forward, *backward);
  const CudnnCall call{ctx.saved.Allocate(DType::kU8, {bytes}).raw(), bytes, ctx.stream()};
  float* lse = x.lse.data<float>();
  const void *q = x.Q(x.qkv).data, *k = x.K(x.qkv).data, *v = x.V(x.qkv).data;
  const CudnnBackwardPointers backward_pointers{
      q, k, v, x.out.raw(), x.dout.raw(), lse, x.Q(x.dqkv).data, x.K(x.dqkv).data, x.V(x.dqkv).data};
  char name[64];
  std::snprintf(name, sizeof(name), "%ld, heads %ld/%ld of %ld/%ld %s", long(p.rows), long(p.heads),
                long(p.kv_heads), long(p.dim), long(p.v_dim),
                p.mask_shape == MaskShape::kCausal ? "causal" : "full");
  TimeInTurn(std::string(name) + " forward", p.ForwardFlops(),
             {.library = [&] { Ok(cudnn.Forward(block, {q, k, v, x.out.raw(), lse}, call)); },
              .whole = [&] { Ok(AttentionForwardWhole(ctx, x.Block(), x.Out(x.out), x.lse)); },
              .carried = [&] { Ok(AttentionForward(ctx, x.Block(), x.PartialResult())); }});
  TimeInTurn(std::string(name) + " backward", p.BackwardFlops(),
             {.library = [&] { Ok(cudnn.Backward(block, backward_pointers, call)); },
              .whole =
                  [&] {
                    Ok(AttentionDelta(ctx, x.Out(x.out), x.Out(x.dout), x.delta));
                    Ok(AttentionBackwardWhole(ctx, x.Block(), x.Gradients(x.dqkv)));
                  },
              .carried = [&] { Ok(AttentionBackward(ctx, x.Block(), x.Gradients(x.dqkv_sum))); }});
}

}  // namespace

void CheckAttention() { CheckMerge(); }

void TimeAttention() {
  Context ctx({DeviceKind::kCuda, 0});
  const cudaStream_t other = std::exchange(g_stream, ctx.stream());
  auto cudnn = CudnnAttention::Create();
  Ok(cudnn.status());
  constexpr MaskShape kFull = MaskShape::kFull, kCausal = MaskShape::kCausal;
  for (const Problem& p :
       {Problem{32768, 16, 16, 128, 128, kCausal}, Problem{16384, 16, 16, 128, 128, kFull},
        Problem{16384, 32, 8, 128, 128, kCausal}, Problem{8192, 32, 8, 128, 128, kFull},
        Problem{32768, 16, 16, 64, 64, kCausal}, Problem{16384, 16, 16, 64, 64, kFull},
        Problem{16384, 16, 16, 192, 128, kCausal}, Problem{8192, 16, 16, 192, 128, kFull}}) {
    TimeProblem(ctx, **cudnn, p);
  }
  g_stream = other;
}

}  // namespace annulus::testing
