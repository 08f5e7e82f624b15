// Configurations of published models against GPUs of 141 GB: training fits the ranks that they are for, and
// mostly one host of eight.

#include <gtest/gtest.h>

#include <filesystem>

#include "absl/strings/match.h"
#include "annulus/base/file.h"
#include "annulus/train/config.h"
#include "annulus/train/placement.h"
#include "annulus/train/plan_exchange.h"
#include "annulus/train/trainer.h"

namespace annulus::testing {
namespace {

constexpr int64_t kGpuBytes = 141'000'000'000;
// Of which so much is left to what is not planned: CUDA, NCCL, workspaces of kernels.
constexpr int64_t kPlannedBytes = kGpuBytes / 10 * 9;

enum class OneHost { kFits, kDoesNot };

struct Published {
  const char* name;
  int64_t ranks;  // of the configuration's own mesh, at least eight
  OneHost eight = OneHost::kFits;
  int64_t cp_of_eight = 0;  // 0: as configured
};
void PrintTo(const Published& p, std::ostream* out) { *out << p.name; }

MemoryPlan PlanOnGpus(const std::string& name, int64_t ranks, int64_t cp) {
  const std::string path = absl::StrCat(ANNULUS_SOURCE_DIR "/configs/run/", name, ".textproto");
  const absl::StatusOr<std::string> text = ReadFile(path);
  ANNULUS_CHECK_OK(text.status());
  std::vector<std::string> overrides = {"device=CUDA"};
  if (cp > 0) overrides.push_back(absl::StrCat("parallel.cp=", cp));
  absl::StatusOr<ResolvedConfig> config = LoadConfig(path, *text, overrides, ranks);
  ANNULUS_CHECK_OK(config.status());
  ANNULUS_CHECK_OK(ResolvePlannedDevice(&config->spec));
  const RunSpec& spec = config->spec;
  const auto passes = PlanExchange(spec, ExampleBatchOf(spec).sequences,
                                   ExchangeOptionsOf(spec, TransportsOnOneHost(spec), AssumedHopper()));
  ANNULUS_CHECK(passes.ok()) << passes.status();
  return PlanMemory(spec, PlannedExchangesOf(*passes));
}

class PublishedModels : public ::testing::TestWithParam<Published> {};

TEST_P(PublishedModels, FitTheirMesh) {
  EXPECT_LE(PlanOnGpus(GetParam().name, GetParam().ranks, 0).total(), kPlannedBytes);
}

TEST_P(PublishedModels, OneHostOfEightHoldsAllButTheLargest) {
  const MemoryPlan plan = PlanOnGpus(GetParam().name, 8, GetParam().cp_of_eight);
  EXPECT_EQ(plan.total() <= kPlannedBytes, GetParam().eight == OneHost::kFits) << plan.total();
}

INSTANTIATE_TEST_SUITE_P(Gpus, PublishedModels,
                         ::testing::Values(Published{"llama", 8}, Published{"nemotron-h", 8},
                                           Published{"falcon-h1", 8}, Published{"hymba", 8},
                                           Published{"based", 8}, Published{"rnope-swa", 8},
                                           Published{"mamba-tpla", 16, OneHost::kFits, 2},
                                           Published{"minimax-01", 64, OneHost::kDoesNot, 1},
                                           Published{"hunyuan-turbos", 32, OneHost::kDoesNot, 1}));

// A small model stands beside each of published size.
TEST(PublishedModelsHere, AreAll) {
  int64_t tiny = 0;
  for (const auto& entry : std::filesystem::directory_iterator(ANNULUS_SOURCE_DIR "/configs/run")) {
    if (absl::EndsWith(entry.path().filename().string(), "-tiny.textproto")) ++tiny;
  }
  EXPECT_EQ(tiny, 9);
}

}  // namespace
}  // namespace annulus::testing
