#pragma once

// One attention layer over loopback ranks, its tensors as whole sequences, and the same by a dense softmax.

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "annulus/parallel/context_attention.h"
#include "ops/harness.h"
#include "parallel/sequences.h"
#include "support/loopback.h"

namespace annulus::testing {

struct LayerCase {
  SequenceLayout layout;
  SequenceBatch sequences;
  ContextAttentionShape shape;

  size_t tokens() const { return static_cast<size_t>(layout.padded_length() * sequences.batch); }
  int64_t q_columns() const { return shape.heads * shape.head_dim; }
  int64_t out_columns() const { return shape.heads * shape.v_head_dim; }
  int64_t kv_columns() const { return shape.kv_heads * (shape.head_dim + shape.v_head_dim); }
};

// Rows of columns, one a token: token = position * batch + item.
template <typename T>
struct WholeLayer {
  std::vector<T> q, kv, dout;  // inputs
  std::vector<T> out, lse;     // [.., out_columns], [.., heads]
  std::vector<T> dq, dkv;
};

// The same for every layout, T and number of ranks; seeds by `seed`.
template <typename T>
WholeLayer<T> MakeInputs(const LayerCase& c, uint64_t seed = 7) {
  WholeLayer<T> whole;
  const auto fill = [&](absl::string_view stream, int64_t columns, std::vector<T>* values) {
    const RandomStream random(seed, stream);
    values->resize(c.tokens() * static_cast<size_t>(columns));
    // Rounded to f32, which both dtypes hold.
    for (size_t i = 0; i < values->size(); ++i) (*values)[i] = static_cast<float>(random.Normal(i));
  };
  fill("q", c.q_columns(), &whole.q);
  fill("kv", c.kv_columns(), &whole.kv);
  fill("dout", c.out_columns(), &whole.dout);
  // Padding keys are never even read: a NaN would spread.
  for (size_t t = 0; t < c.tokens(); ++t) {
    const auto batch = static_cast<size_t>(c.sequences.batch);
    if (static_cast<int64_t>(t / batch) < c.sequences.lengths[t % batch]) continue;
    std::fill_n(whole.kv.begin() + static_cast<int64_t>(t) * c.kv_columns(), c.kv_columns(),
                std::numeric_limits<T>::quiet_NaN());
  }
  return whole;
}

template <typename T>
WholeLayer<T> MakeOutputs(const LayerCase& c) {
  WholeLayer<T> whole;
  whole.out.resize(c.tokens() * static_cast<size_t>(c.out_columns()));
  whole.lse.resize(c.tokens() * static_cast<size_t>(c.shape.heads));
  whole.dq.resize(c.tokens() * static_cast<size_t>(c.q_columns()));
  whole.dkv.resize(c.tokens() * static_cast<size_t>(c.kv_columns()));
  return whole;
}

// One rank's tensors. Results are NaN: they are overwritten.
template <typename T>
class RankLayer {
 public:
  RankLayer(const LayerCase& c, const WholeLayer<T>& in, int cp_rank)
      : c_(c),
        rank_(cp_rank),
        q_(Make(c.q_columns())),
        kv_(Make(c.kv_columns())),
        dout_(Make(c.out_columns())),
        out_(Make(c.out_columns())),
        lse_(Make(c.shape.heads)),
        dq_(Make(c.q_columns())),
        dkv_(Make(c.kv_columns())) {
    ForRows(in.q, q_, [](const T* whole, T* mine, int64_t n) { std::copy_n(whole, n, mine); });
    ForRows(in.kv, kv_, [](const T* whole, T* mine, int64_t n) { std::copy_n(whole, n, mine); });
    ForRows(in.dout, dout_, [](const T* whole, T* mine, int64_t n) { std::copy_n(whole, n, mine); });
  }

  absl::Status Forward(Context& ctx, AttentionGeometry& geometry, ExchangeStats* stats) {
    return ContextAttentionForward(ctx, geometry, c_.shape,
                                   {.q = q_.ref(), .kv = kv_.ref(), .out = out_.ref(), .lse = lse_.ref()},
                                   stats);
  }
  absl::Status Backward(Context& ctx, AttentionGeometry& geometry, ExchangeStats* stats) {
    return ContextAttentionBackward(ctx, geometry, c_.shape,
                                    {.q = q_.ref(),
                                     .kv = kv_.ref(),
                                     .out = out_.ref(),
                                     .lse = lse_.ref(),
                                     .dout = dout_.ref(),
                                     .dq = dq_.ref(),
                                     .dkv = dkv_.ref()},
                                    stats);
  }
  // Ranks write disjoint rows.
  void Store(WholeLayer<T>* result) const {
    const auto store = [](T* whole, const T* mine, int64_t n) { std::copy_n(mine, n, whole); };
    ForRows(result->out, out_, store);
    ForRows(result->lse, lse_, store);
    ForRows(result->dq, dq_, store);
    ForRows(result->dkv, dkv_, store);
  }

