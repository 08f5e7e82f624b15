// Attention over loopback ranks against a dense softmax over the whole sequence, in f64.

#include "annulus/parallel/context_attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "ops/harness.h"
#include "parallel/sequences.h"
#include "support/loopback.h"

namespace annulus::testing {
namespace {

constexpr int64_t kHeads = 4, kKvHeads = 2, kDim = 4,
                  kVDim = 6;  // dims differ: neither may stand for the other
constexpr int64_t kQColumns = kHeads * kDim, kOutColumns = kHeads * kVDim,
                  kKvColumns = kKvHeads * (kDim + kVDim);
constexpr double kScale = 0.4;
// Sums of at most 40 terms of order one: a few dozen epsilons (2e-16) apart in any order of summing.
constexpr double kTolerance = 1e-12;

struct Case {
  SequenceLayout layout;
  SequenceBatch sequences;
  int64_t window = 0;

  size_t tokens() const { return static_cast<size_t>(layout.padded_length() * sequences.batch); }
};

// One row of columns per token, token = position * batch + item.
struct Whole {
  std::vector<double> q, kv, dout;  // inputs
  std::vector<double> out, lse;     // [.., kOutColumns], [.., kHeads]
  std::vector<double> dq, dkv;
};

Whole MakeInputs(const Case& c) {
  const int64_t tokens = static_cast<int64_t>(c.tokens());
  Whole whole;
  whole.q = NormalValues<double>(tokens * kQColumns, "q");
  whole.kv = NormalValues<double>(tokens * kKvColumns, "kv");
  whole.dout = NormalValues<double>(tokens * kOutColumns, "dout");
  // Padding keys are never even read: a NaN would spread.
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t item = t % c.sequences.batch;
    if (t / c.sequences.batch < c.sequences.lengths[static_cast<size_t>(item)]) continue;
    std::fill_n(whole.kv.begin() + t * kKvColumns, kKvColumns, std::numeric_limits<double>::quiet_NaN());
  }
  return whole;
}

Whole MakeOutputs(const Case& c) {
  Whole whole;
  whole.out.resize(c.tokens() * kOutColumns);
  whole.lse.resize(c.tokens() * kHeads);
  whole.dq.resize(c.tokens() * kQColumns);
  whole.dkv.resize(c.tokens() * kKvColumns);
  return whole;
}

double Dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// One query of one head: scores, softmax, and the gradients by the softmax's Jacobian, without the LSE form.
void DenseQuery(const Case& c, const Whole& in, int64_t item, int64_t position, int64_t head, Whole* result) {
  const int64_t batch = c.sequences.batch, kv_head = head / (kHeads / kKvHeads);
  const int64_t token = position * batch + item;
  const double* q = &in.q[static_cast<size_t>(token * kQColumns + head * kDim)];
  const double* dout = &in.dout[static_cast<size_t>(token * kOutColumns + head * kVDim)];
  std::vector<int64_t> keys;
  std::vector<double> weights;
  double sum = 0;
  const auto k_at = [&](int64_t key) {
    return static_cast<size_t>((key * batch + item) * kKvColumns + kv_head * kDim);
  };
  const auto v_at = [&](int64_t key) {
    return static_cast<size_t>((key * batch + item) * kKvColumns + kKvHeads * kDim + kv_head * kVDim);
  };
  for (int64_t key = 0; key < c.layout.length(); ++key) {
    if (!Sees(c.sequences, c.window, item, position, key)) continue;
    keys.push_back(key);
    weights.push_back(std::exp(kScale * Dot(q, &in.kv[k_at(key)], kDim)));
    sum += weights.back();
  }
  result->lse[static_cast<size_t>(token * kHeads + head)] = std::log(sum);  // -inf without keys
  double* out = &result->out[static_cast<size_t>(token * kOutColumns + head * kVDim)];
  double* dq = &result->dq[static_cast<size_t>(token * kQColumns + head * kDim)];
  double mean_dweight = 0;
  for (size_t n = 0; n < keys.size(); ++n) {
    weights[n] /= sum;
    const double* v = &in.kv[v_at(keys[n])];
    for (int64_t i = 0; i < kVDim; ++i) out[i] += weights[n] * v[i];
    mean_dweight += weights[n] * Dot(dout, v, kVDim);
  }
  for (size_t n = 0; n < keys.size(); ++n) {
    const double* k = &in.kv[k_at(keys[n])];
    const double dscore = kScale * weights[n] * (Dot(dout, &in.kv[v_at(keys[n])], kVDim) - mean_dweight);
    for (int64_t i = 0; i < kDim; ++i) {
      dq[i] += dscore * k[i];
      result->dkv[k_at(keys[n]) + static_cast<size_t>(i)] += dscore * q[i];
    }
    for (int64_t i = 0; i < kVDim; ++i)
      result->dkv[v_at(keys[n]) + static_cast<size_t>(i)] += weights[n] * dout[i];
  }
}

Whole Dense(const Case& c, const Whole& in) {
  Whole result = MakeOutputs(c);
  for (int64_t item = 0; item < c.sequences.batch; ++item) {
    for (int64_t position = 0; position < c.layout.padded_length(); ++position) {
      for (int64_t head = 0; head < kHeads; ++head) DenseQuery(c, in, item, position, head, &result);
    }
  }
  return result;
}

enum class Direction { kToLocal, kToWhole };

// Moves this rank's rows between a whole tensor and a local one. Ranks touch disjoint rows.
void MoveRows(const Case& c, int cp_rank, Direction direction, std::vector<double>* whole, TensorRef local) {
  const int64_t columns = local.dim(1) * local.dim(2);
  for (int64_t row = 0; row < c.layout.local_rows(); ++row) {
    double* global = whole->data() + c.layout.PositionOf(cp_rank, row) * columns;
    double* mine = local.data<double>() + row * columns;
    if (direction == Direction::kToLocal) std::copy_n(global, columns, mine);
    if (direction == Direction::kToWhole) std::copy_n(mine, columns, global);
  }
}

// Forward and backward of one rank, whose rows go into `result`.
void RunRank(const Case& c, Whole& in, AttentionGeometry& geometry, Whole* result) {
  Context ctx{Device{}};
  const int r = geometry.cp().rank();
  const int64_t rows = c.layout.local_rows(), batch = c.sequences.batch;
  const auto tensor = [&](int64_t columns) { return Tensor(Device{}, DType::kF64, {rows, batch, columns}); };
  const Tensor q = tensor(kQColumns), kv = tensor(kKvColumns), dout = tensor(kOutColumns);
  const Tensor out = tensor(kOutColumns), lse = tensor(kHeads), dq = tensor(kQColumns),
               dkv = tensor(kKvColumns);
  MoveRows(c, r, Direction::kToLocal, &in.q, q.ref());
  MoveRows(c, r, Direction::kToLocal, &in.kv, kv.ref());
  MoveRows(c, r, Direction::kToLocal, &in.dout, dout.ref());
  for (const Tensor* result : {&out, &dq, &dkv}) {  // overwritten
    std::fill_n(result->ref().data<double>(), result->ref().elements(),
                std::numeric_limits<double>::quiet_NaN());
  }

  const ContextAttentionShape shape{.heads = kHeads,
                                    .kv_heads = kKvHeads,
                                    .head_dim = kDim,
                                    .v_head_dim = kVDim,
                                    .window = c.window,
                                    .scale = kScale};
  ExchangeStats stats;
  ANNULUS_CHECK_OK(ContextAttentionForward(
      ctx, geometry, shape, {.q = q.ref(), .kv = kv.ref(), .out = out.ref(), .lse = lse.ref()}, &stats));
  ANNULUS_CHECK_OK(ContextAttentionBackward(ctx, geometry, shape,
                                            {.q = q.ref(),
                                             .kv = kv.ref(),
                                             .out = out.ref(),
                                             .lse = lse.ref(),
                                             .dout = dout.ref(),
                                             .dq = dq.ref(),
                                             .dkv = dkv.ref()},
                                            &stats));
  const AttentionGeometry::Mask* mask = geometry.MaskFor(ctx, c.window).value();
  const int64_t row_bytes = batch * kKvColumns * SizeOf(DType::kF64);
  EXPECT_EQ(stats.bytes_sent, BytesSent(mask->forward.plan, r, row_bytes, row_bytes) +
                                  BytesSent(mask->backward.plan, r, row_bytes, row_bytes));
  EXPECT_EQ(ctx.scratch.used_bytes(), 0);
  MoveRows(c, r, Direction::kToWhole, &result->out, out.ref());
  MoveRows(c, r, Direction::kToWhole, &result->lse, lse.ref());
  MoveRows(c, r, Direction::kToWhole, &result->dq, dq.ref());
  MoveRows(c, r, Direction::kToWhole, &result->dkv, dkv.ref());
}

// Relative to the largest entry; infinities and NaN sit at the same places.
void ExpectClose(absl::string_view name, const std::vector<double>& got,
                 const std::vector<double>& expected) {
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_FALSE(std::isnan(got[i])) << name << " at " << i;
    if (std::isinf(expected[i]) || std::isinf(got[i])) {
      ASSERT_EQ(got[i], expected[i]) << name << " at " << i;
    }
  }
  EXPECT_LE(MaxDifference(got, expected), kTolerance * MaxAbs(expected)) << name;
}

