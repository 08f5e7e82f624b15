// Machine profiles as text: every field survives, mistakes are named, and what ships is what is assumed
// without a profile.

#include "annulus/train/profile.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "absl/strings/match.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "annulus/base/file.h"

namespace annulus {
namespace {

MachineProfile Profile() {
  MachineProfile profile;
  profile.device = "NVIDIA \"H200\"";
  profile.measured = true;
  profile.ranks = 4;
  profile.launch_seconds = 2.1e-6;
  profile.copy = {{1024, 3e9}, {1e9, 4.2123456789e12}};
  profile.links = {{.transport = TransportKind::kNccl,
                    .one_way = {{0.5, 1}, {65536, 4e10}},
                    .both_ways = {{65536, 7e10}},
                    .message_seconds = 1.0 / 3,
                    .computing_slowdown = 1.125},
                   {.transport = TransportKind::kCopyEngine,
                    .one_way = {{1, 1}},
                    .both_ways = {{1, 1}},
                    .message_seconds = 0}};
  profile.products = {{1e9, 3.5e14}, {1e11, 6e14}};
  profile.product_gradients = {{2e9, 3e14}};
  profile.scans = {{.kernel = ScanKernel::kDeltaRule, .pass = Pass::kBackward, .updates = {{1e6, 3e11}}}};
  profile.passes = {
      {.kind = PassKind::kGatedNorm, .pass = Pass::kBackward, .bytes = {{2e6, 1e12}, {1e9, 2e12}}}};
  profile.collectives = {{1 << 20, 2e10}};
  profile.collective_slowdown = 1.25;
  profile.collective_step_seconds = 2.5e-6;
  profile.peak_tflops = 989.5;
  profile.compute_capability = 90;
  profile.memory_bytes = int64_t{141} << 30;
  profile.other_memory_bytes = int64_t{3} << 30;
  profile.network = {.ranks_per_host = 8,
                     .links = {{.transport = TransportKind::kNccl,
                                .one_way = {{65536, 2e10}},
                                .both_ways = {{65536, 2e10}},
                                .message_seconds = 1e-5}},
                     .host_bytes_per_second = 4e11,
                     .collectives = {{1 << 16, 1e9}, {1 << 20, 1e10}},
                     .collective_slowdown = 1.5,
                     .collective_step_seconds = 1e-5};
  profile.reliability = {.failure_hours = 1500, .restart_seconds = 120, .storage_bytes_per_second = 2e9};
  profile.attention = {{.kernel = AttentionKernel::kCudnn,
                        .pass = Pass::kBackward,
                        .shape = MaskShape::kCausal,
                        .head_dim = 192,
                        .v_head_dim = 128,
                        .pairs = {{1e6, 1e12}, {1e9, 2e12}}},
                       {.kernel = AttentionKernel::kTensorCore,
                        .pass = Pass::kForward,
                        .shape = MaskShape::kGeneral,
                        .head_dim = 64,
                        .v_head_dim = 64,
                        .pairs = {{1, 1e-300}}},
                       {.kernel = AttentionKernel::kHopper,
                        .pass = Pass::kBackward,
                        .shape = MaskShape::kFull,
                        .head_dim = 128,
                        .v_head_dim = 128,
                        .determinism = Determinism::kRequired,
                        .pairs = {{2e6, 3e12}}}};
  return profile;
}

TEST(Profile, EveryFieldSurvivesTheText) {
  const std::string text = ProfileText(Profile());
  const auto again = ParseProfile("p.textproto", text);
  ASSERT_TRUE(again.ok()) << again.status() << "\n" << text;
  EXPECT_TRUE(*again == Profile()) << text << ProfileText(*again);
  EXPECT_TRUE(absl::StrContains(text, "\n  pairs { size: 1000000 per_second: 1000000000000 }\n")) << text;
}

TEST(Profile, SaysWhetherItWasMeasured) {
  MachineProfile profile = Profile();
  EXPECT_TRUE(absl::StartsWith(ProfileText(profile), "# Measured by annulus calibrate.\n"));
  profile.measured = false;
  EXPECT_TRUE(absl::StartsWith(ProfileText(profile), "# Assumed, not measured.\n"));
}

// What is said of the profile with `from`, which must be in its text, replaced by `to`.
std::string ErrorsOf(const std::string& from, const std::string& to) {
  std::string text = ProfileText(Profile());
  EXPECT_EQ(absl::StrReplaceAll({{from, to}}, &text), 1) << from << " in\n" << text;
  const absl::Status status = ParseProfile("p.textproto", text).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << text;
  return std::string(status.message());
}

TEST(Profile, MistakesAreNamed) {
  EXPECT_EQ(ErrorsOf("ranks: 4", "ranks: 0"),
            "p.textproto:4:1: ranks=0: expected an integer from 1 to 1048576 (nearest valid value 1)");
  EXPECT_EQ(ErrorsOf("ranks: 4", "rank: 4"), "p.textproto:4:1: rank: no such field; did you mean `ranks`?");
  EXPECT_EQ(ErrorsOf("CUDA_MMA", "CUDA_MA"),
            "p.textproto:33:3: attention[1].kernel=CUDA_MA: expected one of CPU_TILES, CUDA_F32, CUDA_MMA, "
            "CUDNN, HOPPER (did you mean `CUDA_MMA`?)");
  EXPECT_EQ(ErrorsOf("  shape: CAUSAL\n", ""),
            "p.textproto:23:1: attention[0].shape: missing; expected one of GENERAL, FULL, CAUSAL");
  EXPECT_EQ(ErrorsOf("size: 1000000 per_second: 1000000000000", "size: 2000000000 per_second: 1"),
            "p.textproto:30:11: attention[0].pairs[1].size=1e+09: expected more than 2e+09, the size "
            "of the point before");
  EXPECT_EQ(ErrorsOf("computing_slowdown: 1.125", "computing_slowdown: 0.5"),
            "p.textproto:14:3: link[0].computing_slowdown=0.5: expected a number in [1, 1e+06] (nearest "
            "valid value 1)");
  EXPECT_TRUE(absl::StrContains(ErrorsOf("  collective_slowdown: 1.5", "  collective_slowdown: 0"),
                                "network.collective_slowdown=0: expected a number in [1, 1e+06]"));
  EXPECT_TRUE(absl::StrContains(ErrorsOf("\ncollective_slowdown: 1.25", "\ncollective_slowdown: 0.9"),
                                "collective_slowdown=0.9: expected a number in [1, 1e+06]"));
  EXPECT_EQ(ErrorsOf("  both_ways { size: 65536 per_second: 70000000000 }\n", ""),
            "p.textproto:8:1: link[0].both_ways: missing; expected at least one both_ways { size: ... "
            "per_second: ... }");
  EXPECT_EQ(ErrorsOf("DELTA_RULE", "DELTA"),
            "p.textproto:53:3: scan[0].kernel=DELTA: expected one of SSD, DELTA_RULE");
  EXPECT_TRUE(
      absl::StrContains(ErrorsOf("kind: GATED_NORM", "kind: GATED"),
                        "pass[0].kind=GATED: expected one "
                        "of MOVE, NORM, ACTIVATION, ROPE, CONVOLUTION, GATED_NORM, CROSS_ENTROPY, ADAMW"));
  EXPECT_TRUE(absl::StrContains(ErrorsOf("ranks_per_host: 8", "ranks_per_host: 0"),
                                "network.ranks_per_host=0: expected an integer from 1 to 1048576"));
  EXPECT_TRUE(absl::StrContains(ErrorsOf("restart_seconds: 120", "restart_seconds: -1"),
                                "reliability.restart_seconds=-1: expected a number in [0, 1e+30]"));
}

// As a run of annulus calibrate leaves it that was killed, say: no field is called right that is not.
TEST(Profile, MayEndAnywhere) {
  const absl::Status cut = ParseProfile("p.textproto", "link { both_ways { siz").status();
  EXPECT_TRUE(absl::StrContains(
      cut.message(), "p.textproto:1:20: link[0].both_ways[0].siz: no such field; did you mean `size`?"))
      << cut;
  const std::string text = ProfileText(Profile());
  for (size_t length = 0; length < text.size(); ++length) {
    const absl::StatusOr<MachineProfile> read = ParseProfile("p.textproto", text.substr(0, length));
    if (read.ok()) continue;  // between two messages
    for (const absl::string_view line : absl::StrSplit(read.status().message(), '\n')) {
      const size_t meant = line.find(": no such field; did you mean `");
      if (meant == absl::string_view::npos) continue;
      const absl::string_view said = line.substr(0, meant), name = said.substr(said.find_last_of(".: ") + 1);
      EXPECT_FALSE(absl::StrContains(line, absl::StrCat("`", name, "`"))) << line;
      EXPECT_FALSE(absl::EndsWith(name, "]")) << line;
    }
  }
}

// Profiles of before products were measured stay valid.
TEST(Profile, MayHaveNoRatesOfProducts) {
  MachineProfile without = Profile();
  without.products.clear(), without.product_gradients.clear();
  const std::string text = ProfileText(without);
  EXPECT_FALSE(absl::StrContains(text, "product"));
  const auto again = ParseProfile("p.textproto", text);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(*again == without);
}

// Runs that name no profile go by what is assumed: the files show it.
TEST(ShippedProfiles, AreWhatIsAssumed) {
  const std::pair<const char*, MachineProfile> shipped[] = {{"h200_nvlink_assumed", AssumedHopper()},
                                                            {"cpu_core_assumed", AssumedCpuCore()}};
  for (const auto& [name, assumed] : shipped) {
    const std::string path = absl::StrCat(ANNULUS_SOURCE_DIR "/configs/machine/", name, ".textproto");
    const auto text = ReadFile(path);
    ASSERT_TRUE(text.ok()) << text.status() << "\nexpected in it:\n" << ProfileText(assumed);
    const auto profile = ParseProfile(path, *text);
    ASSERT_TRUE(profile.ok()) << profile.status();
    EXPECT_TRUE(*profile == assumed) << path << ": expected\n" << ProfileText(assumed);
    EXPECT_FALSE(profile->measured) << path;
  }
}

// What a file leaves out is that of the assumed profile it names; lists are replaced as a whole.
TEST(Profile, MayBeLikeAnAssumedOne) {
  const auto profile = ParseProfile("p",
                                    "like: HOPPER device: \"H100\" ranks: 8 copy { size: 1 per_second: 2 } "
                                    "network { ranks_per_host: 8 }");
  ASSERT_TRUE(profile.ok()) << profile.status();
  MachineProfile expected = AssumedHopper();
  expected.device = "H100";
  expected.ranks = 8;
  expected.copy = {{1, 2}};
  expected.network.ranks_per_host = 8;
  EXPECT_TRUE(*profile == expected) << ProfileText(*profile);
  EXPECT_FALSE(profile->measured);
}

TEST(ShippedProfiles, AreValid) {
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(ANNULUS_SOURCE_DIR "/configs/machine")) {
    const auto text = ReadFile(entry.path().string());
    ASSERT_TRUE(text.ok()) << text.status();
    const auto profile = ParseProfile(entry.path().string(), *text);
    ASSERT_TRUE(profile.ok()) << profile.status();
    const std::string said = profile->measured ? "# Measured" : "# Assumed";
    EXPECT_TRUE(absl::StartsWith(*text, said)) << entry.path();
    ++files;
  }
  EXPECT_GE(files, 7);
}

}  // namespace
}  // namespace annulus
