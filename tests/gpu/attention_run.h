#pragma once

// Attention problems on GPU 0: operands as strided heads between guards, K and V in one buffer, and the ops
// on any pieces of the problem. Where the memory of an operand ends and what lies between its rows is
// compared whenever it is read.

#include "gpu/gpu_harness.h"
#include "ops/attention_harness.h"

namespace annulus::testing {

// [rows, batch, heads, dim] for one or two groups of heads that share their rows, with padding around each.
template <typename T>
class HeadsOnGpu {
 public:
  struct Group {
    int64_t heads = 0, dim = 0;
  };

  HeadsOnGpu(Context& ctx, int64_t rows, int64_t batch, std::vector<Group> groups, BatchOrder order)
      : rows_(rows),
        batch_(batch),
        groups_(std::move(groups)),
        order_(order),
        memory_(ctx, DTypeOf<T>(), {rows * batch * Columns()}, 0) {
    memory_.Write(Poisoned());
  }

  HeadsRef ref(size_t group = 0) {
    const bool inside = order_ == BatchOrder::kInsideRows;
    return {memory_.ref().template data<T>() + First(group),
            DTypeOf<T>(),
            rows_,
            batch_,
            groups_[group].heads,
            groups_[group].dim,
            inside ? batch_ * Columns() : Columns(),
            inside ? Columns() : rows_ * Columns()};
  }
  // Dense [rows, batch, heads, dim].
  void Set(const std::vector<double>& values, size_t group = 0) {
    std::vector<T> image = memory_.template Read<T>();
    ForEach(group, [&](size_t at, size_t i) { image[at] = FromDouble<T>(values[i]); });
    memory_.Write(image);
  }
  std::vector<double> values(size_t group = 0) {
    const std::vector<T> image = memory_.template Read<T>();
    size_t overwritten = 0;
    for (size_t i = 0; i < image.size(); ++i) {
      if (Padding(static_cast<int64_t>(i) % Columns()) && !(image[i] == kPadding)) ++overwritten;
    }
    EXPECT_EQ(overwritten, 0u) << "elements between heads";
    std::vector<double> values(Elements(group));
    ForEach(group, [&](size_t at, size_t i) { values[i] = ToDouble(image[at]); });
    return values;
  }

 private:
  static constexpr int64_t kBetween = 8;  // 16 bytes of bf16: the kernels' alignment
  static inline const T kPadding = FromDouble<T>(-776);

  size_t Elements(size_t group) const {
    return static_cast<size_t>(rows_ * batch_ * groups_[group].heads * groups_[group].dim);
  }
  int64_t First(size_t group) const {
    int64_t first = kBetween;
    for (size_t g = 0; g < group; ++g) first += groups_[g].heads * groups_[g].dim + kBetween;
    return first;
  }
  int64_t Columns() const { return First(groups_.size()); }
  bool Padding(int64_t column) const {
    for (size_t g = 0; g < groups_.size(); ++g) {
      if (First(g) <= column && column < First(g + 1) - kBetween) return false;
    }
    return true;
  }
  std::vector<T> Poisoned() const {
    std::vector<T> image(static_cast<size_t>(rows_ * batch_ * Columns()));
    for (size_t i = 0; i < image.size(); ++i) {
      image[i] = Padding(static_cast<int64_t>(i) % Columns()) ? kPadding : FromDouble<T>(NAN);
    }
    return image;
  }
  template <typename Fn>
  void ForEach(size_t group, Fn&& fn) const {
    const int64_t width = groups_[group].heads * groups_[group].dim;
    for (size_t i = 0; i < Elements(group); ++i) {
      const auto n = static_cast<int64_t>(i);
      const int64_t row = n / width / batch_, item = n / width % batch_;
      const int64_t line = order_ == BatchOrder::kInsideRows ? row * batch_ + item : item * rows_ + row;
      fn(static_cast<size_t>(line * Columns() + First(group) + n % width), i);
    }
  }

