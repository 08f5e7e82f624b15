#include "annulus/ops/delta_rule.h"

#include <memory>

#include "ops/recurrent_harness.h"

namespace annulus::testing {
namespace {

struct DeltaShape {
  int64_t rows = 0, batch = 1, heads = 1, key_dim = 1, value_dim = 1, chunk = 4;
  std::vector<int64_t> cuts = {};  // as SegmentsOf takes them
  int64_t document = 0;

  std::vector<RowRange> segments() const { return SegmentsOf(rows, cuts); }
  int64_t all_heads() const { return batch * heads; }
  int64_t gates() const { return rows * batch * heads; }
  int64_t state_elements() const { return key_dim * value_dim; }
};

template <typename W>
struct DeltaValues {
  DeltaShape shape;
  std::vector<W> q, k, v, beta, a, initial;
  std::vector<int32_t> ages;

  template <typename To>
  DeltaValues<To> As() const {
    return {shape,          Cast<To>(q), Cast<To>(k),       Cast<To>(v),
            Cast<To>(beta), Cast<To>(a), Cast<To>(initial), ages};
  }
};

template <typename T>
DeltaValues<T> RandomDelta(const DeltaShape& s) {
  DeltaValues<T> v{
      s,
      NormalValues<T>(s.gates() * s.key_dim, "q"),
      NormalValues<T>(s.gates() * s.key_dim, "k"),
      NormalValues<T>(s.gates() * s.value_dim, "v"),
      UniformValues<T>(s.gates(), "beta", 0, 1),
      UniformValues<T>(s.gates(), "a", -1, -0.01),
      NormalValues<T>(static_cast<int64_t>(s.segments().size()) * s.all_heads() * s.state_elements(),
                      "initial"),
      DocumentAges(s.rows, s.batch, s.document)};
  for (size_t i = 0; i < v.k.size(); i += static_cast<size_t>(s.key_dim)) {
    T square = 0;
    for (int64_t j = 0; j < s.key_dim; ++j)
      square += v.k[i + static_cast<size_t>(j)] * v.k[i + static_cast<size_t>(j)];
    for (int64_t j = 0; j < s.key_dim; ++j) v.k[i + static_cast<size_t>(j)] /= std::sqrt(square);
  }
  return v;
}

// Without any state: o_t is a sum over earlier tokens s, from t backwards, of what the transitions in between
// leave of q_t:  w_t = q_t,  o_t += beta_s (w_s . k_s) v_s,  w_{s-1} = g_s (w_s - beta_s (w_s . k_s) k_s).
template <typename W>
std::vector<W> OutputsByPairs(const DeltaValues<W>& in) {
  const DeltaShape& s = in.shape;
  std::vector<W> o(in.v.size());
  const auto key = [&](int64_t gate, int64_t i) { return static_cast<size_t>(gate * s.key_dim + i); };
  const auto value = [&](int64_t gate, int64_t j) { return static_cast<size_t>(gate * s.value_dim + j); };
  const std::vector<RowRange> segments = s.segments();
  for (size_t segment = 0; segment < segments.size(); ++segment) {
    for (int64_t gate = segments[segment].begin * s.all_heads(); gate < segments[segment].end * s.all_heads();
         ++gate) {
      std::vector<W> w(in.q.begin() + gate * s.key_dim, in.q.begin() + (gate + 1) * s.key_dim);
      int64_t from = gate;
      for (; from >= segments[segment].begin * s.all_heads(); from -= s.all_heads()) {
        W along = 0;
        for (int64_t i = 0; i < s.key_dim; ++i) along += w[static_cast<size_t>(i)] * in.k[key(from, i)];
        along *= in.beta[static_cast<size_t>(from)];
        for (int64_t j = 0; j < s.value_dim; ++j) o[value(gate, j)] += along * in.v[value(from, j)];
        const bool starts = in.ages[static_cast<size_t>(from / s.heads)] == 0;
        const W g = starts ? W{0} : std::exp(in.a[static_cast<size_t>(from)]);
        for (int64_t i = 0; i < s.key_dim; ++i) {
          w[static_cast<size_t>(i)] = g * (w[static_cast<size_t>(i)] - along * in.k[key(from, i)]);
        }
      }
      const int64_t state = static_cast<int64_t>(segment) * s.all_heads() + gate % s.all_heads();
      for (int64_t i = 0; i < s.state_elements(); ++i) {
        o[value(gate, i % s.value_dim)] += w[static_cast<size_t>(i / s.value_dim)] *
                                           in.initial[static_cast<size_t>(state * s.state_elements() + i)];
      }
    }
  }
  return o;
}

template <typename T>
class DeltaRun {
 public:
  using Dims = typename StridedHeads<T>::Dims;