void ExpectDense(const Case& c, const Whole& in, const Whole& got) {
  const Whole expected = Dense(c, in);
  ExpectClose("out", got.out, expected.out);
  ExpectClose("lse", got.lse, expected.lse);
  ExpectClose("dq", got.dq, expected.dq);
  ExpectClose("dkv", got.dkv, expected.dkv);
}

struct MaskKind {
  const char* name;
  int64_t window;
  Documents documents;
  Lengths lengths;
  Visibility visibility = Visibility::kCausal;
};
constexpr MaskKind kMasks[] = {
    {"causal", 0, Documents::kNone, Lengths::kFull},
    {"window", 5, Documents::kNone, Lengths::kFull},
    {"window_of_one", 1, Documents::kNone, Lengths::kFull},
    {"documents", 0, Documents::kRandom, Lengths::kFull},
    {"mixed_with_padding", 9, Documents::kRandom, Lengths::kRandom},
    {"full", 0, Documents::kNone, Lengths::kFull, Visibility::kFull},
    {"mixed_both_ways", 9, Documents::kRandom, Lengths::kRandom, Visibility::kFull}};

class ContextAttention : public ::testing::TestWithParam<std::tuple<LayoutKind, int>> {};

INSTANTIATE_TEST_SUITE_P(LayoutsAndRanks, ContextAttention,
                         ::testing::Combine(::testing::ValuesIn(kLayouts), ::testing::Range(1, 9)),
                         [](const auto& info) {
                           return NameOf(std::get<0>(info.param)) + std::to_string(std::get<1>(info.param));
                         });