  int64_t rows_, batch_;
  std::vector<Group> groups_;
  BatchOrder order_;
  GuardedTensor memory_;
};

// Queries [q_begin, q_end) on keys [k_begin, k_end).
struct Piece {
  int64_t q_begin = 0, q_end = 0, k_begin = 0, k_end = 0;
  MaskShape mask_shape = MaskShape::kGeneral;
};

template <typename T>
class GpuAttention {
 public:
  struct Options {
    MaskShape mask_shape = MaskShape::kGeneral;
    Determinism determinism = Determinism::kOff;
    BatchOrder order = BatchOrder::kInsideRows;
    AttentionChoice attention = AttentionChoice::kFastest;
  };

  GpuAttention(const AttentionProblem& problem, const Operands<double>& in, Options options)
      : p_(problem),
        options_(options),
        ctx(kGpu, options.determinism),
        q(QueryHeads<T>(p_.shape.dim)),
        kv(KeyHeads<T>()),
        dout(QueryHeads<T>(p_.shape.v_dim)),
        out(QueryHeads<T>(p_.shape.v_dim)),
        dq(QueryHeads<T>(p_.shape.dim)),
        dkv(KeyHeads<T>()),
        out_sum(QueryHeads<float>(p_.shape.v_dim)),
        dq_sum(QueryHeads<float>(p_.shape.dim)),
        dkv_sum(KeyHeads<float>()),
        lse(ctx, DType::kF32, StatsShape(), 0),
        delta(ctx, DType::kF32, StatsShape(), 0),
        lo(ctx, DType::kI64, {p_.tokens()}, 0),
        hi(ctx, DType::kI64, {p_.tokens()}, 0) {
    ctx.attention = options.attention;
    lo.Write(p_.lo);
    hi.Write(p_.hi);
    q.Set(in.q);
    kv.Set(in.k, 0);
    kv.Set(in.v, 1);
    dout.Set(in.dout);
  }

  Piece All() const { return {0, p_.shape.q_rows, 0, p_.shape.k_rows, options_.mask_shape}; }
  // Keys cut into order.size() equal chunks, taken in that order.
  std::vector<Piece> Chunks(const std::vector<int64_t>& order) const {
    const auto chunks = static_cast<int64_t>(order.size());
    std::vector<Piece> pieces;
    for (const int64_t c : order) {
      pieces.push_back(All());
      pieces.back().k_begin = c * p_.shape.k_rows / chunks;
      pieces.back().k_end = (c + 1) * p_.shape.k_rows / chunks;
    }
    return pieces;
  }
  AttentionBlock Block(const Piece& piece) {
    const int64_t batch = p_.shape.batch;
    return {.q = ConstHeadsRef(q.ref()).Rows(piece.q_begin, piece.q_end),
            .k = ConstHeadsRef(kv.ref(0)).Rows(piece.k_begin, piece.k_end),
            .v = ConstHeadsRef(kv.ref(1)).Rows(piece.k_begin, piece.k_end),
            .bounds = {lo.ref().Rows(piece.q_begin * batch, piece.q_end * batch),
                       hi.ref().Rows(piece.q_begin * batch, piece.q_end * batch)},
            .mask_shape = piece.mask_shape,
            .key_positions = {p_.positions.offset + p_.positions.stride * piece.k_begin, p_.positions.stride},
            .scale = p_.scale()};
  }
  AttentionPartial Partial(const Piece& piece) {
    return {out_sum.ref().Rows(piece.q_begin, piece.q_end), lse.ref().Rows(piece.q_begin, piece.q_end)};
  }

