#include "annulus/train/plan_exchange.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "annulus/model/decoder.h"
#include "annulus/train/data.h"
#include "annulus/train/report.h"

namespace annulus {
namespace {

// Why a candidate cannot be; its name stands beside it.
std::string ReasonOf(const PlanCandidate& candidate) {
  const std::string name = candidate.name + ": ", reason(candidate.refused.message());
  return absl::StartsWith(reason, name) ? reason.substr(name.size()) : reason;
}

// Heads in groups are told by the name: "ulysses", "kv_ring, heads over 2 ranks".
bool IsOfKind(const PlanCandidate& candidate, const std::string& kind) {
  return Name(candidate.choice.kind) == kind && candidate.choice.head_split == 1;
}

// The candidate that is looked at: of that name, else the first of that kind.
absl::StatusOr<size_t> IndexOf(const std::vector<PlanCandidate>& candidates, const std::string& shown,
                               Pass pass) {
  const auto has_name = [&](const PlanCandidate& each) { return each.name == shown; };
  const auto has_kind = [&](const PlanCandidate& each) { return IsOfKind(each, shown); };
  const bool named = std::any_of(candidates.begin(), candidates.end(), has_name);
  const auto wanted = std::find_if(candidates.begin(), candidates.end(), [&](const PlanCandidate& each) {
    return each.refused.ok() && (shown.empty() || (named ? has_name(each) : has_kind(each)));
  });
  if (wanted != candidates.end()) return static_cast<size_t>(wanted - candidates.begin());
  std::vector<std::string> lines;
  const auto add = [&](const std::string& line) {
    if (std::find(lines.begin(), lines.end(), line) == lines.end()) lines.push_back(line);
  };
  if (shown.empty()) {
    for (const PlanCandidate& each : candidates) add(absl::StrCat(each.name, ": ", ReasonOf(each)));
    return Invalid("no ", Name(pass), " plan can be:\n", absl::StrJoin(lines, "\n"));
  }
  for (const PlanCandidate& each : candidates) {
    const std::string kind(Name(each.choice.kind));
    if (each.refused.ok() && IsOfKind(each, kind)) add(kind);
  }
  for (const PlanCandidate& each : candidates) {
    if (each.refused.ok()) add(each.name);
  }
  return Invalid("choice=", shown, ": expected a ", Name(pass),
                 " plan, by its kind (the fastest of it) or name: ", absl::StrJoin(lines, "; "));
}

}  // namespace

namespace {

std::vector<PlanCandidate> Ranked(const AttentionCase& layer, Pass pass, const ExchangeOptions& options) {
  return RankPlans(layer, pass, PlanOptionsOf(options, pass), options.machine);
}

ChosenPlan ChosenOf(const std::vector<PlanCandidate>& ranked) {
  ANNULUS_RETURN_IF_ERROR(ranked.front().refused);
  return std::optional(ranked.front());
}

// Sets what travels, and its candidates.
void DecideAndRank(const ExchangeOptions& options, PlannedPass* planned) {
  const AttentionCase layer = planned->layer;
  planned->candidates = Ranked(layer, planned->pass, options);
  if (!layer.latent.has_value()) return;
  std::vector<PlanCandidate> expanded = Ranked(Expanded(layer), planned->pass, options);
  if (layer.layout.ranks() == 1) {
    planned->latents = {.latents = false, .why = "one rank has all keys"};
  } else {
    const LatentAlternatives ways{
        .asked = options.latents, .latents = ChosenOf(planned->candidates), .expanded = ChosenOf(expanded)};
    planned->latents = DecideLatents(layer, planned->pass, ways, options.machine);
  }
  if (planned->latents->latents) return;
  planned->layer = Expanded(layer);
  planned->candidates = std::move(expanded);
  planned->home_seconds = HomeExpansionSeconds(layer, planned->pass, options.machine);
}

}  // namespace

absl::StatusOr<PlannedPass> PlanPass(const AttentionCase& asked, Pass pass, const ExchangeOptions& options,
                                     const std::string& shown) {
  PlannedPass planned{.kind = {},
                      .pass = pass,
                      .layer = asked,
                      .latents = {},
                      .candidates = {},
                      .plan = {},
                      .simulation = {}};
  DecideAndRank(options, &planned);
  const AttentionCase& layer = planned.layer;
  ANNULUS_ASSIGN_OR_RETURN(planned.shown, IndexOf(planned.candidates, shown, pass));
  PlanCandidate& candidate = planned.candidates[planned.shown];
  const ExchangeProblem problem = MakeExchangeProblem(
      layer.layout, layer.sequences, layer.window, layer.heads, layer.kv_heads, ChunkParts(candidate.choice));
  ANNULUS_ASSIGN_OR_RETURN(planned.plan, BuildPlan(problem, pass, candidate.choice));
  planned.simulation = Simulate(
      planned.plan, CostOf(layer, planned.plan, options.machine, candidate.transport, options.throttle));
  SetPredicted(planned.simulation, &candidate);
  return planned;
}

absl::StatusOr<std::vector<PlannedPass>> PlanExchange(const RunSpec& spec, const SequenceBatch& sequences,
                                                      const ExchangeOptions& options,
                                                      const std::string& shown) {
  std::vector<PlannedPass> all;
  for (const AttentionKind& kind : AttentionKindsOf(spec.model)) {
    for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
      const AttentionCase layer =
          AttentionCaseOf(spec, kind.attention, sequences, RunsHopperKernels(options.machine));
      ANNULUS_RETURN_IF_ERROR(CheckAttentionChoice(KernelCaseOf(layer, pass, MaskShape::kFull)));
      ANNULUS_ASSIGN_OR_RETURN(PlannedPass planned, PlanPass(layer, pass, options, shown));
      planned.kind = kind;
      all.push_back(std::move(planned));
    }
  }
  return all;
}

