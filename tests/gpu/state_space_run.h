#pragma once

// Runs of the scan and of the delta rule for ExpectOnGpu, and what is naive for a scan on tensor cores.

#include "annulus/ops/delta_rule.h"
#include "gpu/gpu_harness.h"
#include "ops/ssd_harness.h"

namespace annulus::testing {

// NaN before.
template <typename Run>
TensorRef OutAccum(Run& run, const Shape& shape) {
  using Accum = typename std::remove_reference_t<Run>::Accum;
  return run.Of(shape, std::vector<Accum>(static_cast<size_t>(shape.elements()),
                                          std::numeric_limits<Accum>::quiet_NaN()));
}

inline std::string Describe(const SsdShape& s) {
  return absl::StrCat(s.rows, " rows, ", s.batch, " x ", s.heads, " heads of ", s.head_dim, " in ", s.groups,
                      " groups, state ", s.state, ", documents of ", s.document);
}

// Heads that forget within a few tokens and heads that remember thousands.
inline SsdValues<double> SlowAndFast(const SsdShape& s) {
  SsdValues<double> values = RandomSsd<double>(s);
  for (size_t i = 0; i < values.a.size(); ++i) {
    const int64_t head = static_cast<int64_t>(i) % s.heads;
    values.a[i] *= std::pow(0.1, static_cast<double>(head % 4));
  }
  values.a = Rounded<float>(values.a);
  values.dt = Rounded<float>(values.dt);
  values.skip = Rounded<float>(values.skip);
  values.initial = Rounded<float>(values.initial);
  return values;
}
inline SsdValues<double> Bf16Inputs(SsdValues<double> values) {
  for (auto* x : {&values.x, &values.b, &values.c}) *x = Rounded<BFloat16>(*x);
  return values;
}

// kDecaysAlone: neither dt nor skip, as in linear attention.
enum class Gates { kAll, kDecaysAlone };

// Its error is that of the exponent: a rounding of the exponent for each power of e.
template <typename Run>
Output Transition(Run& run, const TensorRef& transition) {
  Output output = run.Summed(transition);
  const double largest = MaxAbs(output.values);
  if (largest > 0) output.norm = largest * std::max(1.0, -std::log(largest));
  return output;
}

// Everything that the four calls of a scan give: 0 y, 1 dx, 2 db, 3 dc, 4 transition and 5 state of segments,
// 6 and 7 the same backward, 8 da, 9 ddt, 10 dskip.
template <typename Run>
Outputs RunScan(Run& run, const SsdValues<double>& v, Gates gates, const std::vector<double>& dy0,
                const std::vector<double>& final0) {
  const SsdShape& s = v.shape;
  const auto segments = static_cast<int64_t>(s.runs().size());
  const Shape values{s.rows, s.batch, s.heads * s.head_dim}, keys{s.rows, s.batch, s.groups * s.state},
      of_gates{s.rows, s.batch, s.heads}, ends{segments, s.all_heads(), s.state, s.head_dim};
  const auto x_heads = [&](const TensorRef& t) { return HeadsOf(t, 0, s.heads, s.head_dim); };
  const auto b_heads = [&](const TensorRef& t) { return HeadsOf(t, 0, s.groups, s.state); };
  const bool all = gates == Gates::kAll;
  const TensorRef x = run.In(values, v.x), b = run.In(keys, v.b), c = run.In(keys, v.c),
                  dy = run.In(values, dy0);
  const Ssd ssd{.x = x_heads(x),
                .b = b_heads(b),
                .c = b_heads(c),
                .dt = all ? run.InAccum(of_gates, v.dt) : TensorRef(),
                .a = run.InAccum(of_gates, v.a),
                .skip = all ? run.InAccum({s.heads}, v.skip) : TensorRef(),
                .ages = run.Of({s.rows, s.batch}, v.ages),
                .segments = s.runs(),
                .chunk = s.chunk};
  const Shape chunks{SsdChunks(ssd), s.all_heads(), s.state, s.head_dim};
  const SsdStates states{OutAccum(run, chunks), OutAccum(run, {SsdChunks(ssd), s.all_heads()})};
  const TensorRef gradients = OutAccum(run, chunks);
  const SegmentSummary forward{OutAccum(run, {segments, s.all_heads()}), OutAccum(run, ends)},
      backward{OutAccum(run, {segments, s.all_heads()}), OutAccum(run, ends)};
  const TensorRef y = run.Out(values), dx = run.Out(values), db = run.Out(keys), dc = run.Out(keys),
                  da = OutAccum(run, of_gates), ddt = all ? OutAccum(run, of_gates) : TensorRef(),
                  dskip = all ? run.InAccum({s.heads}, v.skip) : TensorRef();
  ANNULUS_CHECK_OK(SsdChunkStates(run.ctx, ssd, states, forward));
  ANNULUS_CHECK_OK(SsdForward(run.ctx, ssd, run.InAccum(ends, v.initial), states, x_heads(y)));
  ANNULUS_CHECK_OK(SsdBackwardChunkStates(run.ctx, ssd, x_heads(dy), states, gradients, backward));
  ANNULUS_CHECK_OK(SsdBackward(
      run.ctx, ssd, x_heads(dy), states, gradients, run.InAccum(ends, final0),
      {.dx = x_heads(dx), .db = b_heads(db), .dc = b_heads(dc), .ddt = ddt, .da = da, .dskip = dskip}));
  // Of f32 sums: a product of normal values over the state or the head, times what a document adds up.
  const double norm = 30;
  Outputs outputs = {run.Rounded(y, norm),
                     run.Rounded(dx, norm),
                     run.Rounded(db, norm),
                     run.Rounded(dc, norm),
                     Transition(run, forward.transition),
                     run.Summed(forward.state, norm),
                     Transition(run, backward.transition),
                     run.Summed(backward.state, norm),
                     run.Summed(da, norm * 10)};
  if (all) {
    outputs.push_back(run.Summed(ddt, norm * 10));
    outputs.push_back(run.Summed(dskip, norm * 10));
  }
  return outputs;
}

inline std::vector<double> ScanGradient(const SsdShape& s) {
  return Normal<BFloat16>(s.tokens() * s.heads * s.head_dim, "dy");
}
inline std::vector<double> FinalGradient(const SsdValues<double>& v) {
  return Normal<float>(static_cast<int64_t>(v.initial.size()), "final");
}

template <typename T>
auto ScanOps(const SsdValues<double>& given, Gates gates) {
  SsdValues<double> v = given;
  for (auto* x : {&v.x, &v.b, &v.c}) *x = Rounded<T>(*x);
  return [v, gates](auto& run) { return RunScan(run, v, gates, ScanGradient(v.shape), FinalGradient(v)); };
}

// A scan in chunks whose states lie in memory in bf16, in double otherwise: each chunk is a segment that
// begins and ends with rounded states. What is rounded at the end is rounded here.
class ChunkedScan {
 public:
  ChunkedScan(const SsdValues<double>& v, Gates gates) : v_(v), gates_(gates), of_chunks_(v) {
    of_chunks_.shape.segments.clear();
    for (const RowRange& run : v.shape.runs()) {
      for (int64_t row = run.begin; row < run.end; row += v.shape.chunk) {
        of_chunks_.shape.segments.push_back({row, std::min(row + v.shape.chunk, run.end)});
      }
    }
    heads_ = v.shape.all_heads();
    elements_ = v.shape.state_elements();
    final_.resize(of_chunks_.shape.segments.size() * static_cast<size_t>(heads_ * elements_));
    of_chunks_.initial.resize(final_.size());
  }

