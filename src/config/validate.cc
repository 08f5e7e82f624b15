#include "validate.h"

#include <algorithm>

#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "annulus/base/nearest.h"
#include "annulus/train/config.h"
#include "annulus/train/ranges.h"
#include "validate_exchange.h"

namespace annulus::config {
namespace {

constexpr double kMostTokens = 4.6e18;  // 2^62: token counters of a run are int64

void CheckSchedule(const OptimSpec& optim, std::vector<std::string>* findings) {
  if (optim.steps < 1) return;  // refused on its own
  const bool decays = optim.schedule.kind == ScheduleKind::kWarmupStableDecay;
  const std::string kind = optim.schedule.kind == ScheduleKind::kConstant ? "constant"
                           : decays                                       ? "warmup_stable_decay"
                                                                          : "cosine";
  const int64_t decay_steps = decays ? optim.schedule.decay_steps : 0;
  const int64_t most = std::max<int64_t>(0, optim.steps - decay_steps);
  if (decay_steps > optim.steps) {
    findings->push_back(absl::StrCat("optim.schedule.warmup_stable_decay.decay_steps=", decay_steps,
                                     ": expected at most optim.steps=", optim.steps, " (nearest valid value ",
                                     optim.steps, ")"));
  } else if (optim.schedule.warmup_steps > most) {
    findings->push_back(absl::StrCat("optim.schedule.", kind, ".warmup_steps=", optim.schedule.warmup_steps,
                                     ": expected at most optim.steps=", optim.steps,
                                     decays ? absl::StrCat(" - decay_steps=", decay_steps) : "",
                                     " (nearest valid value ", most, ")"));
  }
}

// A pair takes two places, and each query two more.
void CheckTasks(const std::vector<annulus::RecallTask>& tasks, absl::string_view name, const RunSpec& spec,
                std::vector<std::string>* findings) {
  for (size_t i = 0; i < tasks.size(); ++i) {
    const auto [length, pairs] = tasks[i];
    if (length < 1 || pairs < 1) continue;  // refused on their own
    const std::string path = absl::StrCat("data.recall.", name, "[", i, "].");
    if (length > spec.data.seq_len) {
      findings->push_back(absl::StrCat(path, "length=", length, ": expected at most data.seq_len=",
                                       spec.data.seq_len, " (nearest valid value ", spec.data.seq_len, ")"));
    }
    if (pairs > length / 4) {
      findings->push_back(
          absl::StrCat(path, "pairs=", pairs, ": expected at most a fourth of length=", length,
                       length < 4 ? "" : absl::StrCat(" (nearest valid value ", length / 4, ")")));
    } else if (spec.model.vocab_size > 0 && pairs > spec.model.vocab_size / 2 - 1) {
      findings->push_back(
          absl::StrCat(path, "pairs=", pairs, ": expected at most the ",
                       std::max<int64_t>(0, spec.model.vocab_size / 2 - 1),
                       " keys in the lower half of model.vocab_size=", spec.model.vocab_size));
    }
  }
}

// Sequences are made or read, not both.
void CheckRecall(const RunSpec& spec, std::vector<std::string>* findings) {
  const DataSpec& data = spec.data;
  if (!data.recall.has_value()) return;
  for (const auto& [name, sources] : {std::pair("train", &data.train), {"validation", &data.validation}}) {
    if (sources->empty()) continue;
    findings->push_back(absl::StrCat("data.", name, "=", sources->size(),
                                     sources->size() == 1 ? " source" : " sources",
                                     ": expected none, since data.recall is given"));
  }
  if (data.validation_fraction > 0) {
    findings->push_back(absl::StrCat("data.validation_fraction=", data.validation_fraction,
                                     ": expected 0, since data.recall is given (nearest valid value 0)"));
  }
  if (data.packing != Packing::kStream) {
    findings->push_back(
        "data.packing=DOCUMENTS: expected STREAM, since data.recall is given (nearest valid "
        "value STREAM)");
  }
  CheckTasks(data.recall->tasks, "task", spec, findings);
  CheckTasks(data.recall->validation_tasks, "validation_task", spec, findings);
}

bool HasValidation(const DataSpec& data) {
  if (data.recall.has_value()) return data.recall->validation_sequences > 0;
  return !data.validation.empty() || data.validation_fraction > 0;
}

void CheckData(const RunSpec& spec, std::vector<std::string>* findings) {
  const DataSpec& data = spec.data;
  if (!data.validation.empty() && data.validation_fraction > 0) {
    findings->push_back(absl::StrCat("data.validation_fraction=", data.validation_fraction,
                                     ": expected 0, since data.validation is given (nearest valid value 0)"));
  }
  if (spec.eval.every_steps > 0 && !HasValidation(data)) {
    findings->push_back(absl::StrCat("eval.every_steps=", spec.eval.every_steps, ": expected ",
                                     data.recall.has_value() ? "data.recall.validation_sequences"
                                                             : "data.validation or data.validation_fraction",
                                     " to evaluate on (nearest valid value 0)"));
  }
  if (data.document_mask && spec.model.meta_tokens > 0) {
    findings->push_back(
        absl::StrCat("data.document_mask=true: expected false with meta=", spec.model.meta_tokens,
                     " in model.pattern, since a query sees one range of keys: meta tokens and its own "
                     "document are two in "
                     "all documents but the first (nearest valid value false)"));
  }
  const auto check_starts = [&](const std::vector<SourceSpec>& sources, absl::string_view name) {
    for (size_t i = 0; i < sources.size(); ++i) {
      const int64_t token = sources[i].document_start_token;
      if (spec.model.vocab_size < 1 || token < spec.model.vocab_size) continue;
      findings->push_back(absl::StrCat("data.", name, "[", i, "].llmc.document_start_token=", token,
                                       ": expected a token below model.vocab_size=", spec.model.vocab_size));
    }
  };
  check_starts(data.train, "train");
  check_starts(data.validation, "validation");
}

// States pass along runs of consecutive tokens, which a striped rank has none of.
void CheckLayout(const RunSpec& spec, std::vector<std::string>* findings) {
  if (spec.parallel.layout != LayoutKind::kStriped || spec.parallel.cp < 2) return;
  std::string letters;
  for (const BranchKind kind :
       {BranchKind::kMamba, BranchKind::kLightning, BranchKind::kBased, BranchKind::kDeltaNet}) {
    if (!Uses(spec.model, kind)) continue;
    absl::StrAppend(&letters, letters.empty() ? "" : ", ", std::string(1, static_cast<char>(kind)));
  }
  if (letters.empty()) return;
  findings->push_back(absl::StrCat(
      "parallel.layout=STRIPED: expected ZIGZAG or CONTIGUOUS with parallel.cp=", spec.parallel.cp,
      " and layers ", letters, ", whose states pass along runs of tokens"));
}

void CheckDevice(const RunSpec& spec, std::vector<std::string>* findings) {
  if (spec.compute == ComputeType::kF64 && spec.device == DeviceChoice::kCuda) {
    findings->push_back("compute=F64: expected F32 or BF16 with device=CUDA (nearest valid value F32)");
  }
  const TransportChoice transport = spec.parallel.exchange.transport;
  const bool needs_gpu = transport == TransportChoice::kNccl || transport == TransportChoice::kCopyEngine;
  if (needs_gpu && spec.device == DeviceChoice::kCpu) {
    findings->push_back(absl::StrCat(
        "parallel.exchange.transport=", transport == TransportChoice::kNccl ? "NCCL" : "COPY_ENGINE",
        ": expected BEST or HOST with device=CPU (nearest valid value BEST)"));
  }
  if (spec.compute == ComputeType::kBF16 && spec.device == DeviceChoice::kCpu) {
    findings->push_back("compute=BF16: expected F32 or F64 with device=CPU (nearest valid value F32)");
  }
}

void CheckLatents(const RunSpec& spec, std::vector<std::string>* findings) {
  const LatentExchange latent = spec.parallel.exchange.latent;
  if (latent == LatentExchange::kAuto || Uses(spec.model, BranchKind::kLatentAttention)) return;
  findings->push_back(
      absl::StrCat("parallel.exchange.latent=", latent == LatentExchange::kLatent ? "LATENT" : "EXPANDED",
                   ": expected AUTO in a model without T (nearest valid value AUTO)"));
}

void CheckBatch(const RunSpec& spec, int64_t dp, std::vector<std::string>* findings) {
  const OptimSpec& optim = spec.optim;
  if (dp < 1 || optim.micro_batch < 1) return;  // refused on their own
  const int64_t unit = dp * optim.micro_batch;
  if (optim.sequences_per_step % unit == 0) return;
  findings->push_back(absl::StrCat("optim.sequences_per_step=", optim.sequences_per_step,
                                   ": expected a multiple of dp * micro_batch = ", dp, " * ",
                                   optim.micro_batch, " = ", unit,
                                   NearestMultiple(optim.sequences_per_step, unit)));
}

// The data-parallel size on `world` ranks, or nothing and a finding.
std::optional<int64_t> CheckMesh(const ParallelSpec& parallel, int64_t world,
                                 std::vector<std::string>* findings) {
  if (parallel.cp < 1 || parallel.tp < 1) return std::nullopt;  // refused on their own
  if (!kRanksRange.Contains(world)) {
    findings->push_back(absl::StrCat("world=", world, ": expected 1 to ", kRanksRange.high, " ranks"));
    return std::nullopt;
  }
  const int64_t inner = parallel.cp * parallel.tp;
  if (world % inner != 0) {
    const bool tensor = world % parallel.tp != 0;
    findings->push_back(absl::StrCat(
        "parallel.", tensor ? "tp=" : "cp=", tensor ? parallel.tp : parallel.cp,
        ": expected cp * tp = ", inner, " to divide the ", world, " ranks",
        tensor ? NearestDivisor(parallel.tp, world) : NearestDivisor(parallel.cp, world / parallel.tp)));
    return std::nullopt;
  }
  const int64_t dp = world / inner;
  if (parallel.dp != 0 && parallel.dp != dp) {
    findings->push_back(absl::StrCat("parallel.dp=", parallel.dp, ": expected dp * cp * tp = ", parallel.dp,
                                     " * ", parallel.cp, " * ", parallel.tp, " = ", parallel.dp * inner,
                                     " to be the ", world, " ranks (nearest valid value ", dp, ")"));
    return std::nullopt;
  }
  return dp;
}

}  // namespace

std::vector<std::string> CheckRun(const RunSpec& spec, std::optional<int64_t> world) {
  std::vector<std::string> findings;
  absl::Status model = Validate(spec.model);
  if (model.ok() && spec.parallel.tp >= 1) model = ValidateShards(spec.model, spec.parallel.tp);
  if (!model.ok()) findings = absl::StrSplit(model.message(), '\n');
  CheckLayout(spec, &findings);
  CheckDevice(spec, &findings);
  CheckExchange(spec.parallel, &findings);
  CheckLatents(spec, &findings);
  CheckData(spec, &findings);
  CheckRecall(spec, &findings);
  CheckSchedule(spec.optim, &findings);
  if (spec.sample.tokens > 0 && spec.model.vocab_size > 0 && spec.model.vocab_size < 256) {
    findings.push_back(absl::StrCat("sample.tokens=", spec.sample.tokens,
                                    ": expected 0, since a sample is bytes and model.vocab_size=",
                                    spec.model.vocab_size, " is below 256 (nearest valid value 0)"));
  }
  const double tokens = static_cast<double>(spec.optim.steps) *
                        static_cast<double>(spec.optim.sequences_per_step) *
                        static_cast<double>(spec.data.seq_len);
  if (tokens > kMostTokens) {
    findings.push_back(absl::StrCat("optim.steps=", spec.optim.steps,
                                    ": expected steps * sequences_per_step * seq_len of at most ",
                                    kMostTokens, " tokens, got ", tokens));
  }
  std::optional<int64_t> dp;
  if (world.has_value()) dp = CheckMesh(spec.parallel, *world, &findings);
  CheckBatch(spec, dp.value_or(std::max<int64_t>(1, spec.parallel.dp)), &findings);
  return findings;
}

}  // namespace annulus::config

namespace annulus {

absl::Status ValidateForWorld(const RunSpec& spec, int64_t world) {
  const std::vector<std::string> findings = config::CheckRun(spec, world);
  if (findings.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrJoin(findings, "\n"));
}

}  // namespace annulus
