#pragma once

// Attention problems for tests: shapes, masks, random operands, a naive reference in any floating type, and
// the kernels run on chunks of the keys in any order.

#include <functional>

#include "annulus/ops/attention.h"
#include "ops/harness.h"

namespace annulus::testing {

struct AttentionShape {
  int64_t q_rows = 0, k_rows = 0, batch = 1, heads = 1, kv_heads = 1, dim = 4, v_dim = 4;
};

enum class MaskKind { kFull, kCausal, kWindow, kDocuments, kGaps, kRandom };
inline constexpr MaskKind kAllMasks[] = {MaskKind::kFull,      MaskKind::kCausal, MaskKind::kWindow,
                                         MaskKind::kDocuments, MaskKind::kGaps,   MaskKind::kRandom};

struct AttentionProblem {
  AttentionShape shape;
  KeyPositions positions;
  std::vector<int64_t> lo, hi;

  double scale() const { return 1 / std::sqrt(static_cast<double>(std::max<int64_t>(shape.dim, 1))); }
  int64_t tokens() const { return shape.q_rows * shape.batch; }
  int64_t q_elements() const { return tokens() * shape.heads * shape.dim; }
  int64_t out_elements() const { return tokens() * shape.heads * shape.v_dim; }
  int64_t k_elements() const { return shape.k_rows * shape.batch * shape.kv_heads * shape.dim; }
  int64_t v_elements() const { return shape.k_rows * shape.batch * shape.kv_heads * shape.v_dim; }
  int64_t stats() const { return tokens() * shape.heads; }
  bool Allowed(int64_t row, int64_t item, int64_t key) const {
    const auto token = static_cast<size_t>(row * shape.batch + item);
    const int64_t position = positions.offset + positions.stride * key;
    return lo[token] <= position && position < hi[token];
  }
};

// Query rows are spread evenly over the keys' positions; batch items differ by a shift.
inline AttentionProblem MakeProblem(const AttentionShape& shape, MaskKind mask, KeyPositions positions = {}) {
  AttentionProblem problem{.shape = shape, .positions = positions, .lo = {}, .hi = {}};
  const int64_t end = positions.offset + positions.stride * shape.k_rows;
  const RandomStream random(7, "bounds");
  for (int64_t row = 0; row < shape.q_rows; ++row) {
    for (int64_t item = 0; item < shape.batch; ++item) {
      const int64_t position = positions.offset + positions.stride * row * shape.k_rows / shape.q_rows + item;
      const auto index = static_cast<uint64_t>(row * shape.batch + item);
      const auto any = [&](uint64_t draw) {
        return static_cast<int64_t>(random.Below(2 * index + draw, static_cast<uint64_t>(end + 1)));
      };
      int64_t lo = 0, hi = end;
      switch (mask) {
        case MaskKind::kFull:
          break;
        case MaskKind::kCausal:
          hi = position + 1;
          break;
        case MaskKind::kWindow:
          lo = std::max<int64_t>(0, position - 9), hi = position + 1;
          break;
        case MaskKind::kDocuments:
          lo = position / 40 * 40, hi = position + 1;
          break;
        case MaskKind::kGaps:
          hi = row % 3 == 1 ? 0 : end;
          break;  // every third row sees nothing
        case MaskKind::kRandom:
          lo = any(0), hi = any(1);
          break;  // lo >= hi: nothing
      }
      problem.lo.push_back(lo);
      problem.hi.push_back(hi);
    }
  }
  return problem;
}

template <typename W>
struct Operands {
  std::vector<W> q, k, v, dout;
};

template <typename T>
Operands<T> RandomOperands(const AttentionProblem& p) {
  return {NormalValues<T>(p.q_elements(), "q"), NormalValues<T>(p.k_elements(), "k"),
          NormalValues<T>(p.v_elements(), "v"), NormalValues<T>(p.out_elements(), "dout")};
}

template <typename To, typename From>
Operands<To> CastAll(const Operands<From>& in) {
  return {Cast<To>(in.q), Cast<To>(in.k), Cast<To>(in.v), Cast<To>(in.dout)};
}

template <typename W>
struct AttentionResults {
  std::vector<W> out, lse, dq, dk, dv;
};

// One query row of one head at a time, with its whole row of probabilities. `round` is what kernels in 16
// bits do to the operands of their products and to results.
template <typename W, typename Round = std::identity>
AttentionResults<W> ReferenceAttention(const AttentionProblem& p, const Operands<W>& in, Round round = {}) {
  const AttentionShape& s = p.shape;
  AttentionResults<W> r{.out = std::vector<W>(in.dout.size()),
                        .lse = std::vector<W>(static_cast<size_t>(p.stats())),
                        .dq = std::vector<W>(in.q.size()),
                        .dk = std::vector<W>(in.k.size()),
                        .dv = std::vector<W>(in.v.size())};
  const auto keys = static_cast<size_t>(s.k_rows);
  for (int64_t token_head = 0; token_head < p.stats(); ++token_head) {
    const int64_t head = token_head % s.heads, item = token_head / s.heads % s.batch;
    const int64_t row = token_head / s.heads / s.batch, kv_head = head / (s.heads / s.kv_heads);
    const W *q = in.q.data() + token_head * s.dim, *dout = in.dout.data() + token_head * s.v_dim;
    W *out = r.out.data() + token_head * s.v_dim, *dq = r.dq.data() + token_head * s.dim;
    const auto kv_row = [&](size_t j) {
      return (static_cast<int64_t>(j) * s.batch + item) * s.kv_heads + kv_head;
    };
    const W scale = static_cast<W>(p.scale());
    std::vector<W> probability(keys), upstream(keys);
    W sum = 0, delta = 0;
    for (size_t j = 0; j < keys; ++j) {
      if (!p.Allowed(row, item, static_cast<int64_t>(j))) continue;
      W score = 0;
      for (int64_t i = 0; i < s.dim; ++i) score += q[i] * in.k[static_cast<size_t>(kv_row(j) * s.dim + i)];
      probability[j] = std::exp(scale * score);
      sum += probability[j];
    }
    r.lse[static_cast<size_t>(token_head)] = std::log(sum);
    if (sum == 0) continue;
    for (size_t j = 0; j < keys; ++j) {
      probability[j] /= sum;
      for (int64_t i = 0; i < s.v_dim; ++i) {
        const auto at = static_cast<size_t>(kv_row(j) * s.v_dim + i);
        out[i] += round(probability[j]) * in.v[at];
        upstream[j] += dout[i] * in.v[at];
        r.dv[at] += round(probability[j]) * dout[i];
      }
    }
    for (int64_t i = 0; i < s.v_dim; ++i) {
      out[i] = round(out[i]);
      delta += dout[i] * out[i];
    }
    for (size_t j = 0; j < keys; ++j) {
      const W dscore = scale * round(probability[j] * (upstream[j] - delta));
      for (int64_t i = 0; i < s.dim; ++i) {
        const auto at = static_cast<size_t>(kv_row(j) * s.dim + i);
        dq[i] += dscore * in.k[at];
        r.dk[at] += dscore * q[i];
      }
    }
  }
  for (std::vector<W>* gradient : {&r.dq, &r.dk, &r.dv}) {
    for (W& x : *gradient) x = round(x);
  }
  return r;
}

// What kernels in T are judged by, computed once for a problem.
template <typename T>
struct AttentionReference {
  AttentionReference(const AttentionProblem& problem, const Operands<T>& in)
      : naive(ReferenceAttention<T>(problem, in)),
        wide(ReferenceAttention<Wide<T>>(problem, CastAll<Wide<T>>(in))) {}
  AttentionResults<T> naive;
  AttentionResults<Wide<T>> wide;
};

// The operands of a problem as strided heads, and the kernels on [begin, end) of its keys.
template <typename T>
class AttentionRun {
 public:
  AttentionRun(const AttentionProblem& problem, const Operands<T>& in,
               BatchOrder order = BatchOrder::kInsideRows)
      : p_(problem),
        q(QueryDims(problem.shape.dim), order, in.q),
        k(KeyDims(problem.shape.dim), order, in.k),
        v(KeyDims(problem.shape.v_dim), order, in.v),
        dout(QueryDims(problem.shape.v_dim), order, in.dout),
        out(QueryDims(problem.shape.v_dim), order, in.dout),
        dq(QueryDims(problem.shape.dim), order, Zeros(problem.q_elements())),
        dk(KeyDims(problem.shape.dim), order, Zeros(problem.k_elements())),
        dv(KeyDims(problem.shape.v_dim), order, Zeros(problem.v_elements())),
        lse({problem.shape.q_rows, problem.shape.batch, problem.shape.heads}),
        delta({problem.shape.q_rows, problem.shape.batch, problem.shape.heads}),
        lo({problem.tokens()}, problem.lo),
        hi({problem.tokens()}, problem.hi) {}