  DeltaRun(const DeltaValues<T>& values, BatchOrder order)
      : shape_(values.shape),
        q(KeyDims(), order, values.q),
        k(KeyDims(), order, values.k),
        dq(KeyDims(), order, Poison(values.q.size())),
        dk(KeyDims(), order, Poison(values.k.size())),
        v(ValueDims(), order, values.v),
        o(ValueDims(), order, Poison(values.v.size())),
        dv(ValueDims(), order, Poison(values.v.size())),
        beta(Gates(), values.beta),
        a(Gates(), values.a),
        dbeta(Gates()),
        da(Gates()),
        initial(States(Segments()), values.initial),
        state(States(Segments())),
        transition({Segments(), shape_.all_heads(), shape_.key_dim * shape_.key_dim}),
        ages({shape_.rows, shape_.batch}, values.ages),
        states(States(DeltaChunks(op()))) {}

  DeltaRule op() {
    return {.q = q.ref(),
            .k = k.ref(),
            .v = v.ref(),
            .beta = beta.ref(),
            .a = a.ref(),
            .ages = ages.ref(),
            .segments = shape_.segments(),
            .chunk = shape_.chunk};
  }
  SegmentSummary summary() { return {.transition = transition.ref(), .state = state.ref()}; }
  DeltaGradients outputs() {
    return {.dq = dq.ref(), .dk = dk.ref(), .dv = dv.ref(), .dbeta = dbeta.ref(), .da = da.ref()};
  }

  void Summarise(Context& ctx) { ANNULUS_CHECK_OK(DeltaSummary(ctx, op(), summary())); }
  void Forward(Context& ctx, ConstTensorRef from) {
    ANNULUS_CHECK_OK(DeltaForward(ctx, op(), from, states.ref(), o.ref()));
  }
  void SummariseBackward(Context& ctx, ConstHeadsRef do_) {
    ANNULUS_CHECK_OK(DeltaBackwardSummary(ctx, op(), do_, summary()));
  }
  void Backward(Context& ctx, ConstHeadsRef do_, ConstTensorRef final_gradient) {
    ANNULUS_CHECK_OK(DeltaBackward(ctx, op(), do_, states.ref(), final_gradient, outputs()));
  }
  // The states at the other end of segments.
  std::vector<T> Ends(Context& ctx, Transpose transpose, ConstTensorRef from) {
    Guarded<T> out(States(Segments()));
    ANNULUS_CHECK_OK(AdvanceState(ctx, transition.ref(), transpose, from, state.ref(), out.ref()));
    return out.values();
  }

  Dims ValueDims() const { return {shape_.rows, shape_.batch, shape_.heads, shape_.value_dim}; }

 private:
  Dims KeyDims() const { return {shape_.rows, shape_.batch, shape_.heads, shape_.key_dim}; }
  Shape Gates() const { return {shape_.rows, shape_.batch, shape_.heads}; }
  Shape States(int64_t count) const { return {count, shape_.all_heads(), shape_.key_dim, shape_.value_dim}; }
  int64_t Segments() const { return static_cast<int64_t>(shape_.segments().size()); }
  static std::vector<T> Poison(size_t n) { return std::vector<T>(n, std::numeric_limits<T>::quiet_NaN()); }

  DeltaShape shape_;