  // With a carry, whose gradients are added to numbers that are taken away again.
  AttentionResults<double> Carried(const std::vector<Piece>& pieces) {
    ANNULUS_CHECK_OK(ResetPartial(ctx, {out_sum.ref(), lse.ref()}));
    for (const Piece& piece : pieces) ANNULUS_CHECK_OK(AttentionForward(ctx, Block(piece), Partial(piece)));
    out.Set(out_sum.values());
    const auto initial = [](int64_t n) { return Rounded<float>(NormalValues<double>(n, "initial")); };
    const auto dq_before = initial(p_.q_elements()), dk_before = initial(p_.k_elements()),
               dv_before = initial(p_.v_elements());
    dq_sum.Set(dq_before);
    dkv_sum.Set(dk_before, 0);
    dkv_sum.Set(dv_before, 1);
    ANNULUS_CHECK_OK(AttentionDelta(ctx, out.ref(), dout.ref(), delta.ref()));
    for (const Piece& piece : pieces) {
      ANNULUS_CHECK_OK(AttentionBackward(ctx, Block(piece), Gradients(dq_sum, dkv_sum, piece)));
    }
    AttentionResults<double> results = Results(out_sum, dq_sum, dkv_sum);
    Subtract(dq_before, results.dq);
    Subtract(dk_before, results.dk);
    Subtract(dv_before, results.dv);
    return results;
  }
  AttentionResults<double> Whole() {
    ANNULUS_CHECK_OK(AttentionForwardWhole(ctx, Block(All()), out.ref(), lse.ref()));
    ANNULUS_CHECK_OK(AttentionDelta(ctx, out.ref(), dout.ref(), delta.ref()));
    ANNULUS_CHECK_OK(AttentionBackwardWhole(ctx, Block(All()), Gradients(dq, dkv, All())));
    return Results(out, dq, dkv);
  }
  template <typename G>
  AttentionGradients Gradients(HeadsOnGpu<G>& to_q, HeadsOnGpu<G>& to_kv, const Piece& piece) {
    return {.out = ConstHeadsRef(out.ref()).Rows(piece.q_begin, piece.q_end),
            .dout = ConstHeadsRef(dout.ref()).Rows(piece.q_begin, piece.q_end),
            .lse = lse.ref().Rows(piece.q_begin, piece.q_end),
            .delta = delta.ref().Rows(piece.q_begin, piece.q_end),
            .dq = to_q.ref().Rows(piece.q_begin, piece.q_end),
            .dk = to_kv.ref(0).Rows(piece.k_begin, piece.k_end),
            .dv = to_kv.ref(1).Rows(piece.k_begin, piece.k_end)};
  }

 private:
  Shape StatsShape() const { return {p_.shape.q_rows, p_.shape.batch, p_.shape.heads}; }
  template <typename G>
  HeadsOnGpu<G> QueryHeads(int64_t dim) {
    return {ctx, p_.shape.q_rows, p_.shape.batch, {{p_.shape.heads, dim}}, options_.order};
  }
  template <typename G>
  HeadsOnGpu<G> KeyHeads() {
    const AttentionShape& s = p_.shape;
    return {ctx, s.k_rows, s.batch, {{s.kv_heads, s.dim}, {s.kv_heads, s.v_dim}}, options_.order};
  }
  static void Subtract(const std::vector<double>& x, std::vector<double>& from) {
    for (size_t i = 0; i < x.size(); ++i) from[i] -= x[i];
  }
  template <typename G>
  AttentionResults<double> Results(HeadsOnGpu<G>& o, HeadsOnGpu<G>& to_q, HeadsOnGpu<G>& to_kv) {
    return {o.values(), Cast<double>(lse.Read<float>()), to_q.values(), to_kv.values(0), to_kv.values(1)};
  }

  const AttentionProblem p_;
  const Options options_;

 public:
  Context ctx;
  HeadsOnGpu<T> q, kv, dout, out, dq, dkv;  // dq, dkv: of whole blocks
  HeadsOnGpu<float> out_sum, dq_sum, dkv_sum;
  GuardedTensor lse, delta, lo, hi;
};

}  // namespace annulus::testing
