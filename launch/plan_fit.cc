#include "plan_fit.h"

#include <algorithm>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "annulus/train/report.h"

namespace annulus {
namespace {

// Of a step: what would be printed as nothing is left out.
constexpr double kShown = 0.0005;

// Layouts that are named for one reason; of more the number alone.
constexpr size_t kNamed = 6;

struct ShareOfStep {
  const char* name;
  const char* field;
  double seconds;
};
std::vector<ShareOfStep> SharesOf(const StepFigures& figures) {
  return {{"computing", "compute_seconds", figures.compute_seconds},
          {"exposed exchange", "exposed_exchange_seconds", figures.exposed_exchange_seconds},
          {"exposed gradients", "exposed_gradients_seconds", figures.exposed_gradients_seconds},
          {"exposed tensor parallelism", "exposed_tensor_seconds", figures.exposed_tensor_seconds},
          {"waiting for other ranks", "bubble_seconds", figures.bubble_seconds}};
}

std::string Milliseconds(double seconds) {
  return absl::StrFormat("%.*f ms", seconds < 0.1 ? 2 : 0, seconds * 1e3);
}

std::string Rates(const StepFigures& figures) {
  std::string text = absl::StrFormat("%s tok/s, %.1f TFLOP/s a rank", FormatCount(figures.tokens_per_second),
                                     figures.tflops_causal);
  if (figures.mfu_causal > 0) absl::StrAppendFormat(&text, ", MFU %.1f%%", 100 * figures.mfu_causal);
  return text;
}

std::string BytesOf(int64_t bytes) { return FormatBytes(static_cast<double>(bytes)); }

std::string Memory(const StepFigures& figures) {
  std::string text = MemoryText(figures.memory);
  if (figures.other_memory_bytes > 0) absl::StrAppend(&text, ", other ", BytesOf(figures.other_memory_bytes));
  return absl::StrCat(BytesOf(figures.memory_bytes()), ": ", text);
}

std::string Shares(const StepFigures& figures) {
  std::vector<std::string> shares;
  for (const ShareOfStep& share : SharesOf(figures)) {
    if (share.seconds < kShown * figures.step_seconds) continue;
    shares.push_back(absl::StrFormat("%s %.1f%%", share.name, 100 * share.seconds / figures.step_seconds));
  }
  return absl::StrJoin(shares, ", ");
}

}  // namespace

std::string StepText(const StepFigures& figures) {
  std::string text =
      absl::StrCat(Milliseconds(figures.step_seconds), ", ", Rates(figures), "\n  ", Shares(figures));
  if (figures.bytes_inside_hosts + figures.bytes_between_hosts > 0) {
    absl::StrAppend(&text, "\n  sent by all ranks: ", BytesOf(figures.bytes_inside_hosts), " inside hosts, ",
                    BytesOf(figures.bytes_between_hosts), " between them");
  }
  return text;
}

nlohmann::ordered_json StepJson(const StepFigures& figures) {
  nlohmann::ordered_json json = {{"step_seconds", figures.step_seconds}};
  for (const ShareOfStep& share : SharesOf(figures)) json[share.field] = share.seconds;
  json["tokens_per_second"] = figures.tokens_per_second;
  json["tflops_causal"] = figures.tflops_causal;
  json["tflops_full"] = figures.tflops_full;
  if (figures.mfu_causal > 0) json["mfu_causal"] = figures.mfu_causal;
  if (figures.mfu_full > 0) json["mfu_full"] = figures.mfu_full;
  for (const MemoryPlan::Part& part : figures.memory.parts())
    json["memory_bytes_per_rank"][part.name] = part.bytes;
  json["memory_bytes_per_rank"]["other"] = figures.other_memory_bytes;
  json["bytes_inside_hosts"] = figures.bytes_inside_hosts;
  json["bytes_between_hosts"] = figures.bytes_between_hosts;
  json["plans"] = figures.plans;
  return json;
}

std::string FitText(const FitResult& result) {
  std::string text;
  for (size_t i = 0; i < result.best.size(); ++i) {
    const FitCandidate& candidate = result.best[i];
    absl::StrAppendFormat(&text, "%2d. %s, micro-batch %d, recompute %s: %s, %s\n    %s\n    %s\n", i + 1,
                          MeshText(candidate.layout), candidate.layout.micro_batch,
                          Name(candidate.layout.recompute), Milliseconds(candidate.figures.step_seconds),
                          Rates(candidate.figures), Shares(candidate.figures), Memory(candidate.figures));
  }
  absl::StrAppendFormat(&text, "\n%s predicted", CountText(result.predicted, "layout"));
  if (result.memory_bytes > 0) absl::StrAppend(&text, "; a rank has ", BytesOf(result.memory_bytes));
  absl::StrAppend(&text, "\nthe others lost:\n");
  for (const FitLosers& losers : result.losers) {
    const size_t named = std::min(kNamed, losers.layouts.size());
    absl::StrAppend(
        &text, "  ", losers.reason, ": ",
        absl::StrJoin(losers.layouts.begin(), losers.layouts.begin() + static_cast<long>(named), "; "));
    if (losers.layouts.size() > named) absl::StrAppend(&text, "; ", losers.layouts.size() - named, " more");
    absl::StrAppend(&text, "\n");
  }
  for (const std::string& plan : result.best[0].figures.plans) absl::StrAppend(&text, "\nexchange ", plan);
  absl::StrAppend(&text, "\nthe best: ", OverridesText(result.best[0].layout));
  return text;
}

nlohmann::ordered_json FitJson(const FitResult& result) {
  nlohmann::ordered_json json = {{"memory_bytes", result.memory_bytes},
                                 {"predicted_layouts", result.predicted}};
  for (const FitCandidate& candidate : result.best) {
    const FitLayout& layout = candidate.layout;
    json["best"].push_back({{"dp", layout.dp},
                            {"cp", layout.cp},
                            {"tp", layout.tp},
                            {"micro_batch", layout.micro_batch},
                            {"recompute", Name(layout.recompute)},
                            {"overrides", OverridesText(layout)},
                            {"predicted", StepJson(candidate.figures)}});
  }
  for (const FitLosers& losers : result.losers)
    json["others"].push_back({{"reason", losers.reason}, {"layouts", losers.layouts}});
  return json;
}

}  // namespace annulus
