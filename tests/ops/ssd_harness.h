#pragma once

// The scan of annulus/ops/ssd.h in a test: inputs, a run of its calls, and the recurrence that it must equal,
// token after token, forward and by its adjoint.

#include "annulus/ops/ssd.h"
#include "ops/recurrent_harness.h"

namespace annulus::testing {

struct SsdShape {
  int64_t rows = 0, batch = 1, heads = 1, groups = 1, head_dim = 1, state = 1, chunk = 4;
  std::vector<RowRange> segments = {};  // empty: one
  int64_t document = 0;                 // as in DocumentAges

  int64_t tokens() const { return rows * batch; }
  int64_t state_elements() const { return state * head_dim; }
  int64_t all_heads() const { return batch * heads; }
  std::vector<RowRange> runs() const {
    return segments.empty() ? std::vector<RowRange>{{0, rows}} : segments;
  }
};

// Dense values; dt and skip empty: none.
template <typename W>
struct SsdValues {
  SsdShape shape;
  std::vector<W> x, b, c, dt, a, skip, initial;  // initial: [segments, batch * heads, state, head_dim]
  std::vector<int32_t> ages;

  template <typename To>
  SsdValues<To> As() const {
    return {shape,       Cast<To>(x),    Cast<To>(b),       Cast<To>(c), Cast<To>(dt),
            Cast<To>(a), Cast<To>(skip), Cast<To>(initial), ages};
  }
  // Bounds sums of products by the sum of their absolute values.
  SsdValues Bound() const {
    return {shape, Absolute(x),    Absolute(b),       Absolute(c), Absolute(dt),
            a,     Absolute(skip), Absolute(initial), ages};
  }
};

// Steps as Mamba-2 has them: dt in [0.02, 0.3), decays down to e^-3.
template <typename T>
SsdValues<T> RandomSsd(const SsdShape& s) {
  const int64_t segments = static_cast<int64_t>(s.runs().size());
  return {s,
          NormalValues<T>(s.tokens() * s.heads * s.head_dim, "x"),
          NormalValues<T>(s.tokens() * s.groups * s.state, "b"),
          NormalValues<T>(s.tokens() * s.groups * s.state, "c"),
          UniformValues<T>(s.tokens() * s.heads, "dt", 0.02, 0.3),
          UniformValues<T>(s.tokens() * s.heads, "a", -3, -0.001),
          NormalValues<T>(s.heads, "skip"),
          NormalValues<T>(segments * s.all_heads() * s.state_elements(), "initial"),
          DocumentAges(s.rows, s.batch, s.document)};
}

template <typename W>
struct SsdResult {
  std::vector<W> y, end;                             // end: state of each segment
  std::vector<W> dx, db, dc, ddt, da, dskip, start;  // start: gradient of the initial states
};

// One head of one item of one segment of the recurrence.
template <typename W>
class SsdRecurrence {
 public:
  SsdRecurrence(const SsdValues<W>& in, SsdResult<W>& out) : in_(in), out_(out), s_(in.shape) {}

  void Run(int64_t segment, int64_t item, int64_t head, const std::vector<W>& dy,
           const std::vector<W>& final_gradient) {
    const RowRange rows = s_.runs()[static_cast<size_t>(segment)];
    const int64_t offset = (segment * s_.all_heads() + item * s_.heads + head) * s_.state_elements();
    std::vector<std::vector<W>> states{Slice(in_.initial, offset)};  // before each row
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      states.push_back(states.back());
      Forward({row, item, head}, &states.back());
    }
    Put(states.back(), offset, &out_.end);
    if (final_gradient.empty()) return;
    std::vector<W> g = Slice(final_gradient, offset);
    for (int64_t row = rows.end - 1; row >= rows.begin; --row) {
      const auto i = static_cast<size_t>(row - rows.begin);
      Backward({row, item, head}, dy, states[i], states[i + 1], &g);
    }
    Put(g, offset, &out_.start);
  }

