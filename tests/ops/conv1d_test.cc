#include "annulus/ops/conv1d.h"

#include "ops/recurrent_harness.h"

namespace annulus::testing {
namespace {

struct ConvShape {
  int64_t rows = 0, batch = 1, channels = 1, k = 4, document = 0;
  std::vector<int64_t> cuts = {};  // as SegmentsOf takes them

  std::vector<RowRange> segments() const { return SegmentsOf(rows, cuts); }
  int64_t elements() const { return rows * batch * channels; }
  int64_t halo_elements() const { return static_cast<int64_t>(cuts.size() + 1) * (k - 1) * batch * channels; }
};

template <typename W>
struct ConvValues {
  ConvShape shape;
  std::vector<W> x, halo, w, bias;  // bias empty: none
  std::vector<int32_t> ages;

  template <typename To>
  ConvValues<To> As() const {
    return {shape, Cast<To>(x), Cast<To>(halo), Cast<To>(w), Cast<To>(bias), ages};
  }
};

template <typename T>
ConvValues<T> RandomConv(const ConvShape& s) {
  return {s,
          NormalValues<T>(s.elements(), "x"),
          NormalValues<T>(s.halo_elements(), "halo"),
          NormalValues<T>(s.channels * s.k, "w"),
          NormalValues<T>(s.channels, "bias"),
          DocumentAges(s.rows, s.batch, s.document)};
}

template <typename W>
struct ConvResult {
  std::vector<W> y, dx, dhalo, dw, dbias;
};

// Every output gathers its own terms and, given dy, gives each input its part.
template <typename W>
ConvResult<W> ByLoops(const ConvValues<W>& in, const std::vector<W>& dy) {
  const ConvShape& s = in.shape;
  ConvResult<W> out{std::vector<W>(in.x.size()), std::vector<W>(in.x.size()), std::vector<W>(in.halo.size()),
                    std::vector<W>(in.w.size()), std::vector<W>(in.bias.size())};
  const std::vector<RowRange> segments = s.segments();
  for (size_t segment = 0; segment < segments.size(); ++segment) {
    for (int64_t row = segments[segment].begin; row < segments[segment].end; ++row) {
      for (int64_t i = 0; i < s.batch * s.channels; ++i) {
        const int64_t item = i / s.channels, c = i % s.channels;
        // Index in x of what tap j reads, or in the halo.
        const auto index = [&](int64_t j) {
          const int64_t before = segments[segment].begin - (row - j);
          const int64_t from =
              before <= 0 ? row - j : static_cast<int64_t>(segment) * (s.k - 1) + s.k - 1 - before;
          return static_cast<size_t>((from * s.batch + item) * s.channels + c);
        };
        const auto in_halo = [&](int64_t j) { return row - j < segments[segment].begin; };
        const int64_t age = in.ages[static_cast<size_t>(row * s.batch + item)];
        const auto at = static_cast<size_t>(row * s.batch * s.channels + i);
        W u = in.bias.empty() ? W{0} : in.bias[static_cast<size_t>(c)];
        for (int64_t j = 0; j < s.k && j <= age; ++j) {
          u += in.w[static_cast<size_t>(c * s.k + s.k - 1 - j)] * (in_halo(j) ? in.halo : in.x)[index(j)];
        }
        const W e = std::exp(-u);
        out.y[at] = u / (1 + e);
        if (dy.empty()) continue;
        const W du = dy[at] * (1 + e + u * e) / ((1 + e) * (1 + e));
        if (!in.bias.empty()) out.dbias[static_cast<size_t>(c)] += du;
        for (int64_t j = 0; j < s.k && j <= age; ++j) {
          const auto tap = static_cast<size_t>(c * s.k + s.k - 1 - j);
          out.dw[tap] += du * (in_halo(j) ? in.halo : in.x)[index(j)];
          (in_halo(j) ? out.dhalo : out.dx)[index(j)] += du * in.w[tap];
        }
      }
    }
  }
  return out;
}

template <typename T>
class ConvRun {
 public:
  explicit ConvRun(const ConvValues<T>& v, BatchOrder order = BatchOrder::kInsideRows)
      : shape_(v.shape),
        x(Dims(), order, v.x),
        y(Dims(), order, Poison()),
        dx(Dims(), order, Poison()),
        w({v.shape.channels, v.shape.k}, v.w),
        bias({static_cast<int64_t>(v.bias.size())}, v.bias),
        halo(HaloShape(), v.halo),
        dhalo(HaloShape()),
        dw({v.shape.channels, v.shape.k}, T{0}),
        dbias({static_cast<int64_t>(v.bias.size())}, T{0}),
        ages({v.shape.rows, v.shape.batch}, v.ages),
        has_bias_(!v.bias.empty()) {}