 private:
  Tensor Make(int64_t columns) const {
    Tensor tensor(Device{}, DTypeOf<T>(), {c_.layout.local_rows(), c_.sequences.batch, columns});
    std::fill_n(tensor.ref().template data<T>(), tensor.ref().elements(),
                std::numeric_limits<T>::quiet_NaN());
    return tensor;
  }
  template <typename Whole, typename Fn>
  void ForRows(Whole& whole, const Tensor& local, const Fn& fn) const {
    const int64_t columns = local.ref().dim(1) * local.ref().dim(2);
    for (int64_t row = 0; row < c_.layout.local_rows(); ++row) {
      fn(whole.data() + c_.layout.PositionOf(rank_, row) * columns,
         local.ref().template data<T>() + row * columns, columns);
    }
  }

  const LayerCase& c_;
  int rank_;
  Tensor q_, kv_, dout_, out_, lse_, dq_, dkv_;
};

// Bytes that a rank sends in one run of a plan.
inline int64_t BytesSent(const AttentionGeometry::Schedule& schedule, int cp_rank) {
  const ExchangePlan& plan = schedule.plan;
  const RankPlan& rank = plan.ranks[static_cast<size_t>(cp_rank)];
  int64_t bytes = 0;
  for (const Step& step : rank.steps) {
    if (step.kind != StepKind::kSend) continue;
    const SlotSpec& slot = rank.slots[static_cast<size_t>(step.slot)];
    const HeadGroup group =
        slot.group == kAllHeads ? AllHeadsOf(schedule.layer) : plan.groups[static_cast<size_t>(slot.group)];
    for (const SlotField& field : FieldsOf(schedule.layer, plan.pass, group, slot)) {
      bytes += step.rows.rows.size() * field.row.elements() * SizeOf(field.dtype);
    }
  }
  return bytes;
}

// Forward and backward of one rank, whose rows go into `result`.
template <typename T>
void RunRank(const LayerCase& c, const WholeLayer<T>& in, AttentionGeometry& geometry,
             WholeLayer<T>* result) {
  Context ctx{Device{}};
  RankLayer<T> layer(c, in, geometry.cp().rank());
  ExchangeStats stats;
  ANNULUS_CHECK_OK(layer.Forward(ctx, geometry, &stats));
  ANNULUS_CHECK_OK(layer.Backward(ctx, geometry, &stats));
  int64_t bytes = 0;
  for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
    bytes += BytesSent(*geometry.ScheduleFor(ctx, c.shape, DTypeOf<T>(), pass).value(), geometry.cp().rank());
  }
  EXPECT_EQ(stats.bytes_sent, bytes);
  EXPECT_EQ(ctx.scratch.used_bytes(), 0);
  layer.Store(result);
}

// On loopback ranks.
template <typename T>
WholeLayer<T> RunLayer(const LayerCase& c, const WholeLayer<T>& in, const ExchangeOptions& options = {}) {
  WholeLayer<T> result = MakeOutputs<T>(c);
  OnLoopback(c.layout.ranks(), [&](Communicator cp) {
    AttentionGeometry geometry(c.layout, cp, options);
    geometry.SetBatch(c.sequences);
    RunRank(c, in, geometry, &result);
  });
  return result;
}

