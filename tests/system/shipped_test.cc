// Every small run configuration that ships learns on four ranks: sequences over all of them, or over two by
// two tensor-parallel ranks, in turn.

#include "system/tiny_run.h"

namespace annulus::testing {
namespace {

std::vector<std::string> SmallConfigs() {
  std::vector<std::string> names;
  for (const std::string& name : Names(ThisTree().files + "/configs/run")) {
    if (absl::EndsWith(name, "-tiny.textproto")) names.push_back(name);
  }
  return names;
}

// Shorter sequences than the configuration's, so that all of them take a minute.
JobSpec ShortRun(const std::string& folder, const std::string& config, const std::string& run, int cp,
                 int tp) {
  JobSpec spec{.folder = folder,
               .ranks = 4,
               .arguments = {"train", ThisTree().files + "/configs/run/" + config, "--run_dir", run, "--set",
                             "device=CPU"}};
  for (const std::string& value :
       {absl::StrCat("parallel.cp=", cp), absl::StrCat("parallel.tp=", tp), std::string("optim.steps=20"),
        std::string("optim.sequences_per_step=4"), std::string("data.seq_len=96")}) {
    spec.arguments.insert(spec.arguments.end(), {"--set", value});
  }
  return spec;
}

double MeanLoss(const std::vector<nlohmann::json>& lines, size_t begin, size_t end) {
  double sum = 0;
  for (size_t i = begin; i < end; ++i) sum += lines[i]["loss"].get<double>();
  return sum / static_cast<double>(end - begin);
}

// 256 bytes that are equally likely are 5.5 nats; after twenty steps the frequent ones are known.
TEST(ShippedConfigs, SmallOnesLearnOnFourRanks) {
  const TemporaryFolder folder;
  std::filesystem::create_directory_symlink(ThisTree().files + "/examples", folder.path() + "/examples");
  const std::vector<std::string> configs = SmallConfigs();
  ASSERT_GE(configs.size(), 9u);
  for (size_t i = 0; i < configs.size(); ++i) {
    const int tp = i % 2 == 0 ? 1 : 2;
    SCOPED_TRACE(absl::StrCat(configs[i], ", tp ", tp));
    const std::string run = absl::StrCat("run", i);
    ExpectDone(RunJob(ShortRun(folder.path(), configs[i], run, 4 / tp, tp), 120));
    const std::vector<nlohmann::json> lines = ReadMetrics(folder.path() + "/" + run);
    ASSERT_EQ(lines.size(), 20u);
    EXPECT_NEAR(lines[0]["loss"].get<double>(), std::log(256.0), 0.3);
    const double early = MeanLoss(lines, 0, 5), middle = MeanLoss(lines, 7, 12),
                 late = MeanLoss(lines, 15, 20);
    EXPECT_LT(middle, early - 0.2);
    EXPECT_LT(late, middle - 0.2);
    EXPECT_LT(late, 4.0);
  }
}

}  // namespace
}  // namespace annulus::testing