  Conv1d op() {
    return {.w = w.ref(),
            .bias = has_bias_ ? bias.ref() : TensorRef{},
            .ages = ages.ref(),
            .segments = shape_.segments(),
            .halo = halo.ref()};
  }
  Conv1dGradients gradients() {
    return {
        .dx = dx.ref(), .dhalo = dhalo.ref(), .dw = dw.ref(), .dbias = has_bias_ ? dbias.ref() : TensorRef{}};
  }
  void Forward(Context& ctx) { ANNULUS_CHECK_OK(Conv1dForward(ctx, op(), x.ref(), y.ref())); }
  void Backward(Context& ctx, ConstHeadsRef dy) {
    ANNULUS_CHECK_OK(Conv1dBackward(ctx, op(), x.ref(), dy, gradients()));
  }
  typename StridedHeads<T>::Dims Dims() const { return {shape_.rows, shape_.batch, 1, shape_.channels}; }

 private:
  Shape HaloShape() const {
    return {static_cast<int64_t>(shape_.cuts.size()) + 1, shape_.k - 1, shape_.batch, shape_.channels};
  }
  std::vector<T> Poison() const {
    return std::vector<T>(static_cast<size_t>(shape_.elements()), std::numeric_limits<T>::quiet_NaN());
  }

  ConvShape shape_;

 public:
  StridedHeads<T> x, y, dx;
  Guarded<T> w, bias, halo, dhalo, dw, dbias;
  Guarded<int32_t> ages;