// One query of one head: scores, softmax, and the gradients by the softmax's Jacobian, without the LSE form.
inline void DenseQuery(const LayerCase& c, const WholeLayer<double>& in, int64_t item, int64_t position,
                       int64_t head, WholeLayer<double>* result) {
  const ContextAttentionShape& s = c.shape;
  const int64_t batch = c.sequences.batch, kv_head = head / (s.heads / s.kv_heads);
  const int64_t token = position * batch + item;
  const auto dot = [](const double* a, const double* b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
  };
  const double* q = &in.q[static_cast<size_t>(token * c.q_columns() + head * s.head_dim)];
  const double* dout = &in.dout[static_cast<size_t>(token * c.out_columns() + head * s.v_head_dim)];
  std::vector<int64_t> keys;
  std::vector<double> weights;
  double sum = 0;
  const auto k_at = [&](int64_t key) {
    return static_cast<size_t>((key * batch + item) * c.kv_columns() + kv_head * s.head_dim);
  };
  const auto v_at = [&](int64_t key) {
    return static_cast<size_t>((key * batch + item) * c.kv_columns() + s.kv_heads * s.head_dim +
                               kv_head * s.v_head_dim);
  };
  for (int64_t key = 0; key < c.layout.length(); ++key) {
    if (!Sees(c.sequences, s.window, item, position, key)) continue;
    keys.push_back(key);
    weights.push_back(std::exp(s.scale * dot(q, &in.kv[k_at(key)], s.head_dim)));
    sum += weights.back();
  }
  result->lse[static_cast<size_t>(token * s.heads + head)] = std::log(sum);  // -inf without keys
  double* out = &result->out[static_cast<size_t>(token * c.out_columns() + head * s.v_head_dim)];
  double* dq = &result->dq[static_cast<size_t>(token * c.q_columns() + head * s.head_dim)];
  double mean_dweight = 0;
  for (size_t n = 0; n < keys.size(); ++n) {
    weights[n] /= sum;
    const double* v = &in.kv[v_at(keys[n])];
    for (int64_t i = 0; i < s.v_head_dim; ++i) out[i] += weights[n] * v[i];
    mean_dweight += weights[n] * dot(dout, v, s.v_head_dim);
  }
  for (size_t n = 0; n < keys.size(); ++n) {
    const double* k = &in.kv[k_at(keys[n])];
    const double dscore =
        s.scale * weights[n] * (dot(dout, &in.kv[v_at(keys[n])], s.v_head_dim) - mean_dweight);
    for (int64_t i = 0; i < s.head_dim; ++i) {
      dq[i] += dscore * k[i];
      result->dkv[k_at(keys[n]) + static_cast<size_t>(i)] += dscore * q[i];
    }
    for (int64_t i = 0; i < s.v_head_dim; ++i)
      result->dkv[v_at(keys[n]) + static_cast<size_t>(i)] += weights[n] * dout[i];
  }
}

inline WholeLayer<double> DenseLayer(const LayerCase& c, const WholeLayer<double>& in) {
  WholeLayer<double> result = MakeOutputs<double>(c);
  for (int64_t item = 0; item < c.sequences.batch; ++item) {
    for (int64_t position = 0; position < c.layout.padded_length(); ++position) {
      for (int64_t head = 0; head < c.shape.heads; ++head) DenseQuery(c, in, item, position, head, &result);
    }
  }
  return result;
}

// Relative to the largest entry; infinities and NaN sit at the same places. Of the shorter of the two: the
// layouts of one sequence pad it to different lengths.
inline void ExpectClose(absl::string_view name, std::vector<double> got, std::vector<double> expected) {
  // Sums of at most 200 terms of order one: a few dozen epsilons (2e-16) apart in any order of summing.
  constexpr double kTolerance = 1e-12;
  const size_t size = std::min(got.size(), expected.size());
  got.resize(size), expected.resize(size);
  for (size_t i = 0; i < size; ++i) {
    ASSERT_FALSE(std::isnan(got[i])) << name << " at " << i;
    if (std::isinf(expected[i]) || std::isinf(got[i])) {
      ASSERT_EQ(got[i], expected[i]) << name << " at " << i;
    }
  }
  EXPECT_LE(MaxDifference(got, expected), kTolerance * MaxAbs(expected)) << name;
}

inline void ExpectSameLayer(const WholeLayer<double>& got, const WholeLayer<double>& expected) {
  ExpectClose("out", got.out, expected.out);
  ExpectClose("lse", got.lse, expected.lse);
  ExpectClose("dq", got.dq, expected.dq);
  ExpectClose("dkv", got.dkv, expected.dkv);
}

// Padding sees nothing and is seen by nothing: no output, LSE -inf, no gradients.
inline void ExpectEmptyPadding(const LayerCase& c, const WholeLayer<double>& got) {
  const auto expect = [&](const std::vector<double>& values, int64_t columns, double value) {
    for (size_t t = 0; t < c.tokens(); ++t) {
      const auto batch = static_cast<size_t>(c.sequences.batch);
      if (static_cast<int64_t>(t / batch) < c.sequences.lengths[t % batch]) continue;
      for (int64_t i = 0; i < columns; ++i) {
        ASSERT_EQ(values[t * static_cast<size_t>(columns) + static_cast<size_t>(i)], value) << "token " << t;
      }
    }
  };
  expect(got.out, c.out_columns(), 0);
  expect(got.lse, c.shape.heads, -std::numeric_limits<double>::infinity());
  expect(got.dq, c.q_columns(), 0);
  expect(got.dkv, c.kv_columns(), 0);
}

}  // namespace annulus::testing
