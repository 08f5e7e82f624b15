#include "annulus/ops/ssd.h"

#include "ops/ssd_harness.h"

namespace annulus::testing {
namespace {

template <typename T>
class SsdTest : public ::testing::Test {};
TYPED_TEST_SUITE(SsdTest, FloatTypes);

// Around the chunk, around the panels of 64 rows inside a chunk, with several segments, documents and groups.
std::vector<SsdShape> Shapes() {
  std::vector<SsdShape> shapes;
  for (const int64_t rows : {0, 1, 3, 4, 5, 14}) {
    for (const int64_t document : {0, 3, 6}) {
      shapes.push_back({.rows = rows,
                        .batch = 2,
                        .heads = 4,
                        .groups = 2,
                        .head_dim = 3,
                        .state = 5,
                        .chunk = 4,
                        .document = document});
    }
  }
  for (const int64_t rows : {63, 64, 65, 150}) {
    for (const int64_t document : {0, 40}) {
      shapes.push_back({.rows = rows,
                        .batch = 1,
                        .heads = 2,
                        .head_dim = 8,
                        .state = 17,
                        .chunk = 130,
                        .document = document});
    }
  }
  shapes.push_back({.rows = 9, .heads = 3, .groups = 3, .head_dim = 2, .state = 2, .chunk = 1});
  shapes.push_back({.rows = 40,
                    .batch = 2,
                    .heads = 2,
                    .head_dim = 4,
                    .state = 3,
                    .chunk = 8,
                    .segments = SegmentsOf(40, {17}),
                    .document = 11});
  shapes.push_back({.rows = 10,
                    .heads = 2,
                    .head_dim = 4,
                    .state = 3,
                    .chunk = 4,
                    .segments = {{0, 0}, {0, 10}, {10, 10}}});
  return shapes;
}

std::string Describe(const SsdShape& s) {
  return absl::StrCat(s.rows, " rows, chunk ", s.chunk, ", documents of ", s.document, ", ", s.runs().size(),
                      " segments");
}

TYPED_TEST(SsdTest, ForwardMatchesTheRecurrence) {
  using T = TypeParam;
  Context ctx{Device{}};
  for (const SsdShape& shape : Shapes()) {
    for (const BatchOrder order : {BatchOrder::kInsideRows, BatchOrder::kOutsideRows}) {
      SCOPED_TRACE(Describe(shape));
      const SsdValues<T> values = RandomSsd<T>(shape);
      SsdRun<T> run(values, order);
      run.Summarise(ctx);
      const std::vector<T> ends = run.Ends(ctx, run.initial.ref());
      run.Forward(ctx, run.initial.ref());
      const auto naive = SsdByRecurrence<T>(values, {}, {});
      const auto wide = SsdByRecurrence<Wide<T>>(values.template As<Wide<T>>(), {}, {});
      const auto bound = SsdByRecurrence<T>(values.Bound(), {}, {});
      ExpectMatches<T>(run.y.values(), naive.y, wide.y, MaxAbs(bound.y));
      ExpectMatches<T>(ends, naive.end, wide.end, MaxAbs(bound.end));
    }
  }
}

TYPED_TEST(SsdTest, BackwardMatchesTheRecurrence) {
  using T = TypeParam;
  Context ctx{Device{}};
  for (const SsdShape& shape : Shapes()) {
    SCOPED_TRACE(Describe(shape));
    const SsdValues<T> values = RandomSsd<T>(shape);
    const auto dys = NormalValues<T>(static_cast<int64_t>(values.x.size()), "dy");
    const auto finals = NormalValues<T>(static_cast<int64_t>(values.initial.size()), "final");
    SsdRun<T> run(values, BatchOrder::kInsideRows);
    StridedHeads<T> dy(run.XDims(), BatchOrder::kInsideRows, dys);
    Guarded<T> final_gradient(run.initial.ref().shape(), finals);
    run.Summarise(ctx);
    run.Forward(ctx, run.initial.ref());
    run.SummariseBackward(ctx, dy.ref());
    const std::vector<T> start = run.Ends(ctx, final_gradient.ref());
    run.Backward(ctx, dy.ref(), final_gradient.ref());

    const auto naive = SsdByRecurrence<T>(values, dys, finals);
    const auto wide =
        SsdByRecurrence<Wide<T>>(values.template As<Wide<T>>(), Cast<Wide<T>>(dys), Cast<Wide<T>>(finals));
    const auto bound = SsdByRecurrence<T>(values.Bound(), Absolute(dys), Absolute(finals));
    ExpectMatches<T>(run.dx.values(), naive.dx, wide.dx, MaxAbs(bound.dx));
    ExpectMatches<T>(run.db.values(), naive.db, wide.db, MaxAbs(bound.db));
    ExpectMatches<T>(run.dc.values(), naive.dc, wide.dc, MaxAbs(bound.dc));
    ExpectMatches<T>(run.ddt.values(), naive.ddt, wide.ddt, MaxAbs(bound.ddt));
    ExpectMatches<T>(run.da.values(), naive.da, wide.da, MaxAbs(bound.da));
    ExpectMatches<T>(run.dskip.values(), naive.dskip, wide.dskip, MaxAbs(bound.dskip));
    ExpectMatches<T>(start, naive.start, wide.start, MaxAbs(bound.start));
  }
}

// Linear attention: dt of one and no skip.
TYPED_TEST(SsdTest, UndefinedStepIsOneAndUndefinedSkipIsZero) {
  using T = TypeParam;
  Context ctx{Device{}};
  const SsdShape shape{
      .rows = 21, .batch = 2, .heads = 2, .head_dim = 4, .state = 6, .chunk = 8, .document = 9};
  SsdValues<T> values = RandomSsd<T>(shape);
  values.dt.assign(values.dt.size(), T{1});
  values.skip.assign(values.skip.size(), T{0});
  SsdValues<T> without = values;
  without.dt.clear();
  without.skip.clear();
  const auto dys = NormalValues<T>(static_cast<int64_t>(values.x.size()), "dy");
  SsdRun<T> full(values, BatchOrder::kInsideRows), linear(without, BatchOrder::kInsideRows);
  StridedHeads<T> dy(full.XDims(), BatchOrder::kInsideRows, dys);
  for (SsdRun<T>* run : {&full, &linear}) {
    run->Summarise(ctx);
    run->Forward(ctx, {});
    run->SummariseBackward(ctx, dy.ref());
    run->Backward(ctx, dy.ref(), {});
  }
  EXPECT_TRUE(SameBits(linear.y.values(), full.y.values()));
  EXPECT_TRUE(SameBits(linear.dx.values(), full.dx.values()));
  EXPECT_TRUE(SameBits(linear.db.values(), full.db.values()));
  EXPECT_TRUE(SameBits(linear.dc.values(), full.dc.values()));
  EXPECT_TRUE(SameBits(linear.da.values(), full.da.values()));
}

// The exponential of a difference above the diagonal would be infinite, and infinity times zero not a number.
TYPED_TEST(SsdTest, StrongDecaysStayFinite) {
  using T = TypeParam;
  Context ctx{Device{}};
  const SsdShape shape{.rows = 50, .heads = 2, .head_dim = 4, .state = 3, .chunk = 32, .document = 20};
  SsdValues<T> values = RandomSsd<T>(shape);
  for (size_t i = 0; i < values.a.size(); ++i) values.a[i] *= i % 5 == 0 ? T{1000} : T{1};
  const auto dys = NormalValues<T>(static_cast<int64_t>(values.x.size()), "dy");
  SsdRun<T> run(values, BatchOrder::kInsideRows);
  StridedHeads<T> dy(run.XDims(), BatchOrder::kInsideRows, dys);
  run.Summarise(ctx);
  run.Forward(ctx, run.initial.ref());
  run.SummariseBackward(ctx, dy.ref());
  run.Backward(ctx, dy.ref(), {});
  const std::vector<T> zeros(values.initial.size());
  const auto naive = SsdByRecurrence<T>(values, dys, zeros);
  const auto wide =
      SsdByRecurrence<Wide<T>>(values.template As<Wide<T>>(), Cast<Wide<T>>(dys), Cast<Wide<T>>(zeros));
  ExpectMatches<T>(run.y.values(), naive.y, wide.y, MaxAbs(wide.y));
  ExpectMatches<T>(run.da.values(), naive.da, wide.da, MaxAbs(wide.dx));
}

// What a document holds changes no bit of the documents after it, nor later tokens those before.
TYPED_TEST(SsdTest, NothingCrossesTheStartOfADocument) {
  using T = TypeParam;
  Context ctx{Device{}};
  const SsdShape shape{.rows = 30, .heads = 2, .head_dim = 4, .state = 3, .chunk = 8, .document = 13};
  const SsdValues<T> values = RandomSsd<T>(shape);
  SsdValues<T> changed = values;
  const int64_t width = shape.heads * shape.head_dim, begin = 13, end = 26;  // the second document
  for (int64_t i = begin * width; i < end * width; ++i) changed.x[static_cast<size_t>(i)] += 1;
  SsdRun<T> one(values, BatchOrder::kInsideRows), other(changed, BatchOrder::kInsideRows);
  for (SsdRun<T>* run : {&one, &other}) {
    run->Summarise(ctx);
    run->Forward(ctx, run->initial.ref());
  }
  const auto y = one.y.values(), y_changed = other.y.values();
  for (int64_t i = 0; i < static_cast<int64_t>(y.size()); ++i) {
    const bool inside = begin * width <= i && i < end * width;
    ASSERT_EQ(y[static_cast<size_t>(i)] != y_changed[static_cast<size_t>(i)], inside) << "element " << i;
  }
}

TEST(SsdGradient, AgreesWithFiniteDifferences) {
  Context ctx{Device{}};
  for (const int64_t document : {0, 5}) {
    const SsdShape shape{.rows = 11,
                         .batch = 2,
                         .heads = 4,
                         .groups = 2,
                         .head_dim = 2,
                         .state = 3,
                         .chunk = 4,
                         .segments = SegmentsOf(11, {6}),
                         .document = document};
    SsdValues<double> v = RandomSsd<double>(shape);
    const auto dys = NormalValues<double>(static_cast<int64_t>(v.x.size()), "dy");
    const auto finals = NormalValues<double>(static_cast<int64_t>(v.initial.size()), "final");
    SsdRun<double> run(v, BatchOrder::kOutsideRows);
    StridedHeads<double> dy(run.XDims(), BatchOrder::kOutsideRows, dys);
    Guarded<double> final_gradient(run.initial.ref().shape(), finals);
    run.Summarise(ctx);
    run.Forward(ctx, run.initial.ref());
    run.SummariseBackward(ctx, dy.ref());
    const std::vector<double> start = run.Ends(ctx, final_gradient.ref());
    run.Backward(ctx, dy.ref(), final_gradient.ref());
    const auto dx = run.dx.values(), db = run.db.values(), dc = run.dc.values(), ddt = run.ddt.values(),
               da = run.da.values(), dskip = run.dskip.values();
    // Of the values, which a run is made of anew.
    const auto objective = [&] {
      SsdRun<double> at(v, BatchOrder::kOutsideRows);
      at.Summarise(ctx);
      const std::vector<double> ends = at.Ends(ctx, at.initial.ref());
      at.Forward(ctx, at.initial.ref());
      return Dot(at.y.values(), dys) + Dot(ends, finals);
    };
    ExpectGradient(objective, v.x.data(), dx);
    ExpectGradient(objective, v.b.data(), db);
    ExpectGradient(objective, v.c.data(), dc);
    ExpectGradient(objective, v.dt.data(), ddt);
    ExpectGradient(objective, v.a.data(), da);
    ExpectGradient(objective, v.skip.data(), dskip);
    ExpectGradient(objective, v.initial.data(), start);
  }
}

SsdValues<double> OfRank(const SsdValues<double>& whole, const std::vector<RowRange>& rows) {
  SsdValues<double> part = whole;
  const SsdShape& s = whole.shape;
  part.x = TakeRows(whole.x, s.batch * s.heads * s.head_dim, rows);
  part.b = TakeRows(whole.b, s.batch * s.groups * s.state, rows);
  part.c = TakeRows(whole.c, s.batch * s.groups * s.state, rows);
  part.dt = TakeRows(whole.dt, s.batch * s.heads, rows);
  part.a = TakeRows(whole.a, s.batch * s.heads, rows);
  part.ages = TakeRows(whole.ages, s.batch, rows);
  part.shape.segments = SegmentsOf(rows[0].size() + rows[1].size(), {rows[0].size()});
  part.shape.rows = part.shape.segments.back().end;
  part.initial.assign(static_cast<size_t>(2 * s.all_heads() * s.state_elements()), 0.0);
  return part;
}

// Two ranks that summarise their segments by themselves, with start states and final gradients handed along
// in the order of positions, compute what one rank does with the whole sequence.
TEST(SsdZigzag, EqualsOneLongSequence) {
  Context ctx{Device{}};
  const Zigzag zigzag(21);
  for (const int64_t document : {0, 30}) {
    const SsdShape shape{.rows = zigzag.rows(),
                         .batch = 2,
                         .heads = 4,
                         .groups = 2,
                         .head_dim = 3,
                         .state = 5,
                         .chunk = 8,
                         .document = document};
    const SsdValues<double> values = RandomSsd<double>(shape);
    const auto dys = NormalValues<double>(static_cast<int64_t>(values.x.size()), "dy");
    const int64_t width = shape.batch * shape.heads * shape.head_dim;
    const auto order = BatchOrder::kInsideRows;
    SsdRun<double> whole(values, order);
    StridedHeads<double> dy(whole.XDims(), order, dys);
    whole.Summarise(ctx);
    whole.Forward(ctx, {});
    whole.SummariseBackward(ctx, dy.ref());
    whole.Backward(ctx, dy.ref(), {});

    SsdRun<double> first(OfRank(values, zigzag.RowsOf(0)), order),
        second(OfRank(values, zigzag.RowsOf(1)), order);
    StridedHeads<double> first_dy(first.XDims(), order, TakeRows(dys, width, zigzag.RowsOf(0)));
    StridedHeads<double> second_dy(second.XDims(), order, TakeRows(dys, width, zigzag.RowsOf(1)));
    first.Summarise(ctx);
    second.Summarise(ctx);
    HandAlong<double>(ctx, zigzag.Order(), Transpose::kNo, {first.summary(), second.summary()},
                      {first.initial.ref(), second.initial.ref()});
    first.Forward(ctx, first.initial.ref());
    second.Forward(ctx, second.initial.ref());
    first.SummariseBackward(ctx, first_dy.ref());
    second.SummariseBackward(ctx, second_dy.ref());
    HandAlong<double>(ctx, zigzag.Reversed(), Transpose::kYes, {first.summary(), second.summary()},
                      {first.initial.ref(), second.initial.ref()});
    first.Backward(ctx, first_dy.ref(), first.initial.ref());
    second.Backward(ctx, second_dy.ref(), second.initial.ref());

    size_t rank = 0;
    for (SsdRun<double>* run : {&first, &second}) {
      const std::vector<RowRange> rows = zigzag.RowsOf(rank++);
      const int64_t gates = shape.batch * shape.heads, groups = shape.batch * shape.groups * shape.state;
      ExpectClose(run->y.values(), TakeRows(whole.y.values(), width, rows));
      ExpectClose(run->dx.values(), TakeRows(whole.dx.values(), width, rows));
      ExpectClose(run->db.values(), TakeRows(whole.db.values(), groups, rows));
      ExpectClose(run->dc.values(), TakeRows(whole.dc.values(), groups, rows));
      ExpectClose(run->ddt.values(), TakeRows(whole.ddt.values(), gates, rows));
      ExpectClose(run->da.values(), TakeRows(whole.da.values(), gates, rows));
    }
    std::vector<double> dskip = first.dskip.values();
    for (size_t h = 0; h < dskip.size(); ++h) dskip[h] += second.dskip.values()[h];
    ExpectClose(dskip, whole.dskip.values());
  }
}

// y is linear in x, in b and in c each: without skip and initial state <x, dx> = <b, db> = <c, dc> = <y, dy>.
TEST(SsdAdjoint, GradientsOfLinearInputsAreTransposes) {
  Context ctx{Device{}};
  const SsdShape shape{.rows = 300,
                       .batch = 2,
                       .heads = 4,
                       .groups = 2,
                       .head_dim = 16,
                       .state = 20,
                       .chunk = 128,
                       .document = 90};
  SsdValues<double> v = RandomSsd<double>(shape);
  v.skip.clear();
  const auto dys = NormalValues<double>(static_cast<int64_t>(v.x.size()), "dy");
  SsdRun<double> run(v, BatchOrder::kInsideRows);
  StridedHeads<double> dy(run.XDims(), BatchOrder::kInsideRows, dys);
  run.Summarise(ctx);
  run.Forward(ctx, {});
  run.SummariseBackward(ctx, dy.ref());
  run.Backward(ctx, dy.ref(), {});
  const double expected = Dot(run.y.values(), dys);
  const double scale = std::sqrt(Dot(run.y.values(), run.y.values()) * Dot(dys, dys));
  EXPECT_NEAR(Dot(v.x, run.dx.values()), expected, 1e-13 * scale);
  EXPECT_NEAR(Dot(v.b, run.db.values()), expected, 1e-13 * scale);
  EXPECT_NEAR(Dot(v.c, run.dc.values()), expected, 1e-13 * scale);
  EXPECT_GT(std::abs(expected), 1e-6 * scale);
}

// Transfers of other layers go on meanwhile: at least once in every head of every chunk.
TEST(SsdProgress, IsMadeBetweenChunks) {
  Context ctx{Device{}};
  int64_t polls = 0;
  ctx.progress = [&] { ++polls; };
  const SsdShape shape{.rows = 12, .heads = 3, .head_dim = 2, .state = 2};
  const SsdValues<float> values = RandomSsd<float>(shape);
  SsdRun<float> run(values, BatchOrder::kInsideRows);
  StridedHeads<float> dy(run.XDims(), BatchOrder::kInsideRows, values.x);
  const auto expect_polls = [&](const auto& call) {
    polls = 0;
    call();
    EXPECT_GE(polls, 3 * 3);
  };
  expect_polls([&] { run.Summarise(ctx); });
  expect_polls([&] { run.Forward(ctx, {}); });
  expect_polls([&] { run.SummariseBackward(ctx, dy.ref()); });
  expect_polls([&] { run.Backward(ctx, dy.ref(), {}); });
}

TEST(SsdArguments, AreRefusedByName) {
  Context ctx{Device{}};
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  const SsdShape shape{.rows = 6, .batch = 2, .heads = 4, .groups = 2, .head_dim = 2, .state = 3};
  SsdRun<float> run(RandomSsd<float>(shape), BatchOrder::kInsideRows);
  const auto refuses = [&](const Ssd& ssd, absl::string_view text) {
    ExpectRefused(SsdForward(ctx, ssd, {}, run.chunk_states(), run.y.ref()), kInvalid, text);
  };
  Ssd ssd = run.op();
  ssd.b.heads = ssd.c.heads = 3;
  refuses(ssd, "ssd.b.heads=3: expected a divisor of 4 heads");
  ssd = run.op();
  ssd.c.dim = 2;
  refuses(ssd, "ssd.c=f32[6, 2, 2, 2]: expected f32[6, 2, 2, 3]");
  ssd = run.op();
  ssd.chunk = 0;
  refuses(ssd, "ssd.chunk=0");
  ssd = run.op();
  ssd.segments = {{0, 2}, {3, 6}};
  refuses(ssd, "ssd.segments[1]=[3, 6): expected to begin at 2");
  ssd.segments = {{0, 5}};
  refuses(ssd, "ssd.segments end at row 5: expected 6");
  ssd = run.op();
  ssd.chunk = 2;
  refuses(ssd, "ssd.states=f32[2, 8, 3, 2] on cpu: expected f32[3, 8, 3, 2] on cpu");
  ssd = run.op();
  ssd.a = run.skip.ref();
  refuses(ssd, "ssd.a=f32[4]");
  ExpectRefused(SsdForward(ctx, run.op(), run.a.ref(), run.chunk_states(), run.y.ref()), kInvalid,
                "ssd.initial=f32[6, 2, 4] on cpu: expected f32[1, 8, 3, 2] on cpu");
  SsdGradients out = run.outputs();
  out.dskip = run.a.ref();
  ExpectRefused(SsdBackward(ctx, run.op(), run.y.ref(), run.chunk_states(), run.gradients.ref(), {}, out),
                kInvalid, "ssd.dskip=");
}

}  // namespace
}  // namespace annulus::testing