 private:
  bool has_bias_;
};

std::vector<ConvShape> Shapes() {
  std::vector<ConvShape> shapes;
  for (const int64_t rows : {0, 1, 3, 4, 5, 70}) {
    for (const int64_t document : {0, 2, 6}) {
      shapes.push_back({.rows = rows, .batch = 2, .channels = 17, .document = document});
    }
  }
  for (const int64_t k : {1, 2, 8}) {
    shapes.push_back({.rows = 20, .batch = 2, .channels = 5, .k = k, .document = 9, .cuts = {11}});
  }
  shapes.push_back({.rows = 6, .batch = 1, .channels = 3, .k = 4, .cuts = {1, 0, 2}});
  return shapes;
}

template <typename T>
class Conv1dTest : public ::testing::Test {};
TYPED_TEST_SUITE(Conv1dTest, FloatTypes);

TYPED_TEST(Conv1dTest, ForwardAndBackwardMatchLoops) {
  using T = TypeParam;
  Context ctx{Device{}};
  for (const ConvShape& shape : Shapes()) {
    for (const BatchOrder order : {BatchOrder::kInsideRows, BatchOrder::kOutsideRows}) {
      SCOPED_TRACE(absl::StrCat(shape.rows, " rows, k ", shape.k, ", documents of ", shape.document));
      ConvValues<T> values = RandomConv<T>(shape);
      if (order == BatchOrder::kOutsideRows) values.bias.clear();
      const auto dys = NormalValues<T>(shape.elements(), "dy");
      ConvRun<T> run(values, order);
      StridedHeads<T> dy(run.Dims(), order, dys);
      run.Forward(ctx);
      run.Backward(ctx, dy.ref());
      const auto naive = ByLoops<T>(values, dys);
      const auto wide = ByLoops<Wide<T>>(values.template As<Wide<T>>(), Cast<Wide<T>>(dys));
      ExpectMatches<T>(run.y.values(), naive.y, wide.y);
      ExpectMatches<T>(run.dx.values(), naive.dx, wide.dx);
      ExpectMatches<T>(run.dhalo.values(), naive.dhalo, wide.dhalo);
      ExpectMatches<T>(run.dw.values(), naive.dw, wide.dw);
      if (!values.bias.empty()) ExpectMatches<T>(run.dbias.values(), naive.dbias, wide.dbias);
    }
  }
}

TYPED_TEST(Conv1dTest, WeightGradientsAreAddedToWhatIsThere) {
  using T = TypeParam;
  Context ctx{Device{}};
  const ConvShape shape{.rows = 9, .channels = 3};
  ConvRun<T> run(RandomConv<T>(shape));
  StridedHeads<T> dy(run.Dims(), BatchOrder::kInsideRows, NormalValues<T>(shape.elements(), "dy"));
  run.Backward(ctx, dy.ref());
  const auto dw = run.dw.values(), dbias = run.dbias.values();
  run.dw.Set(std::vector<T>(dw.size(), T{2}));
  run.dbias.Set(std::vector<T>(dbias.size(), T{2}));
  run.Backward(ctx, dy.ref());
  const auto expect_added = [](const std::vector<T>& got, const std::vector<T>& added) {
    for (size_t i = 0; i < got.size(); ++i) {  // one rounding
      EXPECT_NEAR(got[i], 2 + added[i], std::numeric_limits<T>::epsilon() * (2 + std::abs(added[i])));
    }
  };
  expect_added(run.dw.values(), dw);
  expect_added(run.dbias.values(), dbias);
}

TEST(Conv1dGradient, AgreesWithFiniteDifferences) {
  Context ctx{Device{}};
  const ConvShape shape{.rows = 9, .batch = 2, .channels = 3, .document = 5, .cuts = {4}};
  ConvRun<double> run(RandomConv<double>(shape));
  const auto dys = NormalValues<double>(shape.elements(), "dy");
  StridedHeads<double> dy(run.Dims(), BatchOrder::kInsideRows, dys);
  run.Backward(ctx, dy.ref());
  auto x = run.x.values();
  const auto objective = [&] {
    run.x.Set(x);
    run.Forward(ctx);
    return Dot(run.y.values(), dys);
  };
  ExpectGradient(objective, x.data(), run.dx.values());
  ExpectGradient(objective, run.halo.data(), run.dhalo.values());
  ExpectGradient(objective, run.w.data(), run.dw.values());
  ExpectGradient(objective, run.bias.data(), run.dbias.values());
}

// Two ranks of a zigzag whose halos are the rows before their segments, and whose gradients of halos are
// added to those rows, compute what one rank does with the whole sequence.
TEST(Conv1dZigzag, EqualsOneLongSequence) {
  Context ctx{Device{}};
  const Zigzag zigzag(5);
  for (const int64_t document : {0, 7}) {
    const ConvShape shape{.rows = zigzag.rows(), .batch = 2, .channels = 3, .document = document};
    const int64_t width = shape.batch * shape.channels, before = shape.k - 1;
    ConvValues<double> values = RandomConv<double>(shape);
    const auto dys = NormalValues<double>(shape.elements(), "dy");
    ConvRun<double> whole(values);
    StridedHeads<double> dy(whole.Dims(), BatchOrder::kInsideRows, dys);
    whole.Forward(ctx);
    whole.Backward(ctx, dy.ref());

    // The sequence behind its own halo, so that every segment has rows before it.
    std::vector<double> extended = values.halo, dx(values.halo.size() + values.x.size());
    extended.insert(extended.end(), values.x.begin(), values.x.end());
    std::vector<double> dw(values.w.size());
    for (const size_t rank : {0, 1}) {
      const std::vector<RowRange> rows = zigzag.RowsOf(rank);
      ConvValues<double> part = values;
      part.shape.rows = rows[0].size() + rows[1].size();
      part.shape.cuts = {rows[0].size()};
      part.x = TakeRows(values.x, width, rows);
      part.ages = TakeRows(values.ages, shape.batch, rows);
      part.halo =
          TakeRows(extended, width,
                   {{rows[0].begin, rows[0].begin + before}, {rows[1].begin, rows[1].begin + before}});
      ConvRun<double> run(part);
      StridedHeads<double> part_dy(run.Dims(), BatchOrder::kInsideRows, TakeRows(dys, width, rows));
      run.Forward(ctx);
      run.Backward(ctx, part_dy.ref());
      ExpectClose(run.y.values(), TakeRows(whole.y.values(), width, rows));
      const auto part_dx = run.dx.values(), part_dhalo = run.dhalo.values(), part_dw = run.dw.values();
      for (size_t i = 0; i < dw.size(); ++i) dw[i] += part_dw[i];
      for (const size_t s : {0, 1}) {
        const auto add = [&](const std::vector<double>& from, int64_t first, int64_t count, int64_t to) {
          for (int64_t i = 0; i < count * width; ++i) {
            dx[static_cast<size_t>(to * width + i)] += from[static_cast<size_t>(first * width + i)];
          }
        };
        const auto index = static_cast<int64_t>(s);
        add(part_dx, index * rows[0].size(), rows[s].size(), rows[s].begin + before);
        add(part_dhalo, index * before, before, rows[s].begin);
      }
    }
    std::vector<double> expected = whole.dhalo.values();
    const auto whole_dx = whole.dx.values();
    expected.insert(expected.end(), whole_dx.begin(), whole_dx.end());
    ExpectClose(dx, expected);
    ExpectClose(dw, whole.dw.values());
  }
}

TEST(Conv1dArguments, AreRefusedByName) {
  Context ctx{Device{}};
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  const ConvShape shape{.rows = 6, .channels = 3};
  ConvRun<float> run(RandomConv<float>(shape));
  const auto refuses = [&](const Conv1d& conv, absl::string_view text) {
    ExpectRefused(Conv1dForward(ctx, conv, run.x.ref(), run.y.ref()), kInvalid, text);
  };
  Guarded<float> nine({3, 9}, 1.0f), two({2, 4}, 1.0f);
  Conv1d conv = run.op();
  conv.w = nine.ref();
  refuses(conv, "conv1d.w=[3, 9]: expected [channels, k], k in [1, 8]");
  conv.w = two.ref();
  refuses(conv, "conv1d.w=f32[2, 4] on cpu: expected f32[3, 4] on cpu");
  conv = run.op();
  conv.segments = {{0, 3}, {3, 6}};
  refuses(conv, "conv1d.halo=f32[1, 3, 1, 3] on cpu: expected f32[2, 3, 1, 3] on cpu");
  conv.segments = {{0, 3}};
  refuses(conv, "conv1d.segments end at row 3: expected 6");
  ConstHeadsRef heads = run.x.ref();
  heads.heads = 3;
  heads.dim = 1;
  ExpectRefused(Conv1dForward(ctx, run.op(), heads, run.y.ref()), kInvalid, "conv1d.x.heads=3: expected 1");
  Conv1dGradients gradients = run.gradients();
  gradients.dw = two.ref();
  ExpectRefused(Conv1dBackward(ctx, run.op(), run.x.ref(), run.y.ref(), gradients), kInvalid,
                "conv1d.dw=f32[2, 4]");
}

}  // namespace
}  // namespace annulus::testing