  Outputs Run() {
    const std::vector<double> dy = ScanGradient(v_.shape);
    OpRun<double> first(Device{});
    const Outputs alone = RunScan(first, of_chunks_, gates_, dy, final_);  // for what chunks leave of states
    const std::vector<double> states = ChunkStates(v_.b, v_.x, Reach::kEnd),
                              gradients = ChunkStates(v_.c, dy, Reach::kStart);
    Hand(alone[4].values, states, v_.initial, 1, &of_chunks_.initial);
    Hand(alone[6].values, gradients, FinalGradient(v_), -1, &final_);
    const std::vector<double> none(v_.initial.size());
    std::vector<double> unused(final_.size());
    const std::vector<double> ends = Hand(alone[4].values, states, none, 1, &unused),
                              starts = Hand(alone[6].values, gradients, none, -1, &unused);

    OpRun<double> second(Device{});
    Outputs outputs = RunScan(second, of_chunks_, gates_, dy, final_);
    OpRun<float> in_float(Device{});
    const Outputs whole = RunScan(in_float, v_, gates_, dy, FinalGradient(v_));
    outputs[4] = whole[4], outputs[5].values = ends;
    outputs[6] = whole[6], outputs[7].values = starts;
    for (Output& output : outputs) {
      if (output.in == Output::In::kCompute) output.values = Rounded<BFloat16>(output.values);
    }
    return outputs;
  }

