// Every run configuration that ships loads, fits some number of ranks, and survives the round trip.

#include <gtest/gtest.h>

#include <filesystem>

#include "annulus/base/file.h"
#include "annulus/model/params.h"
#include "annulus/train/config.h"

namespace annulus {
namespace {

std::vector<std::string> Shipped() {
  std::vector<std::string> paths;
  for (const auto& entry : std::filesystem::directory_iterator(ANNULUS_SOURCE_DIR "/configs/run")) {
    if (entry.path().extension() == ".textproto") paths.push_back(entry.path().string());
  }
  return paths;
}

TEST(ShippedConfigs, LoadAndValidate) {
  const std::vector<std::string> paths = Shipped();
  ASSERT_GE(paths.size(), 3u);
  for (const std::string& path : paths) {
    const auto text = ReadFile(path);
    ASSERT_TRUE(text.ok()) << text.status();
    const auto config = LoadConfig(path, *text, {});
    ASSERT_TRUE(config.ok()) << config.status();
    const RunSpec& spec = config->spec;
    EXPECT_EQ(spec.name, std::filesystem::path(path).stem().string()) << path;
    const int64_t world = std::max<int64_t>(1, spec.parallel.dp) * spec.parallel.cp * spec.parallel.tp;
    EXPECT_TRUE(ValidateForWorld(spec, world).ok()) << path << ": " << ValidateForWorld(spec, world);
    const auto again = LoadConfig(path, config->text, {});
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_TRUE(again->spec == spec) << path;
  }
}

// Those that have a published model's shape have as many parameters as it.
TEST(ShippedConfigs, HaveAsManyParametersAsPublished) {
  for (const auto& [name, parameters] : {std::pair("llama", 8030261248), {"nemotron-h", 8100852736}}) {
    const std::string path = absl::StrCat(ANNULUS_SOURCE_DIR "/configs/run/", name, ".textproto");
    const auto text = ReadFile(path);
    ASSERT_TRUE(text.ok()) << text.status();
    const auto config = LoadConfig(path, *text, {});
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_EQ(BuildParamTable(config->spec.model).logical_elements(), parameters) << name;
  }
}

// Every small one stands beside one of its published size, and has the same kinds of branches.
TEST(ShippedConfigs, SmallOnesHaveTheBranchesOfLargeOnes) {
  int pairs = 0;
  for (const std::string& path : Shipped()) {
    const size_t suffix = path.find("-tiny.textproto");
    if (suffix == std::string::npos) continue;
    const std::string large = path.substr(0, suffix) + ".textproto";
    const auto small_text = ReadFile(path), large_text = ReadFile(large);
    ASSERT_TRUE(large_text.ok()) << large_text.status();
    const auto small = LoadConfig(path, *small_text, {}), whole = LoadConfig(large, *large_text, {});
    ASSERT_TRUE(small.ok() && whole.ok());
    for (const char kind : {'A', 'T', 'M', 'L', 'B', 'G', '-'}) {
      EXPECT_EQ(Uses(small->spec.model, static_cast<BranchKind>(kind)),
                Uses(whole->spec.model, static_cast<BranchKind>(kind)))
          << path << " " << kind;
    }
    ++pairs;
  }
  EXPECT_EQ(pairs, 9);
}

}  // namespace
}  // namespace annulus