PlannedExchanges PlannedExchangesOf(const std::vector<PlannedPass>& passes) {
  PlannedExchanges exchanges;
  for (const PlannedPass& pass : passes) {
    PlannedExchange& exchange = exchanges[pass.kind.attention];
    exchange.buffer_bytes = std::max(exchange.buffer_bytes, pass.candidates[pass.shown].buffer_bytes);
    exchange.expanded_at_home |= pass.latents.has_value() && !pass.latents->latents;
  }
  return exchanges;
}

std::vector<TransportKind> TransportsOnOneHost(const RunSpec& spec) {
  if (spec.device != DeviceChoice::kCuda) return {TransportKind::kHost};
  return {TransportKind::kCopyEngine, TransportKind::kNccl};
}

namespace {

// Without meta tokens.
ExampleBatch ReadExample(const RunSpec& spec) {
  const auto count = static_cast<size_t>(spec.optim.micro_batch);
  ExampleBatch whole{.sequences = {.batch = spec.optim.micro_batch,
                                   .lengths = std::vector<int64_t>(count, spec.data.seq_len),
                                   .document_starts = {}},
                     .note = {}};
  if (!spec.data.document_mask) return whole;
  ExampleBatch example{.sequences = {.batch = spec.optim.micro_batch, .lengths = {}, .document_starts = {}},
                       .note =
                           "those of the run's first micro-batch, by which a run chooses its plans; "
                           "it builds them anew for each"};
  const auto read = [&]() -> absl::Status {
    ANNULUS_ASSIGN_OR_RETURN(const std::unique_ptr<DataSet> data,
                             DataSet::Open(spec.data, spec.seed, spec.model.vocab_size));
    for (int64_t i = 0; i < spec.optim.micro_batch; ++i) {
      ANNULUS_ASSIGN_OR_RETURN(Sequence sequence, data->Train(i));
      example.sequences.lengths.push_back(sequence.length);
      example.sequences.document_starts.push_back(std::move(sequence.document_starts));
    }
    return absl::OkStatus();
  };
  if (const absl::Status status = read(); !status.ok()) {
    whole.note = absl::StrCat("not planned, they only remove work and bytes: ", status.message());
    return whole;
  }
  return example;
}

}  // namespace

