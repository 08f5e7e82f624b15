// `annulus plan`: what a configuration costs and how its attention layers exchange, without running it.

#include <algorithm>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>

#include "absl/strings/str_format.h"
#include "annulus/base/file.h"
#include "annulus/model/cost.h"
#include "annulus/parallel/attend_calls.h"
#include "annulus/parallel/mask.h"
#include "annulus/train/config.h"
#include "annulus/train/placement.h"
#include "annulus/train/report.h"
#include "annulus/train/trainer.h"
#include "commands.h"

namespace annulus {
namespace {

// Assumed machine; options override it. Not measured: predictions say so.
struct AssumedMachine {
  double rank_gflops;  // of attention
  double link_gbps;    // GB/s between ranks of one host
  double latency_us;   // of a message
};
constexpr AssumedMachine kCpuCore{.rank_gflops = 20, .link_gbps = 5, .latency_us = 20};
constexpr AssumedMachine kGpu{.rank_gflops = 500e3, .link_gbps = 340, .latency_us = 20};  // Hopper, NVLink

struct LayerPlan {
  int64_t window = 0;
  std::vector<size_t> layers;  // attention layers with this window
  ExchangePlan plan;
  Simulation simulation;
  std::vector<int64_t> bytes;              // sent per rank
  std::map<std::string, int64_t> kernels;  // calls of each, over all ranks
};

// "cudnn (causal block)"
std::string KernelFor(const RunSpec& spec, MaskShape shape) {
  const AttentionKernel kernel = ChooseAttentionKernel(
      {.device = spec.device == DeviceChoice::kCuda ? DeviceKind::kCuda : DeviceKind::kCpu,
       .dtype = DTypeOf(spec.compute),
       .dim = spec.model.head_dim,
       .v_dim = spec.model.head_dim,
       .mask_shape = shape,
       .determinism = spec.deterministic ? Determinism::kRequired : Determinism::kOff});
  const char* block = shape == MaskShape::kFull ? "full" : shape == MaskShape::kCausal ? "causal" : "masked";
  return absl::StrCat(Name(kernel), " (", block, " blocks)");
}

std::string KernelsText(const LayerPlan& layer) {
  std::string text;
  for (const auto& [name, calls] : layer.kernels) {
    absl::StrAppend(&text, text.empty() ? "" : ", ", calls, " x ", name);
  }
  return text;
}

// Sequences without documents: documents differ in every batch and only remove work.
LayerPlan MakeLayerPlan(const RunSpec& spec, const AssumedMachine& machine, int64_t window, Pass pass) {
  const SequenceLayout layout(spec.parallel.layout, spec.data.seq_len, static_cast<int>(spec.parallel.cp));
  const SequenceBatch sequences{.batch = 1, .lengths = {spec.data.seq_len}, .document_starts = {}};
  LayerPlan result;
  result.plan = BuildKvRing(MakeExchangeProblem(layout, sequences, window), pass);
  const double batch = static_cast<double>(spec.optim.micro_batch);
  const DType dtype = DTypeOf(spec.compute);
  // A pair costs 4 head_dim FLOPs a head forward (scores, values), 2.5 times that backward (five products).
  const double pair_flops = 4.0 * static_cast<double>(spec.model.heads * spec.model.head_dim) *
                            (pass == Pass::kForward ? 1.0 : 2.5);
  const double row_elements = batch * 2.0 * static_cast<double>(spec.model.kv_heads * spec.model.head_dim);
  const double kv_row_bytes = row_elements * static_cast<double>(SizeOf(dtype));
  const double grad_row_bytes = row_elements * static_cast<double>(SizeOf(AccumOf(dtype)));
  result.simulation =
      Simulate(result.plan, {.seconds_per_pair = batch * pair_flops / (machine.rank_gflops * 1e9),
                             .kv_row_bytes = kv_row_bytes,
                             .grad_row_bytes = grad_row_bytes,
                             .bytes_per_second = machine.link_gbps * 1e9,
                             .message_seconds = machine.latency_us * 1e-6,
                             .reduce_bytes_per_second = machine.link_gbps * 1e9});
  for (int cp_rank = 0; cp_rank < spec.parallel.cp; ++cp_rank) {
    result.bytes.push_back(BytesSent(result.plan, cp_rank, static_cast<int64_t>(kv_row_bytes),
                                     static_cast<int64_t>(grad_row_bytes)));
    const BoundsTable bounds = LocalBounds(layout, sequences, window, cp_rank);
    for (const Step& step : result.plan.ranks[static_cast<size_t>(cp_rank)].steps) {
      for (const AttendCall& call : CallsOf(layout, result.plan.problem, step, bounds, 1)) {
        ++result.kernels[KernelFor(spec, call.shape)];
      }
    }
  }
  return result;
}

std::vector<LayerPlan> PlansOf(const RunSpec& spec, const AssumedMachine& machine) {
  std::map<int64_t, std::vector<size_t>> by_window;
  for (size_t i = 0; i < spec.model.layers.size(); ++i) {
    if (spec.model.layers[i].kind == LayerKind::kAttention)
      by_window[spec.model.layers[i].window].push_back(i);
  }
  std::vector<LayerPlan> plans;
  for (const auto& [window, layers] : by_window) {
    for (Pass pass : {Pass::kForward, Pass::kBackward}) {
      plans.push_back(MakeLayerPlan(spec, machine, window, pass));
      plans.back().window = window;
      plans.back().layers = layers;
    }
  }
  return plans;
}

double Largest(const std::vector<double>& values) { return *std::max_element(values.begin(), values.end()); }
int64_t Largest(const std::vector<int64_t>& values) {
  return *std::max_element(values.begin(), values.end());
}

const char* PassName(Pass pass) { return pass == Pass::kForward ? "forward" : "backward"; }

std::string Json(const RunSpec& spec, const AssumedMachine& machine, const std::vector<LayerPlan>& plans) {
  const FlopsPerToken flops = TrainingFlops(spec.model, spec.data.seq_len);
  const MemoryPlan memory = PlanMemory(spec);
  nlohmann::ordered_json json;
  json["name"] = spec.name;
  json["parameters"] = BuildParamTable(spec.model).elements();
  json["flops_per_token"] = {{"causal", flops.causal}, {"full", flops.full}};
  json["mesh"] = {{"dp", spec.parallel.dp}, {"cp", spec.parallel.cp}, {"tp", spec.parallel.tp}};
  for (const MemoryPlan::Part& part : memory.parts()) json["memory_bytes_per_rank"][part.name] = part.bytes;
  json["memory_bytes_per_rank"]["total"] = memory.total();
  json["assumed_machine"] = {{"rank_gflops", machine.rank_gflops},
                             {"link_gbps", machine.link_gbps},
                             {"latency_us", machine.latency_us}};
  json["exchange"] = nlohmann::ordered_json::array();
  for (const LayerPlan& layer : plans) {
    json["exchange"].push_back({{"layers", layer.layers},
                                {"window", layer.window},
                                {"pass", PassName(layer.plan.pass)},
                                {"plan", layer.plan.name},
                                {"hash", HashOf(layer.plan)},
                                {"bytes_sent_per_rank", layer.bytes},
                                {"kernel_calls", layer.kernels},
                                {"predicted_seconds", layer.simulation.makespan},
                                {"predicted_exposed_seconds", layer.simulation.exposed}});
  }
  return json.dump(2);
}

void Print(const RunSpec& spec, const AssumedMachine& machine, const std::vector<LayerPlan>& plans) {
  const FlopsPerToken flops = TrainingFlops(spec.model, spec.data.seq_len);
  const MemoryPlan memory = PlanMemory(spec);
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
  std::printf(
      "assumed machine   %g GFLOP/s a rank, %g GB/s a link, %g us a message (not measured; see --help)\n",
      machine.rank_gflops, machine.link_gbps, machine.latency_us);
  if (spec.data.document_mask) {
    std::printf(
        "documents         not planned: they differ in every batch, and only remove work and bytes\n");
  }
  for (const LayerPlan& layer : plans) {
    const std::string window = layer.window == 0 ? "all keys" : absl::StrCat("window ", layer.window);
    std::printf(
        "\n%zu attention layers (%s), %s; each, per micro-batch: sent per rank at most %s, predicted %.3g "
        "ms, of "
        "which exposed exchange %.3g ms\n",
        layer.layers.size(), window.c_str(), PassName(layer.plan.pass), bytes(Largest(layer.bytes)).c_str(),
        layer.simulation.makespan * 1e3, Largest(layer.simulation.exposed) * 1e3);
    std::printf("kernel calls of all ranks: %s\n", KernelsText(layer).c_str());
    std::printf("%s", Timeline(layer.plan, layer.simulation).c_str());
  }
}

// A plan for GPUs can be made where there are none.
absl::Status PlanDevice(RunSpec* spec) {
  const bool gpu = spec->device == DeviceChoice::kCuda || spec->compute == ComputeType::kBF16;
  if (!gpu) return ResolveDevice(spec);
  spec->device = DeviceChoice::kCuda;
  return ResolveCompute(spec);
}

absl::Status Run(const Arguments& arguments, const std::string&) {
  ANNULUS_ASSIGN_OR_RETURN(const std::optional<int64_t> world, arguments.PositiveInt("--world"));
  ANNULUS_ASSIGN_OR_RETURN(const std::string text, ReadFile(arguments.operand()));
  ANNULUS_ASSIGN_OR_RETURN(ResolvedConfig config,
                           LoadConfig(arguments.operand(), text, arguments.All("--set"), world));
  ANNULUS_RETURN_IF_ERROR(PlanDevice(&config.spec));
  AssumedMachine machine = config.spec.device == DeviceChoice::kCuda ? kGpu : kCpuCore;
  ANNULUS_ASSIGN_OR_RETURN(machine.rank_gflops,
                           arguments.PositiveNumber("--rank_gflops", machine.rank_gflops));
  ANNULUS_ASSIGN_OR_RETURN(machine.link_gbps, arguments.PositiveNumber("--link_gbps", machine.link_gbps));
  ANNULUS_ASSIGN_OR_RETURN(machine.latency_us, arguments.PositiveNumber("--latency_us", machine.latency_us));
  // Without --world and parallel.dp the smallest world that the configuration asks for.
  config.spec.parallel.dp = std::max<int64_t>(1, config.spec.parallel.dp);
  const std::vector<LayerPlan> plans = PlansOf(config.spec, machine);
  for (const LayerPlan& layer : plans) ANNULUS_RETURN_IF_ERROR(Validate(layer.plan));
  if (arguments.Has("--json")) {
    std::printf("%s\n", Json(config.spec, machine, plans).c_str());
  } else {
    Print(config.spec, machine, plans);
  }
  return absl::OkStatus();
}

}  // namespace

Command PlanCommand() {
  return {{"plan",
           "CONFIG",
           "prints parameters, FLOPs, memory and the exchange of every attention layer",
           {{"--world", Option::Takes::kValue, "N", "number of ranks"},
            {"--json", Option::Takes::kNothing, "", "prints JSON"},
            {"--set", Option::Takes::kValue, "PATH=VALUE", "overrides a field; repeatable"},
            {"--rank_gflops", Option::Takes::kValue, "X",
             "attention rate of a rank for the prediction (default 20, on GPUs 500000)"},
            {"--link_gbps", Option::Takes::kValue, "X",
             "GB/s that a rank can send, and add up (default 5, on GPUs 340)"},
            {"--latency_us", Option::Takes::kValue, "X", "latency of a message (default 20)"}}},
          Run};
}

}  // namespace annulus
