// The search for a layout against predicting every one.

#include "annulus/study/fit.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "annulus/train/config.h"

namespace annulus {
namespace {

constexpr int64_t kRanks = 4;

RunSpec Tiny() {
  RunSpec spec;
  spec.device = DeviceChoice::kCpu;
  spec.compute = ComputeType::kF32;
  spec.model = {.d_model = 64,
                .vocab_size = 256,
                .heads = 6,
                .kv_heads = 2,
                .head_dim = 16,
                .d_ff = 176,
                .tied_head = false};
  spec.model.layers = {{.branches = {{.kind = BranchKind::kAttention, .rope_theta = 1e4}}},
                       {.branches = {{.kind = BranchKind::kMlp}}}};
  spec.data.seq_len = 2048;
  spec.optim.steps = 10;
  spec.optim.sequences_per_step = 4;
  return spec;
}

int64_t NeededBytes(const StepFigures& figures) {
  return figures.memory.total() + figures.other_memory_bytes;
}

std::vector<FitCandidate> Every(const RunSpec& spec, const MachineProfile& machine) {
  std::vector<FitCandidate> all;
  for (const int64_t tp : {1, 2, 4}) {
    for (const int64_t cp : {1, 2, 4}) {
      if (kRanks % (tp * cp) != 0) continue;
      for (const int64_t micro_batch : {1, 2, 4}) {
        for (const Recompute recompute :
             {Recompute::kNone, Recompute::kElementwise, Recompute::kAttentionOutput, Recompute::kBlock}) {
          const FitLayout layout{
              .dp = kRanks / tp / cp, .cp = cp, .tp = tp, .micro_batch = micro_batch, .recompute = recompute};
          const RunSpec run = WithLayout(spec, layout);
          if (!ValidateForWorld(run, kRanks).ok()) continue;
          const absl::StatusOr<StepFigures> figures = PredictStep(run, machine);
          EXPECT_TRUE(figures.ok()) << figures.status();
          all.push_back({.layout = layout, .figures = *figures});
        }
      }
    }
  }
  std::stable_sort(all.begin(), all.end(), [](const FitCandidate& a, const FitCandidate& b) {
    return a.figures.step_seconds < b.figures.step_seconds;
  });
  return all;
}

FitResult BestOf(const RunSpec& spec, const MachineProfile& machine, const FitOptions& options) {
  absl::StatusOr<FitResult> result = Fit(spec, machine, options);
  EXPECT_TRUE(result.ok()) << result.status();
  return result.ok() ? *std::move(result) : FitResult();
}

TEST(Fit, IsAsGoodAsPredictingEveryLayout) {
  const RunSpec spec = Tiny();
  const MachineProfile machine = AssumedCpuCore();
  const std::vector<FitCandidate> all = Every(spec, machine);
  ASSERT_GT(all.size(), 40u);
  std::set<int64_t> sizes;
  for (const FitCandidate& candidate : all) sizes.insert(NeededBytes(candidate.figures));
  // With room for all, for half of them, and for one alone.
  for (const int64_t limit : {int64_t{0}, *std::next(sizes.begin(), static_cast<int64_t>(sizes.size() / 2)),
                              *std::next(sizes.begin(), 3), *sizes.begin()}) {
    SCOPED_TRACE(limit);
    const auto fastest = std::find_if(all.begin(), all.end(), [&](const FitCandidate& candidate) {
      return limit == 0 || NeededBytes(candidate.figures) <= limit;
    });
    const FitResult result = BestOf(spec, machine, {.ranks = kRanks, .memory_bytes = limit, .shown = 3});
    ASSERT_FALSE(result.best.empty());
    EXPECT_NEAR(result.best[0].figures.step_seconds, fastest->figures.step_seconds,
                1e-9 * fastest->figures.step_seconds)
        << MeshText(result.best[0].layout) << " and " << MeshText(fastest->layout);
    for (size_t i = 0; i < result.best.size(); ++i) {
      const StepFigures& figures = result.best[i].figures;
      EXPECT_TRUE(limit == 0 || NeededBytes(figures) <= limit) << NeededBytes(figures);
      EXPECT_TRUE(i == 0 || figures.step_seconds >= result.best[i - 1].figures.step_seconds) << i;
      EXPECT_TRUE(ValidateForWorld(WithLayout(spec, result.best[i].layout), kRanks).ok());
    }
  }
}

bool Says(const FitResult& result, const std::string& reason, const std::string& layout) {
  for (const FitLosers& losers : result.losers) {
    if (!absl::StrContains(losers.reason, reason)) continue;
    for (const std::string& each : losers.layouts) {
      if (absl::StartsWith(each, layout)) return true;
    }
  }
  return false;
}
std::string Losers(const FitResult& result) {
  std::string text;
  for (const FitLosers& losers : result.losers) {
    absl::StrAppend(&text, losers.reason, ":");
    for (const std::string& layout : losers.layouts) absl::StrAppend(&text, " [", layout, "]");
    absl::StrAppend(&text, "\n");
  }
  return text;
}

// Bounds leave out none of those shown, and spare simulating some.
void ExpectBoundsAreSafe(const RunSpec& spec, const MachineProfile& machine, FitOptions options) {
  const FitResult bounded = BestOf(spec, machine, options);
  options.search = FitSearch::kEvery;
  const FitResult every = BestOf(spec, machine, options);
  ASSERT_EQ(bounded.best.size(), every.best.size());
  for (size_t i = 0; i < every.best.size(); ++i) {
    EXPECT_EQ(bounded.best[i].layout, every.best[i].layout)
        << i << ": " << MeshText(bounded.best[i].layout) << " and " << MeshText(every.best[i].layout);
    EXPECT_EQ(bounded.best[i].figures.step_seconds, every.best[i].figures.step_seconds) << i;
  }
  EXPECT_LT(bounded.predicted, every.predicted);
}

// Hosts of eight GPUs.
MachineProfile Hosts(double host_bytes_per_second) {
  MachineProfile machine = AssumedHopper();
  const std::vector<RatePoint> rates = {{65536, 4.88e9}, {1 << 20, 30.1e9}, {1 << 24, 44.5e9}};
  const LinkRate nccl{TransportKind::kNccl, rates, rates, 3e-5, 1.06};
  machine.network = {.ranks_per_host = 8, .links = {nccl}, .host_bytes_per_second = host_bytes_per_second};
  return machine;
}

RunSpec LongContext(const std::vector<BranchSpec>& layers) {
  RunSpec spec;
  spec.device = DeviceChoice::kCuda;
  spec.compute = ComputeType::kBF16;
  spec.model = {.d_model = 2048,
                .vocab_size = 32000,
                .heads = 16,
                .kv_heads = 8,
                .head_dim = 128,
                .d_ff = 8192,
                .tied_head = false};
  for (const BranchSpec& layer : layers) {
    spec.model.layers.push_back({.branches = {layer}});
    spec.model.layers.push_back({.branches = {{.kind = BranchKind::kMlp}}});
  }
  spec.data.seq_len = 32768;
  spec.optim.steps = 10;
  spec.optim.sequences_per_step = 16;
  return spec;
}

TEST(Fit, BoundsLeaveOutNoneOfTheBest) {
  const BranchSpec all{.kind = BranchKind::kAttention, .rope_theta = 1e4};
  BranchSpec window = all;
  window.window = 2048;
  for (const auto& layers : {std::vector{all, all}, std::vector{window, all}}) {
    for (const double host_rate : {368e9, 40e9}) {
      SCOPED_TRACE(absl::StrCat(layers[0].window, " ", host_rate));
      ExpectBoundsAreSafe(LongContext(layers), Hosts(host_rate), {.ranks = 16, .shown = 5});
    }
  }
  RunSpec striped = LongContext({all});
  striped.parallel.layout = LayoutKind::kStriped;
  ExpectBoundsAreSafe(striped, Hosts(0), {.ranks = 16, .memory_bytes = int64_t{20} << 30, .shown = 3});
}

TEST(Fit, SaysWhyOthersLost) {
  const RunSpec spec = Tiny();
  const MachineProfile machine = AssumedCpuCore();
  const FitResult open = BestOf(spec, machine, {.ranks = kRanks, .shown = 1});
  ASSERT_EQ(open.best.size(), 1u);
  // Six heads; two of keys and values.
  EXPECT_TRUE(
      Says(open, "parallel.tp=4: expected a divisor of model.attention.heads=6", "dp 1 x cp 1 x tp 4"))
      << Losers(open);
  EXPECT_TRUE(Says(open, "slower: ", "dp")) << Losers(open);
  EXPECT_TRUE(Says(open, "slower than those shown by what it takes at least", "dp")) << Losers(open);
  size_t lost = 0;
  for (const FitLosers& losers : open.losers) lost += losers.layouts.size();
  // tp 4 has one mesh, the others a micro-batch for each divisor of 4 / dp.
  EXPECT_EQ(lost + open.best.size(), 1u + 1 + 2 + 3 + 2 + 3) << Losers(open);

  EXPECT_EQ(Fit(spec, machine, {.ranks = int64_t{1} << 40}).status().message(),
            "--gpus=1099511627776: expected at most 1048576 ranks");
  MachineProfile threes = machine;
  threes.network = {.ranks_per_host = 3, .links = machine.links};
  EXPECT_TRUE(Says(BestOf(spec, threes, {.ranks = kRanks}), "parallel.tp=2 leaves hosts of 3 ranks",
                   "dp 2 x cp 1 x tp 2"));

  MachineProfile gpus = AssumedHopper();
  gpus.network = {};
  const absl::Status no_network = Fit(LongContext({}), gpus, {.ranks = 16}).status();
  EXPECT_TRUE(
      absl::StrContains(no_network.message(),
                        ": network.link: missing; expected network { ranks_per_host link } with rates "
                        "between hosts for 16 ranks, as a host has at most 8"))
      << no_network;
  EXPECT_TRUE(
      absl::StrContains(Fit(spec, machine, {.ranks = 512}).status().message(),
                        "machine profile of CPU, one core a rank: network.link: missing; expected "
                        "network { ranks_per_host link } with rates between hosts for 512 ranks, as a "
                        "host has at most 256"));

  RunSpec odd = spec;
  odd.optim.sequences_per_step = 2;
  EXPECT_TRUE(Says(BestOf(odd, machine, {.ranks = kRanks}), "optim.sequences_per_step=2 is no multiple of dp",
                   "dp 4 x cp 1 x tp 1"));

  const std::vector<FitCandidate> all = Every(spec, machine);
  int64_t least = NeededBytes(all[0].figures);
  for (const FitCandidate& candidate : all) least = std::min(least, NeededBytes(candidate.figures));
  const FitResult tight = BestOf(spec, machine, {.ranks = kRanks, .memory_bytes = least});
  EXPECT_TRUE(Says(tight, "the memory that was given", "dp 4 x cp 1 x tp 1")) << Losers(tight);
  MachineProfile small = machine;
  small.memory_bytes = least;
  const FitResult by_profile = BestOf(spec, small, {.ranks = kRanks});
  EXPECT_TRUE(Says(by_profile, ", memory_bytes of the machine profile", "dp 4 x cp 1 x tp 1"))
      << Losers(by_profile);
  const absl::Status none = Fit(spec, machine, {.ranks = kRanks, .memory_bytes = least / 2}).status();
  EXPECT_TRUE(absl::StrContains(none.message(), "memory: no layout on 4 ranks fits")) << none;
  EXPECT_TRUE(absl::StrContains(none.message(), "expected at most ")) << none;
}

TEST(Fit, RefusesWhatNoLayoutCanBe) {
  RunSpec spec = Tiny();
  spec.optim.sequences_per_step = 3;
  spec.model.heads = spec.model.kv_heads = 1;
  spec.parallel.layout = LayoutKind::kStriped;
  spec.model.mamba = {.heads = 1, .head_dim = 16, .state = 32, .groups = 1, .chunk = 64};
  spec.model.layers.push_back({.branches = {{.kind = BranchKind::kMamba}}});
  const absl::Status status = Fit(spec, AssumedCpuCore(), {.ranks = 2}).status();
  EXPECT_TRUE(absl::StrContains(status.message(),
                                "no layout on 2 ranks can be: dp 2 x cp 1 x tp 1: "
                                "optim.sequences_per_step=3 is no multiple of dp"))
      << status;
}

TEST(Fit, ItsOverridesMakeTheLayout) {
  const FitLayout layout{
      .dp = 2, .cp = 4, .tp = 8, .micro_batch = 3, .recompute = Recompute::kAttentionOutput};
  EXPECT_EQ(OverridesText(layout),
            "--set parallel.dp=2 --set parallel.cp=4 --set parallel.tp=8 --set optim.micro_batch=3 --set "
            "recompute=ATTENTION_OUTPUT");
  const RunSpec run = WithLayout(Tiny(), layout);
  EXPECT_EQ(run.parallel.dp, 2);
  EXPECT_EQ(run.parallel.cp, 4);
  EXPECT_EQ(run.parallel.tp, 8);
  EXPECT_EQ(run.optim.micro_batch, 3);
  EXPECT_EQ(run.recompute, Recompute::kAttentionOutput);
}

}  // namespace
}  // namespace annulus