  AttentionPartial partial() { return {.out = out.ref(), .lse = lse.ref()}; }
  AttentionBlock Block(int64_t begin, int64_t end) {
    return {.q = q.ref(),
            .k = ConstHeadsRef(k.ref()).Rows(begin, end),
            .v = ConstHeadsRef(v.ref()).Rows(begin, end),
            .bounds = {lo.ref(), hi.ref()},
            .key_positions = {p_.positions.offset + p_.positions.stride * begin, p_.positions.stride},
            .scale = p_.scale()};
  }
  // Keys cut into order.size() equal chunks, taken in that order.
  void Forward(const std::vector<int64_t>& order = {0}) {
    ANNULUS_CHECK_OK(ResetPartial(ctx, partial()));
    for (const int64_t c : order) {
      const auto [begin, end] = Range(c, order);
      ANNULUS_CHECK_OK(AttentionForward(ctx, Block(begin, end), partial()));
    }
  }
  void Backward(const std::vector<int64_t>& order = {0}) {
    ANNULUS_CHECK_OK(AttentionDelta(ctx, out.ref(), dout.ref(), delta.ref()));
    for (const int64_t c : order) {
      const auto [begin, end] = Range(c, order);
      ANNULUS_CHECK_OK(AttentionBackward(ctx, Block(begin, end), Gradients(begin, end)));
    }
  }
  void ForwardWhole() { ANNULUS_CHECK_OK(AttentionForwardWhole(ctx, WholeBlock(), out.ref(), lse.ref())); }
  void BackwardWhole() {
    ANNULUS_CHECK_OK(AttentionDelta(ctx, out.ref(), dout.ref(), delta.ref()));
    ANNULUS_CHECK_OK(AttentionBackwardWhole(ctx, WholeBlock(), Gradients(0, p_.shape.k_rows)));
  }
  AttentionBlock WholeBlock() { return Block(0, p_.shape.k_rows); }
  AttentionGradients Gradients(int64_t begin, int64_t end) {
    return {.out = out.ref(),
            .dout = dout.ref(),
            .lse = lse.ref(),
            .delta = delta.ref(),
            .dq = dq.ref(),
            .dk = dk.ref().Rows(begin, end),
            .dv = dv.ref().Rows(begin, end)};
  }
  AttentionResults<T> Results() {
    return {out.values(), lse.values(), dq.values(), dk.values(), dv.values()};
  }