 private:
  struct Place {
    int64_t row, item, head;
  };
  std::vector<W> Slice(const std::vector<W>& all, int64_t offset) const {
    return {all.begin() + offset, all.begin() + offset + s_.state_elements()};
  }
  void Put(const std::vector<W>& values, int64_t offset, std::vector<W>* all) const {
    std::copy(values.begin(), values.end(), all->begin() + offset);
  }
  int64_t Token(const Place& at) const { return at.row * s_.batch + at.item; }
  size_t Gate(const Place& at) const { return static_cast<size_t>(Token(at) * s_.heads + at.head); }
  size_t X(const Place& at, int64_t p) const {
    return static_cast<size_t>((Token(at) * s_.heads + at.head) * s_.head_dim + p);
  }
  size_t B(const Place& at, int64_t n) const {
    return static_cast<size_t>((Token(at) * s_.groups + at.head * s_.groups / s_.heads) * s_.state + n);
  }
  size_t H(int64_t n, int64_t p) const { return static_cast<size_t>(n * s_.head_dim + p); }
  W Decay(const Place& at) const {
    return in_.ages[static_cast<size_t>(Token(at))] == 0 ? W{0} : std::exp(in_.a[Gate(at)]);
  }
  W Dt(const Place& at) const { return in_.dt.empty() ? W{1} : in_.dt[Gate(at)]; }
  W Skip(const Place& at) const { return in_.skip.empty() ? W{0} : in_.skip[static_cast<size_t>(at.head)]; }

  void Forward(const Place& at, std::vector<W>* h) {
    for (int64_t p = 0; p < s_.head_dim; ++p) {
      W y = 0;
      for (int64_t n = 0; n < s_.state; ++n) {
        W& element = (*h)[H(n, p)];
        element = Decay(at) * element + Dt(at) * in_.x[X(at, p)] * in_.b[B(at, n)];
        y += element * in_.c[B(at, n)];
      }
      out_.y[X(at, p)] = y + Skip(at) * in_.x[X(at, p)];
    }
  }

  void Backward(const Place& at, const std::vector<W>& dy, const std::vector<W>& before,
                const std::vector<W>& after, std::vector<W>* g) {
    W ddt = 0, da = 0;
    for (int64_t p = 0; p < s_.head_dim; ++p) {
      const W x = in_.x[X(at, p)], up = dy[X(at, p)];
      W dx = 0;
      for (int64_t n = 0; n < s_.state; ++n) {
        W& element = (*g)[H(n, p)];
        element += in_.c[B(at, n)] * up;
        out_.dc[B(at, n)] += after[H(n, p)] * up;
        out_.db[B(at, n)] += Dt(at) * element * x;
        dx += element * in_.b[B(at, n)];
        da += Decay(at) * element * before[H(n, p)];
        element *= Decay(at);
      }
      ddt += dx * x;
      out_.dx[X(at, p)] = Dt(at) * dx + Skip(at) * up;
      if (!in_.skip.empty()) out_.dskip[static_cast<size_t>(at.head)] += up * x;
    }
    out_.da[Gate(at)] = da;
    if (!in_.dt.empty()) out_.ddt[Gate(at)] = ddt;
  }

  const SsdValues<W>& in_;
  SsdResult<W>& out_;
  const SsdShape& s_;
};

// final_gradient empty: no gradients. dskip starts from zero.
template <typename W>
SsdResult<W> SsdByRecurrence(const SsdValues<W>& in, const std::vector<W>& dy,
                             const std::vector<W>& final_gradient) {
  SsdResult<W> out{.y = std::vector<W>(in.x.size()),
                   .end = std::vector<W>(in.initial.size()),
                   .dx = std::vector<W>(in.x.size()),
                   .db = std::vector<W>(in.b.size()),
                   .dc = std::vector<W>(in.c.size()),
                   .ddt = std::vector<W>(in.dt.size()),
                   .da = std::vector<W>(in.a.size()),
                   .dskip = std::vector<W>(in.skip.size()),
                   .start = std::vector<W>(in.initial.size())};
  SsdRecurrence<W> recurrence(in, out);
  for (size_t segment = 0; segment < in.shape.runs().size(); ++segment) {
    for (int64_t item = 0; item < in.shape.batch; ++item) {
      for (int64_t head = 0; head < in.shape.heads; ++head) {
        recurrence.Run(static_cast<int64_t>(segment), item, head, dy, final_gradient);
      }
    }
  }
  return out;
}

// Strided inputs and guarded outputs of the calls of a layer.
template <typename T>
class SsdRun {
 public:
  using Dims = typename StridedHeads<T>::Dims;

