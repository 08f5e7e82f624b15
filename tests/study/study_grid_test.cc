// Grids of studies: the product of axes, the meshes and sizes of its points, and points that make no sense.

#include <set>

#include "absl/strings/match.h"
#include "study/study_test_config.h"

namespace annulus {
namespace {

std::vector<std::string> Ids(const std::vector<PlannedPoint>& points) {
  std::vector<std::string> ids;
  for (const PlannedPoint& planned : points) ids.push_back(planned.point.id);
  return ids;
}

TEST(StudyGrid, IsTheProductOfItsAxesWithTheFirstVaryingSlowest) {
  const std::vector<PlannedPoint> points = Grid(TinyStudy());
  EXPECT_EQ(Ids(points), (std::vector<std::string>{"ranks_per_host=2-cp=1", "ranks_per_host=2-cp=2",
                                                   "ranks_per_host=4-cp=1", "ranks_per_host=4-cp=2"}));
  const PlannedPoint& last = points[3];
  ASSERT_TRUE(last.refused.ok()) << last.refused;
  EXPECT_EQ(last.layout, "dp 2 x cp 2 x tp 1");
  EXPECT_EQ(last.point.ranks, 4);
  EXPECT_EQ(last.point.hosts, 1);
  EXPECT_EQ(last.steps, 80);
  EXPECT_EQ(last.steps_between_saves, 20);
  const RunSpec& run = last.config.spec;
  EXPECT_EQ(run.optim.steps, 4);
  EXPECT_EQ(run.optim.schedule.warmup_steps, 0);
  EXPECT_EQ(run.optim.sequences_per_step, 4);
  EXPECT_EQ(run.checkpoint.keep, 0);
  EXPECT_EQ(run.checkpoint.every_steps, 0);
  EXPECT_EQ(run.parallel.dp, 2);
  EXPECT_EQ(run.parallel.cp, 2);
}

TEST(StudyGrid, HostsMultiplyRanks) {
  StudySpec spec = TinyStudy();
  spec.hosts = {1, 2};
  const std::vector<PlannedPoint> points = Grid(spec);
  ASSERT_EQ(points.size(), 8u);
  EXPECT_EQ(points[4].point.id, "hosts=2-ranks_per_host=2-cp=1");
  EXPECT_EQ(points[4].point.hosts, 2);
  EXPECT_EQ(points[4].point.ranks, 4);
}

TEST(StudyGrid, WeakScalingKeepsTheTokensOfARank) {
  StudySpec spec = TinyStudy();
  spec.scaling = Scaling::kWeak;
  spec.grow_sequences = spec.grow_seq_len = true;
  for (const PlannedPoint& planned : Grid(spec)) {
    ASSERT_TRUE(planned.refused.ok()) << planned.refused;
    const RunSpec& run = planned.config.spec;
    EXPECT_EQ(run.data.seq_len, 24 * run.parallel.cp);
    EXPECT_EQ(run.optim.sequences_per_step, 4 * run.parallel.dp);
    EXPECT_EQ(run.data.seq_len * run.optim.sequences_per_step, 96 * planned.point.ranks);
  }
  spec.grow_seq_len = false;
  const PlannedPoint last = Grid(spec).back();
  EXPECT_EQ(last.config.spec.data.seq_len, 24);
  EXPECT_EQ(last.config.spec.optim.sequences_per_step, 8);
}

TEST(StudyGrid, PointsThatMakeNoSenseStayWithTheReason) {
  StudySpec spec = TinyStudy();
  spec.axes = {
      {"cp", {{"1", {}}, {"3", {}}}}, {"dp", {{"1", {}}, {"4", {}}}}, {"tp", {{"1", {}}, {"4", {}}}}};
  spec.ranks_per_host = {4};
  const std::vector<PlannedPoint> points = Grid(spec);
  ASSERT_EQ(points.size(), 8u);
  EXPECT_EQ(points[0].refused.message(), "4 ranks: expected 1 for dp 1 x cp 1 x tp 1");
  // dp 1 x cp 1 x tp 4; the run has two heads.
  EXPECT_TRUE(absl::StrContains(points[1].refused.message(), "heads=2")) << points[1].refused;

  spec.axes = {{"cp", {{"1", {}}, {"3", {}}}}};
  const std::vector<PlannedPoint> derived = Grid(spec);
  EXPECT_TRUE(derived[0].refused.ok()) << derived[0].refused;
  EXPECT_EQ(derived[1].refused.message(), "4 ranks: expected a multiple of cp 3 x tp 1");

  spec.axes = {{"dp", {{"1", {}}, {"2", {}}, {"3", {}}}}};
  const std::vector<PlannedPoint> cp_follows = Grid(spec);
  EXPECT_EQ(cp_follows[0].layout, "dp 1 x cp 4 x tp 1");
  EXPECT_EQ(cp_follows[1].layout, "dp 2 x cp 2 x tp 1");
  EXPECT_EQ(cp_follows[2].refused.message(), "4 ranks: expected a multiple of dp 3 x tp 1");

  spec.axes = {{"optim.steps", {{"-1", {"optim.steps=-1"}}, {"5", {"optim.steps=40"}}}}};
  EXPECT_TRUE(
      absl::StrContains(Grid(spec)[0].refused.message(), "--set optim.steps=-1: expected an integer"));
}

TEST(StudyGrid, WithoutASensiblePointIsAnError) {
  StudySpec spec = TinyStudy();
  spec.ranks_per_host = {3};
  spec.axes = {{"cp", {{"2", {}}}}};
  EXPECT_EQ(
      StudyGrid(spec, kStudyRun).status().message(),
      "axes: expected at least one point of 1 that makes sense; the first is refused: 3 ranks: expected a "
      "multiple of cp 2 x tp 1");
}

TEST(StudyGrid, EqualRunsUnderDifferentLabelsAreRefused) {
  const auto error = [](const StudyAxis& axis, const std::vector<std::string>& overrides = {}) {
    StudySpec spec = TinyStudy();
    spec.axes = {axis};
    spec.overrides = overrides;
    const auto points = StudyGrid(spec, kStudyRun);
    return points.ok() ? "" : std::string(points.status().message());
  };
  EXPECT_EQ(error({"model", {{"a", {}}, {"b", {"model.d_model=16"}}}}),
            "axes: ranks_per_host=2-model=a and ranks_per_host=2-model=b are the same run: expected points "
            "that differ in more than their labels");
  EXPECT_EQ(error({"model", {{"a", {}}, {"b", {"model.d_model=32"}}}}), "");
  // How often a run saves is of its goodput alone, which is predicted where hosts fail.
  const StudyAxis saves{"saves", {{"a", {}}, {"b", {"checkpoint.every_steps=10"}}}};
  EXPECT_TRUE(absl::StrContains(error(saves), "saves=a and ")) << error(saves);
  EXPECT_EQ(
      error(saves, {"parallel.exchange.profile=" ANNULUS_SOURCE_DIR "/configs/machine/h200_x8_400g.textproto",
                    "device=CUDA"}),
      "");
}

// Two labels that differ only in what may not be in a file name.
TEST(StudyGrid, IdsAreDistinctFileNames) {
  StudySpec spec = TinyStudy();
  spec.axes = {{"model",
                {{"8 layers", {"seed=1"}},
                 {"8/layers", {"seed=2"}},
                 {std::string(300, 'x') + "1", {"seed=3"}},
                 {std::string(300, 'x') + "2", {"seed=4"}}}}};
  std::set<std::string> ids;
  for (const std::string& id : Ids(Grid(spec))) {
    EXPECT_LE(id.size(), 150u);
    EXPECT_EQ(id.find_first_of("/ "), std::string::npos) << id;
    ids.insert(id);
  }
  EXPECT_EQ(ids.size(), 8u);
}

}  // namespace
}  // namespace annulus
