// Errors of attention in f32 by every exchange plan over up to 64 loopback ranks: as small as one rank's.

#include <array>
#include <cstdio>
#include <map>

#include "parallel/exchange_plan_cases.h"

namespace annulus::testing {
namespace {

// By tensor: root mean square of the differences to f64, relative to that of the values.
constexpr std::array<const char*, 4> kTensors = {"out", "lse", "dq", "dkv"};
constexpr size_t kLse = 1;
using Errors = std::array<double, kTensors.size()>;

double RelativeError(const std::vector<float>& got, const std::vector<double>& exact) {
  ANNULUS_CHECK(got.size() == exact.size());
  double differences = 0, values = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double difference = static_cast<double>(got[i]) - exact[i];
    differences += difference * difference;
    values += exact[i] * exact[i];
  }
  return std::sqrt(differences / values);
}

LayerCase CaseOf(int ranks) {
  constexpr int64_t kLength = 1920;  // 128 * 15: no padding on any of these numbers of ranks, zigzag
  return {SequenceLayout(LayoutKind::kZigzag, kLength, ranks),
          {.batch = 1, .lengths = {kLength}, .document_starts = {}},
          {.heads = 2, .kv_heads = 1, .head_dim = 32, .v_head_dim = 32, .window = 0, .scale = 0.2}};
}

Errors ErrorsOf(int ranks, const ExchangeOptions& options, const WholeLayer<double>& exact) {
  const LayerCase c = CaseOf(ranks);
  const WholeLayer<float> got = RunLayer(c, MakeInputs<float>(c), options);
  return {RelativeError(got.out, exact.out), RelativeError(got.lse, exact.lse),
          RelativeError(got.dq, exact.dq), RelativeError(got.dkv, exact.dkv)};
}

// All that can be built; of many ranks, whose plans are long, one of each kind.
std::vector<PlanChoice> Choices(int ranks) {
  constexpr int kManyRanks = 16;
  const std::vector<PlanChoice> all = AllChoices(ranks, CaseOf(ranks).shape.heads);
  if (ranks < kManyRanks) return all;
  std::vector<PlanChoice> choices;
  for (int k = 0; k < kPlanKinds; ++k) {
    for (const PlanChoice& choice : all) {
      const bool squarest = choice.inner == 1 || choice.inner * choice.inner * 2 > ranks;
      if (static_cast<int>(choice.kind) != k || !squarest) continue;
      choices.push_back(choice);
      choices.back().direction = RingDirection::kTowardLower;  // else every rank builds both, to compare them
      break;
    }
  }
  return choices;
}

// By kind and ranks, the largest of the tensors' errors relative to one rank's.
using Ratios = std::map<std::string, std::map<int, double>>;

void Print(const std::vector<int>& all_ranks, const Ratios& ratios) {
  std::printf("RMS error against f64 over that of one rank, f32\n%-26s", "ranks");
  for (const int ranks : all_ranks) std::printf("%7d", ranks);
  for (const auto& [kind, by_ranks] : ratios) {
    std::printf("\n%-26s", kind.c_str());
    for (const int ranks : all_ranks) {
      const auto found = by_ranks.find(ranks);
      if (found == by_ranks.end()) {
        std::printf("%7s", "-");
      } else {
        std::printf("%7.3f", found->second);
      }
    }
  }
  std::printf("\n");
}

// At most 1.1 times that of one rank, for the output, its LSE and every gradient. The LSE has besides what
// rounds the sum of weights, once a call and so at most twice a block: by 2^-24, an eighth of what rounds an
// LSE of 8. They add up like independent errors.
double Bound(size_t tensor, int ranks) {
  return 1.1 * (tensor == kLse ? std::sqrt(1 + 2.0 * ranks / 64) : 1);
}

TEST(ExchangePlanErrors, DoNotGrowWithTheRanks) {
  const std::vector<int> all_ranks = {2, 3, 4, 5, 6, 8, 16, 32, 64};
  const WholeLayer<double> exact = RunLayer(CaseOf(1), MakeInputs<double>(CaseOf(1)));
  const Errors one_rank = ErrorsOf(1, {}, exact);
  Ratios ratios;
  for (const int ranks : all_ranks) {
    for (const PlanChoice& choice : Choices(ranks)) {
      const Errors errors = ErrorsOf(ranks, {.forward = {choice}, .backward = {choice}}, exact);
      const char* kind = choice.head_split == 1 ? Name(choice.kind) : "heads split";
      for (size_t i = 0; i < kTensors.size(); ++i) {
        const double ratio = errors[i] / one_rank[i];
        EXPECT_LE(ratio, Bound(i, ranks)) << kTensors[i] << ", " << NameOf(choice, ranks) << " on " << ranks;
        double& worst = ratios[i == kLse ? "(LSE of any kind)" : kind][ranks];
        worst = std::max(worst, ratio);
      }
    }
  }
  Print(all_ranks, ratios);
}

}  // namespace
}  // namespace annulus::testing