 public:
  StridedHeads<T> q, k, dq, dk, v, o, dv;
  Guarded<T> beta, a, dbeta, da, initial, state, transition;
  Guarded<int32_t> ages;
  Guarded<T> states;
};

template <typename T>
class DeltaRuleTest : public ::testing::Test {};
TYPED_TEST_SUITE(DeltaRuleTest, FloatTypes);

std::vector<DeltaShape> Shapes() {
  std::vector<DeltaShape> shapes;
  for (const int64_t rows : {0, 1, 3, 4, 5, 13}) {
    for (const int64_t document : {0, 3, 6}) {
      shapes.push_back(
          {.rows = rows, .batch = 2, .heads = 2, .key_dim = 3, .value_dim = 5, .document = document});
    }
  }
  shapes.push_back({.rows = 70, .heads = 2, .key_dim = 17, .value_dim = 16, .chunk = 64, .cuts = {33}});
  shapes.push_back({.rows = 150, .key_dim = 5, .value_dim = 3, .chunk = 140, .document = 100});
  shapes.push_back({.rows = 12, .heads = 1, .key_dim = 2, .value_dim = 3, .chunk = 1, .cuts = {0, 5}});
  return shapes;
}

TYPED_TEST(DeltaRuleTest, ForwardMatchesSumsOverPairs) {
  using T = TypeParam;
  Context ctx{Device{}};
  for (const DeltaShape& shape : Shapes()) {
    for (const BatchOrder order : {BatchOrder::kInsideRows, BatchOrder::kOutsideRows}) {
      SCOPED_TRACE(absl::StrCat(shape.rows, " rows, chunk ", shape.chunk, ", documents of ", shape.document));
      const DeltaValues<T> values = RandomDelta<T>(shape);
      DeltaRun<T> run(values, order);
      run.Forward(ctx, run.initial.ref());
      ExpectMatches<T>(run.o.values(), [&]<class W>() { return OutputsByPairs<W>(values.template As<W>()); });
    }
  }
}

// The state at the end by the summary is what one more token reads, with the identity's columns as queries.
TEST(DeltaSummary, LeadsToTheStateThatForwardReaches) {
  Context ctx{Device{}};
  for (const int64_t document : {0, 4}) {
    DeltaShape shape{.rows = 9, .batch = 2, .heads = 2, .key_dim = 3, .value_dim = 4, .document = document};
    const DeltaValues<double> values = RandomDelta<double>(shape);
    DeltaRun<double> run(values, BatchOrder::kInsideRows);
    run.Summarise(ctx);
    const std::vector<double> ends = run.Ends(ctx, Transpose::kNo, run.initial.ref());
    for (int64_t i = 0; i < shape.key_dim; ++i) {
      DeltaValues<double> reading = values;
      for (size_t j = 0; j < reading.q.size(); ++j)
        reading.q[j] = static_cast<int64_t>(j) % shape.key_dim == i;
      const std::vector<double> o = OutputsByPairs<double>(reading);
      const int64_t last = (shape.rows - 1) * shape.all_heads();
      for (int64_t h = 0; h < shape.all_heads(); ++h) {
        for (int64_t j = 0; j < shape.value_dim; ++j) {
          const double read = o[static_cast<size_t>((last + h) * shape.value_dim + j)];
          EXPECT_NEAR(ends[static_cast<size_t>((h * shape.key_dim + i) * shape.value_dim + j)], read, 1e-13);
        }
      }
    }
  }
}

TEST(DeltaGradient, AgreesWithFiniteDifferences) {
  Context ctx{Device{}};
  for (const int64_t document : {0, 5}) {
    const DeltaShape shape{.rows = 9,
                           .batch = 2,
                           .heads = 2,
                           .key_dim = 3,
                           .value_dim = 2,
                           .chunk = 3,
                           .cuts = {5},
                           .document = document};
    DeltaValues<double> v = RandomDelta<double>(shape);
    const auto dos = NormalValues<double>(static_cast<int64_t>(v.v.size()), "do");
    const auto finals = NormalValues<double>(static_cast<int64_t>(v.initial.size()), "final");
    const auto order = BatchOrder::kOutsideRows;
    DeltaRun<double> run(v, order);
    StridedHeads<double> do_(run.ValueDims(), order, dos);
    Guarded<double> final_gradient(run.initial.ref().shape(), finals);
    run.Forward(ctx, run.initial.ref());
    run.SummariseBackward(ctx, do_.ref());
    const std::vector<double> start = run.Ends(ctx, Transpose::kYes, final_gradient.ref());
    run.Backward(ctx, do_.ref(), final_gradient.ref());
    const auto objective = [&] {
      DeltaRun<double> at(v, order);
      at.Summarise(ctx);
      at.Forward(ctx, at.initial.ref());
      return Dot(at.o.values(), dos) + Dot(at.Ends(ctx, Transpose::kNo, at.initial.ref()), finals);
    };
    ExpectGradient(objective, v.q.data(), run.dq.values());
    ExpectGradient(objective, v.k.data(), run.dk.values());
    ExpectGradient(objective, v.v.data(), run.dv.values());
    ExpectGradient(objective, v.beta.data(), run.dbeta.values());
    ExpectGradient(objective, v.a.data(), run.da.values());
    ExpectGradient(objective, v.initial.data(), start);
  }
}

// Also with chunks that are more than one panel of rows.
TEST(DeltaGradient, DoesNotDependOnTheChunk) {
  Context ctx{Device{}};
  for (const int64_t document : {0, 90}) {
    DeltaShape shape{.rows = 150, .batch = 2, .heads = 2, .key_dim = 6, .value_dim = 5, .document = document};
    const auto dos = NormalValues<double>(shape.gates() * shape.value_dim, "do");
    const auto with_chunk = [&](int64_t chunk) {
      shape.chunk = chunk;
      auto run = std::make_unique<DeltaRun<double>>(RandomDelta<double>(shape), BatchOrder::kInsideRows);
      StridedHeads<double> do_(run->ValueDims(), BatchOrder::kInsideRows, dos);
      run->SummariseBackward(ctx, do_.ref());
      run->Forward(ctx, run->initial.ref());
      run->Backward(ctx, do_.ref(), run->initial.ref());
      return run;
    };
    const auto one = with_chunk(1), panels = with_chunk(140);
    ExpectClose(panels->o.values(), one->o.values());
    ExpectClose(panels->state.values(), one->state.values());
    ExpectClose(panels->dq.values(), one->dq.values());
    ExpectClose(panels->dk.values(), one->dk.values());
    ExpectClose(panels->dv.values(), one->dv.values());
    ExpectClose(panels->dbeta.values(), one->dbeta.values());
    ExpectClose(panels->da.values(), one->da.values());
  }
}

// The rule is stable for keys of norm one: roundings of a step do not grow over the others.
TEST(DeltaGradient, InF32AgreesWithF64) {
  Context ctx{Device{}};
  const DeltaShape shape{
      .rows = 70, .batch = 2, .heads = 2, .key_dim = 16, .value_dim = 17, .chunk = 32, .document = 50};
  const DeltaValues<float> narrow = RandomDelta<float>(shape);
  DeltaRun<float> got(narrow, BatchOrder::kInsideRows);
  DeltaRun<double> exact(narrow.As<double>(), BatchOrder::kInsideRows);
  const auto dos = NormalValues<float>(static_cast<int64_t>(narrow.v.size()), "do");
  const auto run = [&](auto& of, auto& do_) {
    of.Forward(ctx, of.initial.ref());
    of.Backward(ctx, do_.ref(), {});
  };
  StridedHeads<float> do_(got.ValueDims(), BatchOrder::kInsideRows, dos);
  StridedHeads<double> exact_do(exact.ValueDims(), BatchOrder::kInsideRows, Cast<double>(dos));
  run(got, do_);
  run(exact, exact_do);
  const auto expect_close = [&](const std::vector<float>& a, const std::vector<double>& b) {
    EXPECT_LE(MaxDifference(a, b), shape.key_dim * std::numeric_limits<float>::epsilon() * MaxAbs(b));
  };
  expect_close(got.o.values(), exact.o.values());
  expect_close(got.dq.values(), exact.dq.values());
  expect_close(got.dk.values(), exact.dk.values());
  expect_close(got.dv.values(), exact.dv.values());
  expect_close(got.dbeta.values(), exact.dbeta.values());
  expect_close(got.da.values(), exact.da.values());
}

DeltaValues<double> OfRank(const DeltaValues<double>& whole, const std::vector<RowRange>& rows) {
  DeltaValues<double> part = whole;
  const DeltaShape& s = whole.shape;
  part.q = TakeRows(whole.q, s.all_heads() * s.key_dim, rows);
  part.k = TakeRows(whole.k, s.all_heads() * s.key_dim, rows);
  part.v = TakeRows(whole.v, s.all_heads() * s.value_dim, rows);
  part.beta = TakeRows(whole.beta, s.all_heads(), rows);
  part.a = TakeRows(whole.a, s.all_heads(), rows);
  part.ages = TakeRows(whole.ages, s.batch, rows);
  part.shape.cuts = {rows[0].size()};
  part.shape.rows = rows[0].size() + rows[1].size();
  part.initial.assign(static_cast<size_t>(2 * s.all_heads() * s.state_elements()), 0.0);
  return part;
}

// Two ranks that summarise their segments by themselves, with start states and final gradients handed along
// in the order of positions, compute what one rank does with the whole sequence.
TEST(DeltaZigzag, EqualsOneLongSequence) {
  Context ctx{Device{}};
  const Zigzag zigzag(7);
  for (const int64_t document : {0, 10}) {
    const DeltaShape shape{
        .rows = zigzag.rows(), .batch = 2, .heads = 2, .key_dim = 3, .value_dim = 4, .document = document};
    const DeltaValues<double> values = RandomDelta<double>(shape);
    const auto dos = NormalValues<double>(static_cast<int64_t>(values.v.size()), "do");
    const auto order = BatchOrder::kInsideRows;
    DeltaRun<double> whole(values, order);
    StridedHeads<double> do_(whole.ValueDims(), order, dos);
    whole.Forward(ctx, {});
    whole.Backward(ctx, do_.ref(), {});

    const int64_t width = shape.all_heads() * shape.value_dim;
    DeltaRun<double> first(OfRank(values, zigzag.RowsOf(0)), order),
        second(OfRank(values, zigzag.RowsOf(1)), order);
    StridedHeads<double> first_do(first.ValueDims(), order, TakeRows(dos, width, zigzag.RowsOf(0)));
    StridedHeads<double> second_do(second.ValueDims(), order, TakeRows(dos, width, zigzag.RowsOf(1)));
    first.Summarise(ctx);
    second.Summarise(ctx);
    HandAlong<double>(ctx, zigzag.Order(), Transpose::kNo, {first.summary(), second.summary()},
                      {first.initial.ref(), second.initial.ref()});
    first.Forward(ctx, first.initial.ref());
    second.Forward(ctx, second.initial.ref());
    first.SummariseBackward(ctx, first_do.ref());
    second.SummariseBackward(ctx, second_do.ref());
    HandAlong<double>(ctx, zigzag.Reversed(), Transpose::kYes, {first.summary(), second.summary()},
                      {first.initial.ref(), second.initial.ref()});
    first.Backward(ctx, first_do.ref(), first.initial.ref());
    second.Backward(ctx, second_do.ref(), second.initial.ref());

    size_t rank = 0;
    for (DeltaRun<double>* run : {&first, &second}) {
      const std::vector<RowRange> rows = zigzag.RowsOf(rank++);
      const int64_t keys = shape.all_heads() * shape.key_dim, gates = shape.all_heads();
      ExpectClose(run->o.values(), TakeRows(whole.o.values(), width, rows));
      ExpectClose(run->dq.values(), TakeRows(whole.dq.values(), keys, rows));
      ExpectClose(run->dk.values(), TakeRows(whole.dk.values(), keys, rows));
      ExpectClose(run->dv.values(), TakeRows(whole.dv.values(), width, rows));
      ExpectClose(run->dbeta.values(), TakeRows(whole.dbeta.values(), gates, rows));
      ExpectClose(run->da.values(), TakeRows(whole.da.values(), gates, rows));
    }
  }
}

TEST(DeltaArguments, AreRefusedByName) {
  Context ctx{Device{}};
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  const DeltaShape shape{.rows = 6, .heads = 2, .key_dim = 3, .value_dim = 2};
  DeltaRun<float> run(RandomDelta<float>(shape), BatchOrder::kInsideRows);
  const auto refuses = [&](const DeltaRule& rule, absl::string_view text) {
    ExpectRefused(DeltaForward(ctx, rule, {}, run.states.ref(), run.o.ref()), kInvalid, text);
  };
  DeltaRule rule = run.op();
  rule.q = run.v.ref();
  refuses(rule, "delta_rule.q=f32[6, 1, 2, 2]: expected f32[6, 1, 2, 3]");
  rule = run.op();
  rule.beta = run.initial.ref();
  refuses(rule, "delta_rule.beta=f32[1, 2, 3, 2] on cpu: expected f32[6, 1, 2] on cpu");
  rule = run.op();
  rule.chunk = 0;
  refuses(rule, "delta_rule.chunk=0");
  rule.chunk = 2;
  refuses(rule, "delta_rule.states=f32[2, 2, 3, 2] on cpu: expected f32[3, 2, 3, 2] on cpu");
  rule = run.op();
  rule.segments.clear();
  refuses(rule, "delta_rule.segments end at row 0: expected 6");
  ExpectRefused(DeltaSummary(ctx, run.op(), {.transition = run.a.ref(), .state = run.state.ref()}), kInvalid,
                "delta_rule.summary.transition=f32[6, 1, 2] on cpu: expected f32[1, 2, 9] on cpu");
}

template <typename T>
class L2NormTest : public ::testing::Test {};
TYPED_TEST_SUITE(L2NormTest, FloatTypes);

TYPED_TEST(L2NormTest, ForwardMatchesLoops) {
  using T = TypeParam;
  using Dims = typename StridedHeads<T>::Dims;
  Context ctx{Device{}};
  for (const Dims dims : {Dims{0, 1, 1, 4}, Dims{3, 2, 2, 1}, Dims{5, 2, 3, 17}}) {
    StridedHeads<T> x(dims, BatchOrder::kOutsideRows, NormalValues<T>(dims.elements(), "x"));
    StridedHeads<T> y(dims, BatchOrder::kInsideRows,
                      std::vector<T>(static_cast<size_t>(dims.elements()), T(NAN)));
    ANNULUS_CHECK_OK(L2NormForward(ctx, x.ref(), 1e-6, y.ref()));
    ExpectMatches<T>(y.values(), [&]<class W>() {
      std::vector<W> expected = Cast<W>(x.values());
      for (size_t head = 0; head < expected.size(); head += static_cast<size_t>(dims.dim)) {
        W square = 0;
        for (int64_t i = 0; i < dims.dim; ++i) {
          const W value = expected[head + static_cast<size_t>(i)];
          square += value * value;
        }
        for (int64_t i = 0; i < dims.dim; ++i) {
          expected[head + static_cast<size_t>(i)] /= std::sqrt(square + static_cast<W>(1e-6));
        }
      }
      return expected;
    });
  }
}

TEST(L2NormGradient, AgreesWithFiniteDifferences) {
  Context ctx{Device{}};
  const StridedHeads<double>::Dims dims{3, 2, 2, 4};
  const auto order = BatchOrder::kInsideRows;
  auto values = NormalValues<double>(dims.elements(), "x");
  const auto dys = NormalValues<double>(dims.elements(), "dy");
  StridedHeads<double> x(dims, order, values), dy(dims, order, dys), y(dims, order, dys),
      dx(dims, order, dys);
  ANNULUS_CHECK_OK(L2NormBackward(ctx, x.ref(), 0.1, dy.ref(), dx.ref()));
  const auto objective = [&] {
    x.Set(values);
    ANNULUS_CHECK_OK(L2NormForward(ctx, x.ref(), 0.1, y.ref()));
    return Dot(y.values(), dys);
  };
  ExpectGradient(objective, values.data(), dx.values());
}

}  // namespace
}  // namespace annulus::testing