 private:
  // kEnd: end states from b and x; kStart: gradients of start states from c and dy.
  enum class Reach { kEnd, kStart };

  // Of each chunk alone: sums over its rows of keys times values, the values decayed and rounded.
  std::vector<double> ChunkStates(const std::vector<double>& keys, const std::vector<double>& values,
                                  Reach reach) const {
    const SsdShape& s = v_.shape;
    std::vector<double> states(final_.size());
    for (size_t c = 0; c < of_chunks_.shape.segments.size(); ++c) {
      for (int64_t h = 0; h < heads_; ++h) {
        const int64_t item = h / s.heads, head = h % s.heads, group = head * s.groups / s.heads;
        double* state = states.data() + (static_cast<int64_t>(c) * heads_ + h) * elements_;
        for (const auto& [row, weight] : Weights(of_chunks_.shape.segments[c], item, head, reach)) {
          const int64_t token = row * s.batch + item;
          const double* key = keys.data() + (token * s.groups + group) * s.state;
          const double* value = values.data() + (token * s.heads + head) * s.head_dim;
          for (int64_t p = 0; p < s.head_dim; ++p) {
            const double rounded = ToDouble(FromDouble<BFloat16>(weight * value[p]));
            for (int64_t n = 0; n < s.state; ++n) state[n * s.head_dim + p] += key[n] * rounded;
          }
        }
      }
    }
    return states;
  }

  // Rows that reach the chunk's end, or are reached from its start, and what is left of them there.
  std::vector<std::pair<int64_t, double>> Weights(const RowRange& rows, int64_t item, int64_t head,
                                                  Reach reach) const {
    const SsdShape& s = v_.shape;
    std::vector<std::pair<int64_t, double>> weights;
    double sum = 0;  // of logarithms after the row, or up to it
    for (int64_t i = 0; i < rows.size(); ++i) {
      const int64_t row = reach == Reach::kEnd ? rows.end - 1 - i : rows.begin + i;
      const auto token = static_cast<size_t>(row * s.batch + item);
      const size_t gate = token * static_cast<size_t>(s.heads) + static_cast<size_t>(head);
      if (reach == Reach::kStart) {
        if (v_.ages[token] == 0) break;
        sum += v_.a[gate];
        weights.emplace_back(row, std::exp(sum));
      } else {
        weights.emplace_back(row, std::exp(sum) * (gates_ == Gates::kAll ? v_.dt[gate] : 1.0));
        if (v_.ages[token] == 0) break;
        sum += v_.a[gate];
      }
    }
    return weights;
  }

  // From chunk to chunk of each segment: the state before each, rounded, to `before`; returns the last ones.
  std::vector<double> Hand(const std::vector<double>& transition, const std::vector<double>& state,
                           const std::vector<double>& initial, int64_t step,
                           std::vector<double>* before) const {
    std::vector<double> last = initial;
    const std::vector<RowRange> segments = v_.shape.runs();
    const auto chunks = static_cast<int64_t>(of_chunks_.shape.segments.size());
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t chunk = step > 0 ? i : chunks - 1 - i;
      const RowRange rows = of_chunks_.shape.segments[static_cast<size_t>(chunk)];
      for (size_t s = 0; s < segments.size(); ++s) {
        if (rows.begin < segments[s].begin || rows.begin >= segments[s].end) continue;
        for (int64_t e = 0; e < heads_ * elements_; ++e) {
          double& now = last[s * static_cast<size_t>(heads_ * elements_) + static_cast<size_t>(e)];
          const auto at = static_cast<size_t>(chunk * heads_ * elements_ + e);
          now = ToDouble(FromDouble<BFloat16>(now));
          (*before)[at] = now;
          now = transition[static_cast<size_t>(chunk * heads_ + e / elements_)] * now + state[at];
        }
      }
    }
    return Rounded<BFloat16>(last);
  }

  const SsdValues<double>& v_;
  Gates gates_;
  SsdValues<double> of_chunks_;
  std::vector<double> final_;
  int64_t heads_ = 0, elements_ = 0;
};
inline Outputs ChunkedNaive(const SsdValues<double>& values, Gates gates) {
  return ChunkedScan(values, gates).Run();
}

struct DeltaShape {
  int64_t rows = 0, batch = 1, heads = 1, key_dim = 1, value_dim = 1, chunk = 4;
  std::vector<RowRange> segments;
  int64_t document = 0;
};