ExampleBatch ExampleBatchOf(const RunSpec& spec) {
  ExampleBatch example = ReadExample(spec);
  example.sequences = WithMetaTokens(spec.model, std::move(example.sequences));
  return example;
}

std::string WhyShown(const PlannedPass& planned) {
  return planned.layer.layout.ranks() == 1 ? "one rank has all keys" : WhyItWon(planned.candidates);
}

std::string CandidateTable(const PlannedPass& planned) {
  const std::string at_home = planned.home_seconds == 0 ? ""
                                                        : absl::StrFormat(" and %.3f ms of expanding latents",
                                                                          planned.home_seconds * 1e3);
  if (planned.layer.layout.ranks() == 1) {
    return absl::StrFormat("  %s: %s; predicted %.3f ms%s\n", kNoExchange, WhyShown(planned),
                           planned.candidates[planned.shown].seconds * 1e3, at_home);
  }
  size_t width = 4;
  for (const PlanCandidate& each : planned.candidates) width = std::max(width, each.name.size());
  const auto bytes = [](int64_t value) { return FormatBytes(static_cast<double>(value)); };
  std::string text = absl::StrFormat("  %-*s  %-11s  %11s  %11s  %10s  %10s\n", static_cast<int>(width),
                                     "plan", "transport", "predicted", "exposed", "sent", "buffers");
  for (size_t i = 0; i < planned.candidates.size(); ++i) {
    const PlanCandidate& each = planned.candidates[i];
    absl::StrAppendFormat(&text, "%s %-*s  ", i == planned.shown ? "*" : " ", static_cast<int>(width),
                          each.name);
    if (each.refused.ok()) {
      // What was not simulated takes that at least.
      const std::string seconds = absl::StrFormat("%s%.3f ms", each.simulated ? "" : ">", each.seconds * 1e3);
      const std::string exposed =
          each.simulated ? absl::StrFormat("%.3f ms", each.exposed_seconds * 1e3) : "-";
      absl::StrAppendFormat(&text, "%-11s  %11s  %11s  %10s  %10s\n", Name(each.transport), seconds, exposed,
                            bytes(each.bytes_sent), bytes(each.buffer_bytes));
    } else {
      absl::StrAppend(&text, "refused: ", ReasonOf(each), "\n");
    }
  }
  absl::StrAppend(&text, "sent, buffers: of the rank with most\nwhy: ", WhyShown(planned), "\n");
  if (!planned.latents.has_value()) return text;
  return absl::StrCat("exchange: ", Name(*planned.latents), " (", planned.latents->why, ")",
                      at_home.empty() ? "" : absl::StrCat("; besides the plan", at_home.substr(4)), "\n",
                      text);
}

std::string StackSvg(const std::vector<std::string>& pictures) {
  const std::string open_tag = "<svg ";
  const auto number = [](const std::string& svg, const std::string& attribute) {
    const size_t begin = svg.find(attribute) + attribute.size();
    double value = 0;
    const bool found = absl::SimpleAtod(svg.substr(begin, svg.find('"', begin) - begin), &value);
    ANNULUS_CHECK(found) << "a picture without" << attribute;
    return value;
  };
  double height = 0, width = 0;
  std::string inside;
  for (const std::string& picture : pictures) {
    const size_t open = picture.find(open_tag);
    ANNULUS_CHECK(open != std::string::npos) << "a picture without <svg";
    absl::StrAppend(&inside, picture.substr(0, open), open_tag, "y=\"", height, "\" ",
                    picture.substr(open + open_tag.size()));
    width = std::max(width, number(picture, " width=\""));
    height += number(picture, " height=\"");
  }
  return absl::StrCat("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"", width, "\" height=\"", height,
                      "\">\n", inside, "</svg>\n");
}

}  // namespace annulus
