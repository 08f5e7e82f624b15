// `annulus plan`: what a configuration costs, how its attention layers exchange and how fast it steps,
// without running it; and the layout that steps fastest.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>

#include "absl/strings/str_format.h"
#include "annulus/base/file.h"
#include "annulus/model/cost.h"
#include "annulus/parallel/attend_calls.h"
#include "annulus/train/config.h"
#include "annulus/train/placement.h"
#include "annulus/train/plan_exchange.h"
#include "annulus/train/profile.h"
#include "annulus/train/report.h"
#include "annulus/train/trainer.h"
#include "commands.h"
#include "plan_fit.h"

namespace annulus {
namespace {

// "hopper (causal blocks)"
std::string KernelFor(const AttentionCase& layer, Pass pass, MaskShape shape) {
  const AttentionKernel kernel = ChooseAttentionKernel(KernelCaseOf(layer, pass, shape));
  const char* block = shape == MaskShape::kFull ? "full" : shape == MaskShape::kCausal ? "causal" : "masked";
  return absl::StrCat(Name(kernel), " (", block, " blocks)");
}

// Kernel calls of each kind, over all ranks.
std::map<std::string, int64_t> KernelsOf(const PlannedPass& planned) {
  std::map<std::string, int64_t> calls;
  for (size_t r = 0; r < planned.plan.ranks.size(); ++r) {
    for (const Step& step : planned.plan.ranks[r].steps) {
      if (step.kind != StepKind::kAttend) continue;
      for (const AttendCall& call : CallsOf(planned.layer.layout, planned.layer.sequences, planned.plan,
                                            static_cast<int>(r), step.attend)) {
        ++calls[KernelFor(planned.layer, planned.pass, call.shape)];
      }
    }
  }
  return calls;
}

std::string KernelsText(const std::map<std::string, int64_t>& kernels) {
  std::string text;
  for (const auto& [name, calls] : kernels) {
    absl::StrAppend(&text, text.empty() ? "" : ", ", calls, " x ", name);
  }
  return text;
}

nlohmann::ordered_json CandidateJson(const PlanCandidate& candidate) {
  nlohmann::ordered_json json = {{"plan", candidate.name},
                                 {"transport", std::string(Name(candidate.transport))}};
  if (!candidate.refused.ok()) {
    json["refused"] = std::string(candidate.refused.message());
    return json;
  }
  json[candidate.simulated ? "predicted_seconds" : "predicted_seconds_at_least"] = candidate.seconds;
  if (candidate.simulated) json["predicted_exposed_seconds"] = candidate.exposed_seconds;
  json["bytes_sent"] = candidate.bytes_sent;
  json["buffer_bytes"] = candidate.buffer_bytes;
  return json;
}

nlohmann::ordered_json LatentsJson(const PlannedPass& planned) {
  const LatentDecision& decision = *planned.latents;
  nlohmann::ordered_json json = {{"exchange", std::string(Name(decision))}, {"why", decision.why}};
  for (const auto& [name, seconds] : {std::pair{"latents_predicted_seconds", decision.latent_seconds},
                                      {"keys_and_values_predicted_seconds", decision.expanded_seconds}}) {
    if (seconds.has_value()) json[name] = *seconds;
  }
  json["expansion_at_home_seconds"] = planned.home_seconds;
  return json;
}

nlohmann::ordered_json PassJson(const PlannedPass& planned) {
  const PlanCandidate& shown = planned.candidates[planned.shown];
  const AttentionClass& layers = planned.kind.attention;
  nlohmann::ordered_json json = {{"layers", planned.kind.layers},
                                 {"layer", Name(layers.branch)},
                                 {"window", layers.window},
                                 {"pass", Name(planned.pass)},
                                 {"plan", shown.name},
                                 {"transport", std::string(Name(shown.transport))},
                                 {"why", WhyShown(planned)},
                                 {"hash", HashOf(planned.plan)},
                                 {"bytes_sent_per_rank", planned.simulation.bytes_sent},
                                 {"kernel_calls", KernelsOf(planned)},
                                 {"predicted_seconds", planned.simulation.makespan},
                                 {"predicted_exposed_seconds", planned.simulation.exposed},
                                 {"candidates", nlohmann::ordered_json::array()}};
  for (const PlanCandidate& candidate : planned.candidates) {
    json["candidates"].push_back(CandidateJson(candidate));
  }
  if (layers.latent_groups > 1) json["latent_groups"] = layers.latent_groups;
  if (planned.latents.has_value()) json["latents"] = LatentsJson(planned);
  return json;
}

nlohmann::ordered_json StatesJson(const StateKind& kind) {
  const auto sent = [](const StateExchange& exchange) -> nlohmann::ordered_json {
    return {{"state_bytes", exchange.state_bytes}, {"halo_bytes", exchange.halo_bytes}};
  };
  return {{"layers", kind.layers},
          {"layer", Name(kind.branch)},
          {"forward", sent(kind.forward)},
          {"backward", sent(kind.backward)}};
}

// What is planned, and for what.
struct Planned {
  const RunSpec& spec;
  const MachineProfile& machine;
  std::string machine_text;  // where the profile is from
  ExampleBatch batch;
  std::vector<PlannedPass> passes;
  absl::StatusOr<StepFigures> step;  // predicted
};

// Of the plans shown; layers take turns.
int64_t BufferBytesOf(const Planned& planned) {
  int64_t most = 0;
  for (const PlannedPass& pass : planned.passes)
    most = std::max(most, pass.candidates[pass.shown].buffer_bytes);
  return most;
}

std::string Json(const Planned& planned) {
  const RunSpec& spec = planned.spec;
  const FlopsPerToken flops = TrainingFlops(spec.model, spec.data.seq_len);
  const MemoryPlan memory = PlanMemory(spec, PlannedExchangesOf(planned.passes));
  nlohmann::ordered_json json;
  json["name"] = spec.name;
  json["parameters"] = BuildParamTable(spec.model).elements();
  json["flops_per_token"] = {{"causal", flops.causal}, {"full", flops.full}};
  json["mesh"] = {{"dp", spec.parallel.dp}, {"cp", spec.parallel.cp}, {"tp", spec.parallel.tp}};
  for (const MemoryPlan::Part& part : memory.parts()) json["memory_bytes_per_rank"][part.name] = part.bytes;
  json["memory_bytes_per_rank"]["total"] = memory.total();
  json["exchange_buffer_bytes_per_rank"] = BufferBytesOf(planned);
  json["machine"] = {{"device", planned.machine.device},
                     {"measured", planned.machine.measured},
                     {"ranks", planned.machine.ranks}};
  const double throttle = spec.parallel.exchange.throttle_gb_per_second;
  if (throttle > 0) json["throttle_gb_per_second"] = throttle;
  json["predicted_step"] =
      planned.step.ok() ? StepJson(*planned.step)
                        : nlohmann::ordered_json{{"refused", std::string(planned.step.status().message())}};
  json["exchange"] = nlohmann::ordered_json::array();
  for (const PlannedPass& pass : planned.passes) json["exchange"].push_back(PassJson(pass));
  for (const StateKind& kind : StateKindsOf(spec)) json["states"].push_back(StatesJson(kind));
  return json.dump(2);
}

void PrintCosts(const Planned& planned) {
  const RunSpec& spec = planned.spec;
  const FlopsPerToken flops = TrainingFlops(spec.model, spec.data.seq_len);
  const MemoryPlan memory = PlanMemory(spec, PlannedExchangesOf(planned.passes));
  const auto bytes = [](int64_t value) { return FormatBytes(static_cast<double>(value)); };
  std::printf("%s: %s on dp=%d cp=%d tp=%d\n", spec.name.c_str(), spec.pattern.c_str(),
              static_cast<int>(spec.parallel.dp), static_cast<int>(spec.parallel.cp),
              static_cast<int>(spec.parallel.tp));
  std::printf("parameters        %s\n",
              FormatCount(static_cast<double>(BuildParamTable(spec.model).elements())).c_str());
  std::printf("FLOPs per token   %s causal, %s full (training; recomputation not counted)\n",
              FormatCount(flops.causal).c_str(), FormatCount(flops.full).c_str());
  std::printf("memory per rank   %s; total %s\n", MemoryText(memory).c_str(), bytes(memory.total()).c_str());
  if (spec.device == DeviceChoice::kCuda) {
    std::printf(
        "                  not planned: CUDA, NCCL's buffers, workspaces of kernels; a run prints what it "
        "holds "
        "after its first step\n");
  }
}

void Print(const Planned& planned) {
  PrintCosts(planned);
  if (planned.spec.parallel.cp > 1) {
    std::printf("exchange buffers  %s on a rank, of the plans below; memory counts them\n",
                FormatBytes(static_cast<double>(BufferBytesOf(planned))).c_str());
  }
  std::printf("machine           %s\n", planned.machine_text.c_str());
  std::printf("predicted step    %s\n",
              (planned.step.ok() ? StepText(*planned.step)
                                 : absl::StrCat("not known: ", planned.step.status().message()))
                  .c_str());
  if (!planned.batch.note.empty()) std::printf("documents         %s\n", planned.batch.note.c_str());
  for (const PlannedPass& pass : planned.passes) {
    const char* of_each = pass.kind.attention.latent_groups > 1 ? "of each branch" : "of each";
    std::printf("\n%s, %s; %s, per micro-batch:\n%s", LayersText(pass.kind).c_str(), Name(pass.pass), of_each,
                CandidateTable(pass).c_str());
    std::printf("kernel calls of all ranks: %s\n", KernelsText(KernelsOf(pass)).c_str());
    std::printf("%s", Timeline(pass.plan, pass.simulation).c_str());
  }
  for (const StateKind& kind : StateKindsOf(planned.spec)) std::printf("\n%s\n", StateText(kind).c_str());
}

// Of several names of one option.
std::string LastOf(const Arguments& arguments, std::initializer_list<absl::string_view> names,
                   const std::string& fallback) {
  std::string value = fallback;
  for (const absl::string_view name : names) value = arguments.Last(name, value);
  return value;
}

// What a run on that machine computes on, where the configuration leaves it open.
absl::StatusOr<MachineProfile> MachineOf(const Arguments& arguments, RunSpec* spec) {
  if (arguments.Has("--profile") && arguments.Has("--machine"))
    return Invalid("--machine and --profile are the same option: expected one of them");
  std::string& path = spec->parallel.exchange.profile;
  path = LastOf(arguments, {"--profile", "--machine"}, path);
  if (!path.empty() && spec->device == DeviceChoice::kAuto) {
    ANNULUS_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
    ANNULUS_ASSIGN_OR_RETURN(const MachineProfile machine, ParseProfile(path, text));
    const bool cpu = std::all_of(machine.attention.begin(), machine.attention.end(),
                                 [](const auto& rate) { return rate.kernel == AttentionKernel::kCpuTiles; });
    spec->device = cpu ? DeviceChoice::kCpu : DeviceChoice::kCuda;
  }
  ANNULUS_RETURN_IF_ERROR(ResolvePlannedDevice(spec));
  return ProfileOf(*spec);
}

// A line on a terminal's or a log's stderr about a search that takes long.
class ProgressLine {
 public:
  void operator()(const FitProgress& progress) {
    constexpr double kPatience = 2, kEvery = 1;  // seconds
    const double now = Seconds();
    const bool over = progress.settled == progress.layouts;
    if (now < kPatience || (!over && now < last_ + kEvery)) return;
    last_ = now;
    const double left = now * static_cast<double>(progress.layouts - progress.settled) /
                        static_cast<double>(progress.settled);
    std::fprintf(stderr, "\r%d of %d layouts settled, %d predicted, %.0f s%s%s",
                 static_cast<int>(progress.settled), static_cast<int>(progress.layouts),
                 static_cast<int>(progress.predicted), now,
                 over || progress.settled == 0 ? "" : absl::StrFormat(", about %.0f s left", left).c_str(),
                 over ? "            \n" : "   ");
  }