TEST_P(ContextAttention, EqualsDenseSoftmax) {
  const auto [kind, ranks] = GetParam();
  for (const MaskKind& mask : kMasks) {
    for (const auto& [length, batch] : {std::pair{32, 1}, std::pair{37, 2}, std::pair{11, 3}}) {
      SCOPED_TRACE(::testing::Message() << mask.name << ", length " << length << ", batch " << batch);
      const uint64_t seed = static_cast<uint64_t>(length + batch);
      Case c{SequenceLayout(kind, length, ranks),
             RandomSequences(seed, length, batch, mask.lengths, mask.documents), mask.window};
      c.sequences.visibility = mask.visibility;
      Whole in = MakeInputs(c), got = MakeOutputs(c);
      OnLoopback(ranks, [&](Communicator cp) {
        AttentionGeometry geometry(c.layout, cp);
        geometry.SetBatch(c.sequences);
        RunRank(c, in, geometry, &got);
      });
      ExpectDense(c, in, got);
    }
  }
}

// One geometry serves layers of several windows and batches of several document structures.
TEST(Geometry, FollowsTheBatchAndTheWindow) {
  const SequenceLayout layout(LayoutKind::kZigzag, 29, 3);
  std::vector<Case> cases;
  for (const uint64_t seed : {1, 2}) {
    for (const int64_t window : {0, 4}) {
      cases.push_back({layout, RandomSequences(seed, 29, 2, Lengths::kRandom, Documents::kRandom), window});
    }
  }
  // Of the same size, then with other lengths, documents, none again, and another batch.
  const auto add = [&](int64_t batch, Lengths lengths, Documents documents) {
    cases.push_back({layout, RandomSequences(3, 29, batch, lengths, documents), 4});
  };
  add(2, Lengths::kFull, Documents::kNone);
  add(2, Lengths::kRandom, Documents::kNone);
  add(2, Lengths::kFull, Documents::kNone);
  add(2, Lengths::kFull, Documents::kRandom);
  add(2, Lengths::kFull, Documents::kNone);
  add(1, Lengths::kFull, Documents::kNone);
  add(1, Lengths::kFull, Documents::kNone);
  cases.back().sequences.visibility = Visibility::kFull;
  std::vector<Whole> in, got;
  for (const Case& c : cases) {
    in.push_back(MakeInputs(c));
    got.push_back(MakeOutputs(c));
  }
  OnLoopback(3, [&](Communicator cp) {
    AttentionGeometry geometry(layout, cp);
    for (size_t i = 0; i < cases.size(); ++i) {
      geometry.SetBatch(cases[i].sequences);
      RunRank(cases[i], in[i], geometry, &got[i]);
    }
  });
  for (size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE(::testing::Message() << "case " << i);
    ExpectDense(cases[i], in[i], got[i]);
  }
}

TEST(Geometry, KeepsPlansWhileTheMasksStay) {
  const SequenceBatch sequences = RandomSequences(1, 20, 2, Lengths::kFull, Documents::kNone);
  OnLoopback(2, [&](Communicator cp) {
    Context ctx{Device{}};
    AttentionGeometry geometry(SequenceLayout(LayoutKind::kStriped, 20, 2), cp);
    geometry.SetBatch(sequences);
    const AttentionGeometry::Mask* all = geometry.MaskFor(ctx, 0).value();
    const AttentionGeometry::Mask* window = geometry.MaskFor(ctx, 3).value();
    EXPECT_NE(all->bounds.lo, window->bounds.lo);
    geometry.SetBatch(sequences);
    EXPECT_EQ(geometry.MaskFor(ctx, 0).value(), all);
    EXPECT_EQ(geometry.MaskFor(ctx, 3).value(), window);
  });
}

TEST(Geometry, RanksThatDisagreeOnTheBatchAreTold) {
  OnLoopback(3, [&](Communicator cp) {
    const int64_t length = cp.rank() == 1 ? 9 : 18;
    Context ctx{Device{}};
    AttentionGeometry geometry(SequenceLayout(LayoutKind::kZigzag, 18, 3), cp);
    geometry.SetBatch({.batch = 1, .lengths = {length}, .document_starts = {}});
    EXPECT_EQ(geometry.MaskFor(ctx, 0).status().code(), absl::StatusCode::kInvalidArgument);
  });
}

}  // namespace
}  // namespace annulus::testing