  SsdRun(const SsdValues<T>& v, BatchOrder order)
      : has_dt_(!v.dt.empty()),
        has_skip_(!v.skip.empty()),
        shape_(v.shape),
        x(XDims(), order, v.x),
        b(BDims(), order, v.b),
        c(BDims(), order, v.c),
        dt(Gates(), has_dt_ ? v.dt : std::vector<T>(v.a.size())),
        a(Gates(), v.a),
        skip({v.shape.heads}, has_skip_ ? v.skip : std::vector<T>(static_cast<size_t>(v.shape.heads))),
        ages({v.shape.rows, v.shape.batch}, v.ages),
        initial(States(Segments()), v.initial),
        y(XDims(), order, Poison(v.x.size())),
        dx(XDims(), order, Poison(v.x.size())),
        db(BDims(), order, Poison(v.b.size())),
        dc(BDims(), order, Poison(v.c.size())),
        ddt(Gates()),
        da(Gates()),
        dskip({v.shape.heads}, T{0}),
        states(States(SsdChunks(op()))),
        gradients(States(SsdChunks(op()))),
        decays({SsdChunks(op()), v.shape.all_heads()}),
        transition({Segments(), v.shape.all_heads()}),
        state(States(Segments())) {}

  Ssd op() {
    return {.x = x.ref(),
            .b = b.ref(),
            .c = c.ref(),
            .dt = has_dt_ ? dt.ref() : TensorRef{},
            .a = a.ref(),
            .skip = has_skip_ ? skip.ref() : TensorRef{},
            .ages = ages.ref(),
            .segments = shape_.runs(),
            .chunk = shape_.chunk};
  }
  SsdStates chunk_states() { return {.states = states.ref(), .decays = decays.ref()}; }
  SegmentSummary summary() { return {.transition = transition.ref(), .state = state.ref()}; }
  SsdGradients outputs() {
    return {.dx = dx.ref(),
            .db = db.ref(),
            .dc = dc.ref(),
            .ddt = has_dt_ ? ddt.ref() : TensorRef{},
            .da = da.ref(),
            .dskip = has_skip_ ? dskip.ref() : TensorRef{}};
  }

  void Summarise(Context& ctx) { ANNULUS_CHECK_OK(SsdChunkStates(ctx, op(), chunk_states(), summary())); }
  // From the states at the start of segments; undefined: zero.
  void Forward(Context& ctx, ConstTensorRef from) {
    ANNULUS_CHECK_OK(SsdForward(ctx, op(), from, chunk_states(), y.ref()));
  }
  void SummariseBackward(Context& ctx, ConstHeadsRef dy) {
    ANNULUS_CHECK_OK(SsdBackwardChunkStates(ctx, op(), dy, chunk_states(), gradients.ref(), summary()));
  }
  void Backward(Context& ctx, ConstHeadsRef dy, ConstTensorRef final_gradient) {
    ANNULUS_CHECK_OK(SsdBackward(ctx, op(), dy, chunk_states(), gradients.ref(), final_gradient, outputs()));
  }

  // The end state of segments from `from`.
  std::vector<T> Ends(Context& ctx, ConstTensorRef from) {
    Guarded<T> out(States(Segments()));
    ANNULUS_CHECK_OK(AdvanceState(ctx, transition.ref(), Transpose::kNo, from, state.ref(), out.ref()));
    return out.values();
  }

  Dims XDims() const { return {shape_.rows, shape_.batch, shape_.heads, shape_.head_dim}; }
  Shape States(int64_t count) const { return {count, shape_.all_heads(), shape_.state, shape_.head_dim}; }

 private:
  Dims BDims() const { return {shape_.rows, shape_.batch, shape_.groups, shape_.state}; }
  Shape Gates() const { return {shape_.rows, shape_.batch, shape_.heads}; }
  int64_t Segments() const { return static_cast<int64_t>(shape_.runs().size()); }
  static std::vector<T> Poison(size_t n) { return std::vector<T>(n, std::numeric_limits<T>::quiet_NaN()); }

  bool has_dt_, has_skip_;
  SsdShape shape_;

 public:
  StridedHeads<T> x, b, c;
  Guarded<T> dt, a, skip;
  Guarded<int32_t> ages;
  Guarded<T> initial;
  StridedHeads<T> y, dx, db, dc;
  Guarded<T> ddt, da, dskip, states, gradients, decays, transition, state;
};

}  // namespace annulus::testing