 private:
  using Dims = typename StridedHeads<T>::Dims;
  static std::vector<T> Zeros(int64_t n) { return std::vector<T>(static_cast<size_t>(n)); }
  Dims QueryDims(int64_t dim) const { return {p_.shape.q_rows, p_.shape.batch, p_.shape.heads, dim}; }
  Dims KeyDims(int64_t dim) const { return {p_.shape.k_rows, p_.shape.batch, p_.shape.kv_heads, dim}; }
  std::pair<int64_t, int64_t> Range(int64_t chunk, const std::vector<int64_t>& order) const {
    const auto chunks = static_cast<int64_t>(order.size());
    return {chunk * p_.shape.k_rows / chunks, (chunk + 1) * p_.shape.k_rows / chunks};
  }

  const AttentionProblem p_;

 public:
  Context ctx{Device{}};
  StridedHeads<T> q, k, v, dout, out, dq, dk, dv;
  Guarded<T> lse, delta;
  Guarded<int64_t> lo, hi;
};

// Out and LSE. v is averaged: its largest element bounds what an output sums.
template <typename T>
void ExpectPartial(const AttentionReference<T>& reference, const Operands<T>& in,
                   const AttentionResults<T>& got) {
  ExpectMatches<T>(got.out, reference.naive.out, reference.wide.out, MaxAbs(in.v));
  ExpectMatches<T>(got.lse, reference.naive.lse, reference.wide.lse);
}

// `got` is what was there before and the gradients of the reference. A dS sums products dO V.
template <typename T>
void ExpectGradients(const AttentionReference<T>& reference, const Operands<T>& in,
                     const AttentionResults<T>& before, const AttentionResults<T>& got) {
  const auto expect = [&](const std::vector<T>& values, const std::vector<T>& initial, std::vector<T> naive,
                          std::vector<Wide<T>> wide) {
    for (size_t i = 0; i < initial.size(); ++i) {
      naive[i] += initial[i];
      wide[i] += static_cast<Wide<T>>(initial[i]);
    }
    ExpectMatches<T>(values, naive, wide, MaxAbs(in.dout) * std::max(MaxAbs(in.v), 1.0));
  };
  expect(got.dq, before.dq, reference.naive.dq, reference.wide.dq);
  expect(got.dk, before.dk, reference.naive.dk, reference.wide.dk);
  expect(got.dv, before.dv, reference.naive.dv, reference.wide.dv);
}

// Shapes around the tile edges: 128 query rows times heads, 128 keys.
inline std::vector<AttentionShape> EdgeShapes() {
  std::vector<AttentionShape> shapes;
  for (const int64_t q_rows : {0, 1, 127, 128, 129}) {
    for (const int64_t k_rows : {0, 1, 127, 128, 129}) {
      shapes.push_back({.q_rows = q_rows, .k_rows = k_rows, .dim = 5, .v_dim = 3});
    }
  }
  shapes.push_back(
      {.q_rows = 33, .k_rows = 300, .batch = 2, .heads = 4, .kv_heads = 4, .dim = 16, .v_dim = 8});
  shapes.push_back(
      {.q_rows = 65, .k_rows = 131, .batch = 2, .heads = 6, .kv_heads = 2, .dim = 8, .v_dim = 12});
  shapes.push_back({.q_rows = 43, .k_rows = 70, .batch = 3, .heads = 3, .kv_heads = 1, .dim = 1, .v_dim = 1});
  shapes.push_back({.q_rows = 2, .k_rows = 40, .heads = 260, .kv_heads = 2, .dim = 4, .v_dim = 4});
  return shapes;
}

}  // namespace annulus::testing