 private:
  double Seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  double last_ = 0;
};

absl::Status RunFit(const Arguments& arguments, RunSpec spec, const MachineProfile& machine, int64_t ranks) {
  ANNULUS_ASSIGN_OR_RETURN(const double gib, arguments.PositiveNumber("--memory-gib", 0));
  ANNULUS_ASSIGN_OR_RETURN(
      const FitResult result,
      Fit(spec, machine,
          {.ranks = ranks,
           .memory_bytes = static_cast<int64_t>(gib * 0x1p30),
           .progress = [line = ProgressLine()](const FitProgress& at) mutable { line(at); }}));
  if (arguments.Has("--json")) {
    std::printf("%s\n", FitJson(result).dump(2).c_str());
  } else {
    std::printf("%s on %s of %s\n\n%s\n", spec.name.c_str(), CountText(ranks, "rank").c_str(),
                ProfileSource(spec.parallel.exchange, machine).c_str(), FitText(result).c_str());
  }
  return absl::OkStatus();
}

absl::Status Run(const Arguments& arguments, const std::string&) {
  const char* named = arguments.Has("--gpus") ? "--gpus" : "--world";
  ANNULUS_ASSIGN_OR_RETURN(const std::optional<int64_t> world, arguments.PositiveInt(named));
  const bool fit = arguments.Has("--fit");
  if (fit && !world.has_value()) return Invalid("--fit: expected --gpus N with it, the ranks to fit on");
  if (!fit && arguments.Has("--memory-gib")) return Invalid("--memory-gib: expected --fit with it");
  ANNULUS_RETURN_IF_ERROR(CheckOutputFile(arguments, "--svg"));
  ANNULUS_ASSIGN_OR_RETURN(const std::string text, ReadFile(arguments.operand()));
  // The layout that is written need not be one of so many ranks.
  ANNULUS_ASSIGN_OR_RETURN(
      ResolvedConfig config,
      LoadConfig(arguments.operand(), text, arguments.All("--set"), fit ? std::nullopt : world));
  RunSpec& spec = config.spec;
  ANNULUS_ASSIGN_OR_RETURN(const MachineProfile machine, MachineOf(arguments, &spec));
  if (fit) return RunFit(arguments, spec, machine, *world);
  // Without --world and parallel.dp the smallest world that the configuration asks for.
  spec.parallel.dp = std::max<int64_t>(1, spec.parallel.dp);
  Planned planned{.spec = spec,
                  .machine = machine,
                  .machine_text = ProfileSource(spec.parallel.exchange, machine),
                  .batch = ExampleBatchOf(spec),
                  .passes = {},
                  .step = PredictStep(spec, machine, EffortFor(spec.parallel.cp))};
  ANNULUS_ASSIGN_OR_RETURN(
      planned.passes,
      PlanExchange(spec, planned.batch.sequences, ExchangeOptionsOf(spec, TransportsOnOneHost(spec), machine),
                   arguments.Last("--choice", "")));
  std::vector<std::string> pictures;
  for (const PlannedPass& pass : planned.passes) {
    ANNULUS_RETURN_IF_ERROR(Validate(pass.plan));
    const LinkThrottle throttle{spec.parallel.exchange.throttle_gb_per_second * 1e9};
    pictures.push_back(TimelineSvg(pass.plan, pass.simulation, Label(throttle)));
  }
  if (arguments.Has("--svg")) {
    ANNULUS_RETURN_IF_ERROR(WriteFileAtomically(arguments.Last("--svg", ""), StackSvg(pictures)));
  }
  if (arguments.Has("--json")) {
    std::printf("%s\n", Json(planned).c_str());
  } else {
    Print(planned);
  }
  return absl::OkStatus();
}

}  // namespace

Command PlanCommand() {
  return {{"plan",
           "CONFIG",
           "prints parameters, FLOPs, memory, the predicted step and the exchange of every layer",
           {{"--world", Option::Takes::kValue, "N", "number of ranks"},
            {"--gpus", Option::Takes::kValue, "N", "the same"},
            {"--fit", Option::Takes::kNothing, "",
             "searches the layout, micro-batch and recompute policy that step fastest on --gpus N"},
            {"--memory-gib", Option::Takes::kValue, "X",
             "--fit: memory of a rank (default: the machine profile's)"},
            {"--json", Option::Takes::kNothing, "", "prints JSON"},
            {"--set", Option::Takes::kValue, "PATH=VALUE", "overrides a field; repeatable"},
            {"--profile", Option::Takes::kValue, "FILE",
             "machine profile of annulus calibrate (default: parallel.exchange.profile, else assumed)"},
            {"--machine", Option::Takes::kValue, "FILE", "the same"},
            {"--choice", Option::Takes::kValue, "NAME",
             "shows this plan of the tables, or the first of this kind, not the fastest"},
            {"--svg", Option::Takes::kValue, "FILE", "draws the timelines of the plans shown"}}},
          Run};
}

}  // namespace annulus
