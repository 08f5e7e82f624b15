#pragma once

// Whole training runs of the `annulus` program on GPUs, each in a folder of the test. Ranks have a GPU each,
// or share.

#include "absl/strings/str_replace.h"
#include "annulus/device/gpu.h"
#include "system/tiny_run.h"

namespace annulus::testing {

using Strings = std::vector<std::string>;

struct TrainMesh {
  int dp = 1, cp = 1, tp = 1;
  int ranks() const { return dp * cp * tp; }
  std::string Name() const {
    return absl::StrCat("dp ", dp, " cp ", cp, tp > 1 ? absl::StrCat(" tp ", tp) : "");
  }
};

inline Strings Joined(Strings overrides, const Strings& more) {
  overrides.insert(overrides.end(), more.begin(), more.end());
  return overrides;
}
inline Strings With(const TrainMesh& mesh, Strings overrides) {
  return Joined(std::move(overrides),
                {absl::StrCat("parallel.dp=", mesh.dp), absl::StrCat("parallel.cp=", mesh.cp),
                 absl::StrCat("parallel.tp=", mesh.tp)});
}

// Largest relative difference of losses, validation losses included, in the steps 1..steps; infinite where
// one is missing.
inline double LossDifference(const std::string& run, const std::string& reference, size_t steps) {
  const std::vector<nlohmann::json> got = ReadMetrics(run), want = ReadMetrics(reference);
  double worst = 0;
  for (size_t i = 0; i < steps; ++i) {
    for (const char* key : {"loss", "val_loss"}) {
      if (i < want.size() && !want[i].contains(key)) continue;
      const bool both = i < got.size() && i < want.size() && got[i].contains(key) && got[i][key].is_number();
      if (!both) return std::numeric_limits<double>::infinity();
      const double a = got[i][key].get<double>(), b = want[i][key].get<double>();
      worst = std::max(worst, std::abs(a - b) / b);
    }
  }
  return worst;
}

class GpuTraining : public ::testing::Test {
 protected:
  // config: %s is the shipped text
  explicit GpuTraining(const char* config) : config_(config) {}
  void SetUp() override {
    ASSERT_GT(GpuCount(), 0) << "this test needs a GPU: " << WhyNoGpu();
    const std::string text = ThisTree().files + "/examples/01_quickstart/data/text.txt";
    ASSERT_TRUE(std::filesystem::exists(text)) << text;
    Overwrite(folder_.path() + "/c.textproto", absl::StrReplaceAll(config_, {{"%s", text}}));
  }

  std::string Path(const std::string& run) const { return folder_.path() + "/" + run; }
  JobSpec SpecOf(const TrainMesh& mesh, const std::string& run, const Strings& overrides,
                 const Strings& options = {}) const {
    return TrainJob(folder_.path(), mesh.ranks(), run, With(mesh, overrides), options);
  }
  // Trains to the end, on the device that the overrides ask for.
  void Train(const TrainMesh& mesh, const std::string& run, const Strings& overrides,
             const Strings& options = {}) const {
    const JobResult result = RunJob(SpecOf(mesh, run, overrides, options), kSecondsToTrain);
    ExpectDone(result);
    const bool on_cpu = std::count(overrides.begin(), overrides.end(), "device=CPU") > 0;
    EXPECT_EQ(absl::StrContains(result.out, "  cuda:0 "), !on_cpu) << result;
  }
  // Metrics, parameters and optimizer state of both runs, bit for bit.
  void ExpectSameRun(const std::string& run, const std::string& reference) const {
    EXPECT_EQ(MetricsDifference(Path(run), Path(reference), 0), "");
    EXPECT_EQ(CheckpointDifference(Path(run), Path(reference)), "");
  }

  static constexpr double kSecondsToTrain = 120;
  const std::string config_;
  const TemporaryFolder folder_;
};

}  // namespace annulus::testing
