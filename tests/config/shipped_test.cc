// Every run configuration that ships loads, fits some number of ranks, and survives the round trip.

#include <gtest/gtest.h>

#include <filesystem>

#include "annulus/base/file.h"
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

}  // namespace
}  // namespace annulus