// Keys of length one.
template <typename T>
std::vector<double> UnitKeys(int64_t heads, int64_t dim, absl::string_view stream) {
  std::vector<double> keys = Normal<float>(heads * dim, stream);
  for (int64_t h = 0; h < heads; ++h) {
    double square = 0;
    for (int64_t i = 0; i < dim; ++i)
      square += keys[static_cast<size_t>(h * dim + i)] * keys[static_cast<size_t>(h * dim + i)];
    for (int64_t i = 0; i < dim; ++i) keys[static_cast<size_t>(h * dim + i)] /= std::sqrt(square);
  }
  return Rounded<T>(keys);
}

template <typename T>
auto DeltaOps(const DeltaShape& s) {
  const int64_t gates = s.rows * s.batch * s.heads, all_heads = s.batch * s.heads;
  const auto segments = static_cast<int64_t>(s.segments.size());
  const Shape ends{segments, all_heads, s.key_dim, s.value_dim};
  return [=, q0 = UnitKeys<T>(gates, s.key_dim, "q"), k0 = UnitKeys<T>(gates, s.key_dim, "k"),
          v0 = Normal<T>(gates * s.value_dim, "v"), do0 = Normal<T>(gates * s.value_dim, "do"),
          beta0 = Rounded<float>(UniformValues<double>(gates, "beta", 0, 1)),
          a0 = Rounded<float>(UniformValues<double>(gates, "a", -0.5, -0.001)),
          initial0 = Normal<float>(ends.elements(), "initial"),
          final0 = Normal<float>(ends.elements(), "final")](auto& run) -> Outputs {
    const Shape keys{s.rows, s.batch, s.heads * s.key_dim}, values{s.rows, s.batch, s.heads * s.value_dim},
        of_gates{s.rows, s.batch, s.heads}, transitions{segments, all_heads, s.key_dim * s.key_dim};
    const auto key_heads = [&](const TensorRef& t) { return HeadsOf(t, 0, s.heads, s.key_dim); };
    const auto value_heads = [&](const TensorRef& t) { return HeadsOf(t, 0, s.heads, s.value_dim); };
    const TensorRef q = run.In(keys, q0), k = run.In(keys, k0), v = run.In(values, v0),
                    upstream = run.In(values, do0);
    const DeltaRule rule{.q = key_heads(q),
                         .k = key_heads(k),
                         .v = value_heads(v),
                         .beta = run.InAccum(of_gates, beta0),
                         .a = run.InAccum(of_gates, a0),
                         .ages = run.Of({s.rows, s.batch}, DocumentAges(s.rows, s.batch, s.document)),
                         .segments = s.segments,
                         .chunk = s.chunk};
    const SegmentSummary forward{OutAccum(run, transitions), OutAccum(run, ends)},
        backward{OutAccum(run, transitions), OutAccum(run, ends)};
    const TensorRef states = OutAccum(run, {DeltaChunks(rule), all_heads, s.key_dim, s.value_dim}),
                    o = run.Out(values), dq = run.Out(keys), dk = run.Out(keys), dv = run.Out(values),
                    dbeta = OutAccum(run, of_gates), da = OutAccum(run, of_gates);
    ANNULUS_CHECK_OK(DeltaSummary(run.ctx, rule, forward));
    ANNULUS_CHECK_OK(DeltaForward(run.ctx, rule, run.InAccum(ends, initial0), states, value_heads(o)));
    ANNULUS_CHECK_OK(DeltaBackwardSummary(run.ctx, rule, value_heads(upstream), backward));
    ANNULUS_CHECK_OK(DeltaBackward(
        run.ctx, rule, value_heads(upstream), states, run.InAccum(ends, final0),
        {.dq = key_heads(dq), .dk = key_heads(dk), .dv = value_heads(dv), .dbeta = dbeta, .da = da}));
    // Sums over tokens that are remembered, and over keys or values.
    const double norm = 30;
    return {run.Summed(forward.transition, norm),
            run.Summed(forward.state, norm),
            run.Rounded(o, norm),
            run.Summed(states, norm),
            run.Summed(backward.transition, norm),
            run.Summed(backward.state, norm),
            run.Rounded(dq, norm),
            run.Rounded(dk, norm),
            run.Rounded(dv, norm),
            run.Summed(dbeta, 10 * norm),
            run.Summed(da, 10 * norm)};
  };
}

}  // namespace annulus::testing
