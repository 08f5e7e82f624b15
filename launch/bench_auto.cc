// What plan = AUTO chooses beside the best that could be chosen: over a grid of layers every plan is timed,
// as `annulus bench plans` does for one. Whether results are right is for that one to say.
//
// Cases come in order of length, so that what is cut off early is what takes longest. Of plans that are the
// same work by the same transport (two ranks know only one ring) one is timed. Each is run once, then timed
// until its time is used up; then AUTO's choice and the fastest once more, right after each other, because
// the fastest of many measurements is fast by luck too.

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "annulus/train/measure.h"
#include "annulus/train/plan_exchange.h"
#include "bench_layer.h"

namespace annulus {
namespace {

constexpr double kPlanSeconds = 0.1;  // of timed runs of a plan; two are timed at least
constexpr double kFarSlower = 4;      // than AUTO's choice, as predicted
constexpr double kAsGood = 1.05;

struct Grid {
  std::vector<int64_t> lengths;
  std::vector<ContextAttentionShape> shapes;
  std::vector<std::string> masks;
  std::vector<LinkThrottle> throttles;
  int64_t document_length = 0;  // 0: an eighth of the length

  size_t cases() const { return lengths.size() * shapes.size() * masks.size() * throttles.size(); }
};

struct GridCase {
  int64_t length = 0;
  ContextAttentionShape shape;
  std::string mask;
  LinkThrottle throttle;
};

// ---- Options ------------------------------------------------------------------------------------

// "16/4"; "16" is 16/16.
absl::StatusOr<ContextAttentionShape> ParseHeads(const std::string& text) {
  ContextAttentionShape shape;
  const std::vector<std::string> parts = absl::StrSplit(text, '/');
  const bool read = parts.size() <= 2 && absl::SimpleAtoi(parts.front(), &shape.heads) &&
                    absl::SimpleAtoi(parts.back(), &shape.kv_heads);
  if (read && shape.heads > 0 && shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0) return shape;
  return Invalid("--heads=", text, ": expected H or H/KV, heads and KV heads that divide them");
}

absl::StatusOr<Grid> ReadGrid(const Arguments& arguments, const RunSpec& spec) {
  Grid grid;
  ANNULUS_ASSIGN_OR_RETURN(grid.lengths, ReadLengths(arguments, "8192,32768"));
  ANNULUS_ASSIGN_OR_RETURN(const int64_t dim, arguments.PositiveInt("--dim", 128));
  ANNULUS_ASSIGN_OR_RETURN(const int64_t v_dim, arguments.PositiveInt("--v_dim", dim));
  for (const std::string& text : OptionList(arguments, "--heads", "16/16,16/4,16/1")) {
    ANNULUS_ASSIGN_OR_RETURN(ContextAttentionShape shape, ParseHeads(text));
    shape.head_dim = dim, shape.v_head_dim = v_dim;
    shape.scale = 1 / std::sqrt(static_cast<double>(dim));
    ANNULUS_RETURN_IF_ERROR(CheckLayer(shape, grid.lengths.back(), "--lengths", spec));
    grid.shapes.push_back(shape);
  }
  for (const std::string& mask : OptionList(arguments, "--masks", "causal,full,documents")) {
    if (mask != "causal" && mask != "full" && mask != "documents")
      return Invalid("--masks=", mask, ": expected causal, full, documents or several of them");
    grid.masks.push_back(mask);
  }
  ANNULUS_ASSIGN_OR_RETURN(grid.throttles, ReadThrottles(arguments, "0"));
  ANNULUS_ASSIGN_OR_RETURN(grid.document_length, arguments.PositiveInt("--document_length", 0));
  return grid;
}

// ---- Measurements -------------------------------------------------------------------------------

struct TimedPlan {
  PlanCandidate plan;
  double seconds = 0;
};

struct PassResult {
  Pass pass = Pass::kForward;
  TimedPlan chosen, fastest;
  size_t timed = 0;
  size_t same = 0;      // as another one that was timed
  size_t left_out = 0;  // predicted far slower

  double ratio() const { return chosen.seconds / fastest.seconds; }
};

struct CaseResult {
  std::vector<PassResult> passes;

  // Of a layer's whole step.
  double ratio() const {
    double chosen = 0, fastest = 0;
    for (const PassResult& pass : passes) chosen += pass.chosen.seconds, fastest += pass.fastest.seconds;
    return chosen / fastest;
  }
};

// What is timed of one pass, AUTO's choice first.
struct Field {
  std::vector<PlanCandidate> plans;
  size_t same = 0, left_out = 0;
};

Field FieldOf(const AttentionCase& layer, Pass pass, const std::vector<PlanCandidate>& ranked,
              double slowest) {
  Field field;
  std::vector<ExchangePlan> known;  // of field.plans
  for (const PlanCandidate& candidate : ranked) {
    if (!candidate.refused.ok()) break;
    if (candidate.seconds > slowest) {
      ++field.left_out;
      continue;
    }
    absl::StatusOr<ExchangePlan> plan =
        BuildPlan(MakeExchangeProblem(layer.layout, layer.sequences, layer.window, layer.heads,
                                      layer.kv_heads, ChunkParts(candidate.choice)),
                  pass, candidate.choice);
    ANNULUS_CHECK(plan.ok()) << candidate.name << ": " << plan.status();
    bool same = false;
    for (size_t i = 0; i < known.size() && !same; ++i) {
      same = field.plans[i].transport == candidate.transport && known[i].problem == plan->problem &&
             known[i].groups == plan->groups && known[i].ranks == plan->ranks;
    }
    if (same) {
      ++field.same;
      continue;
    }
    field.plans.push_back(candidate);
    known.push_back(*std::move(plan));
  }
  return field;
}

// Cases of one length and one shape share the layer, whatever the mask.
class LayerRuns {
 public:
  LayerRuns(Bench& bench, int64_t length, const ContextAttentionShape& shape)
      : bench_(bench),
        layout_(bench.spec.parallel.layout, length, bench.machine.mesh.shape.cp),
        layer_(bench, shape) {}

  absl::Status CheckMemory() const { return layer_.CheckMemory(layout_); }
  absl::Status Make() { return layer_.Make(layout_, bench_.machine.mesh.at.cp); }

  // Collective.
  absl::StatusOr<CaseResult> Measure(const GridCase& at, const SequenceBatch& sequences,
                                     std::shared_ptr<ExchangeTransports> transports) {
    options_ = ExchangeFor(bench_, at.shape);
    options_.throttle = at.throttle;
    sequences_ = sequences;
    transports_ = std::move(transports);
    CaseResult result;
    // Backward reads what forward left.
    for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
      ANNULUS_ASSIGN_OR_RETURN(PassResult measured, MeasurePass(pass));
      result.passes.push_back(std::move(measured));
    }
    return result;
  }

 private:
  absl::StatusOr<PassResult> MeasurePass(Pass pass) {
    const AttentionCase layer = CaseOf(bench_, layout_, sequences_, layer_.shape());
    ANNULUS_ASSIGN_OR_RETURN(const PlannedPass planned, Agreed(bench_, PlanPass(layer, pass, options_)));
    const PlanCandidate& chosen = planned.candidates.front();
    const bool all = bench_.arguments.Has("--all");
    const Field field =
        FieldOf(layer, pass, planned.candidates, all ? HUGE_VAL : kFarSlower * chosen.seconds);
    PassResult result{.pass = pass,
                      .chosen = {},
                      .fastest = {},
                      .timed = field.plans.size(),
                      .same = field.same,
                      .left_out = field.left_out};
    for (const PlanCandidate& plan : field.plans) {
      ANNULUS_ASSIGN_OR_RETURN(const double seconds, Seconds(pass, plan));
      if (&plan == &field.plans.front()) result.chosen = result.fastest = {plan, seconds};
      if (seconds < result.fastest.seconds) result.fastest = {plan, seconds};
    }
    if (result.fastest.plan.name == result.chosen.plan.name &&
        result.fastest.plan.transport == result.chosen.plan.transport) {
      return result;
    }
    for (TimedPlan* again : {&result.chosen, &result.fastest}) {
      ANNULUS_ASSIGN_OR_RETURN(again->seconds, Seconds(pass, again->plan));
    }
    if (result.chosen.seconds < result.fastest.seconds) result.fastest = result.chosen;
    return result;
  }

  // Median, of the slowest rank.
  absl::StatusOr<double> Seconds(Pass pass, const PlanCandidate& plan) {
    ExchangeOptions options = options_;
    options.forward = options.backward = {plan.choice};
    options.forward_parts = options.backward_parts = {};
    options.transport = plan.transport;
    AttentionGeometry geometry(layout_, bench_.machine.mesh.cp, options, transports_);
    geometry.SetBatch(sequences_);
    ExchangeStats stats;
    return SecondsOf(bench_.ctx(), bench_.machine.mesh.world,
                     {.warm_ups = 1, .timed = bench_.repeats, .seconds = kPlanSeconds}, [&] {
                       return pass == Pass::kForward ? layer_.Forward(geometry, &stats)
                                                     : layer_.Backward(geometry, &stats);
                     });
  }

  Bench& bench_;
  const SequenceLayout layout_;
  BenchLayer layer_;
  ExchangeOptions options_;
  SequenceBatch sequences_;
  std::shared_ptr<ExchangeTransports> transports_;
};

// ---- Report -------------------------------------------------------------------------------------

std::string CaseText(const GridCase& at) {
  return absl::StrFormat("%d tokens, heads %d/%d, %s, %s", at.length, at.shape.heads, at.shape.kv_heads,
                         at.mask, at.throttle.bytes_per_second > 0 ? Label(at.throttle) : "full speed");
}

nlohmann::ordered_json PlanJson(const TimedPlan& timed) {
  return {{"plan", timed.plan.name},
          {"transport", std::string(Name(timed.plan.transport))},
          {"predicted_ms", timed.plan.seconds * 1e3},
          {"measured_ms", timed.seconds * 1e3}};
}

nlohmann::ordered_json CaseJson(const GridCase& at, const CaseResult& result) {
  nlohmann::ordered_json json = {{"length", at.length},
                                 {"heads", at.shape.heads},
                                 {"kv_heads", at.shape.kv_heads},
                                 {"mask", at.mask},
                                 {"throttle_gb_per_second", at.throttle.bytes_per_second / 1e9}};
  for (const PassResult& pass : result.passes) {
    json[Name(pass.pass)] = {{"auto", PlanJson(pass.chosen)},
                             {"fastest", PlanJson(pass.fastest)},
                             {"ratio", pass.ratio()},
                             {"timed", pass.timed},
                             {"same", pass.same},
                             {"not_timed", pass.left_out}};
  }
  json["ratio"] = result.ratio();
  return json;
}

std::string PassText(const PassResult& result) {
  const auto text = [](const TimedPlan& timed) {
    return absl::StrFormat("%s by %s %.3f ms", timed.plan.name, Name(timed.plan.transport),
                           timed.seconds * 1e3);
  };
  std::string line = absl::StrCat(Name(result.pass), " ", text(result.chosen));
  if (result.ratio() > 1) absl::StrAppend(&line, ", fastest ", text(result.fastest));
  return absl::StrCat(line, absl::StrFormat(" x%.3f of %d", result.ratio(), result.timed),
                      result.left_out > 0 ? absl::StrFormat(" (%d not timed)", result.left_out) : "");
}

void PrintCase(const Bench& bench, const GridCase& at, const CaseResult& result) {
  if (bench.arguments.Has("--json")) return bench.Report(CaseJson(at, result));
  if (bench.machine.mesh.world.rank() != 0) return;
  std::printf("%s: x%.3f; %s; %s\n", CaseText(at).c_str(), result.ratio(), PassText(result.passes[0]).c_str(),
              PassText(result.passes[1]).c_str());
  std::fflush(stdout);
}

// Of all cases.
class Summary {
 public:
  void Add(const GridCase& at, const CaseResult& result) {
    ++cases_;
    good_ += result.ratio() <= kAsGood;
    for (const PassResult& pass : result.passes) {
      ++passes_;
      good_passes_ += pass.ratio() <= kAsGood;
    }
    if (result.ratio() < worst_) return;
    worst_ = result.ratio();
    worst_case_ = CaseText(at);
  }

  void Print(const Bench& bench) const {
    if (bench.arguments.Has("--json")) {
      return bench.Report({{"cases", cases_},
                           {"within_5_percent", static_cast<double>(good_) / cases_},
                           {"passes_within_5_percent", static_cast<double>(good_passes_) / passes_},
                           {"worst_ratio", worst_},
                           {"worst_case", worst_case_}});
    }
    if (bench.machine.mesh.world.rank() != 0) return;
    std::printf(
        "AUTO within 5%% of the fastest in %d of %d cases (%.0f%%), in %d of %d passes; worst x%.3f: %s\n",
        good_, cases_, 100.0 * good_ / cases_, good_passes_, passes_, worst_, worst_case_.c_str());
  }

 private:
  int cases_ = 0, good_ = 0, passes_ = 0, good_passes_ = 0;
  double worst_ = 0;
  std::string worst_case_;
};

void PrintHeading(const Bench& bench, const Grid& grid) {
  if (bench.arguments.Has("--json") || bench.machine.mesh.world.rank() != 0) return;
  std::printf("%d cases on %d ranks, predicted by %s\n", static_cast<int>(grid.cases()),
              bench.machine.mesh.cp.size(),
              ProfileSource(bench.spec.parallel.exchange, bench.machine.exchange.machine).c_str());
  if (!bench.arguments.Has("--all")) {
    std::printf(
        "plans that are predicted to take over %g times as long as AUTO's are not timed (--all: are)\n",
        kFarSlower);
  }
  std::fflush(stdout);
}

absl::Status Run(Bench& bench, const Grid& grid) {
  PrintHeading(bench, grid);
  std::vector<std::shared_ptr<ExchangeTransports>> transports;
  for (const LinkThrottle throttle : grid.throttles)
    transports.push_back(std::make_shared<ExchangeTransports>(bench.machine.mesh.cp, throttle));
  Communicator world = bench.machine.mesh.world;
  Summary summary;
  for (const int64_t length : grid.lengths) {
    const int64_t mean = grid.document_length > 0 ? grid.document_length : std::max<int64_t>(1, length / 8);
    for (const ContextAttentionShape& shape : grid.shapes) {
      ArenaScope scope(bench.ctx().saved);
      LayerRuns runs(bench, length, shape);
      ANNULUS_RETURN_IF_ERROR(runs.CheckMemory());
      ANNULUS_RETURN_IF_ERROR(world.AgreeOk(runs.Make()));
      for (const std::string& mask : grid.masks) {
        const SequenceBatch sequences =
            PackedSequence(bench.spec.seed, length, mask == "documents" ? mean : 0,
                           mask == "full" ? Visibility::kFull : Visibility::kCausal);
        for (size_t i = 0; i < grid.throttles.size(); ++i) {
          const GridCase at{.length = length, .shape = shape, .mask = mask, .throttle = grid.throttles[i]};
          ANNULUS_ASSIGN_OR_RETURN(const CaseResult result, runs.Measure(at, sequences, transports[i]));
          PrintCase(bench, at, result);
          summary.Add(at, result);
        }
      }
    }
  }
  summary.Print(bench);
  return absl::OkStatus();
}

absl::StatusOr<BenchRun> Plan(const Arguments& arguments, const RunSpec& spec) {
  ANNULUS_ASSIGN_OR_RETURN(const Grid grid, ReadGrid(arguments, spec));
  return BenchRun([grid](Bench& bench) { return Run(bench, grid); });
}

}  // namespace

BenchKind AutoBench() {
  return {.name = "auto",
          .options = {"--lengths", "--heads", "--dim", "--v_dim", "--masks", "--document_length",
                      "--throttles", "--profile", "--transport", "--all"},
          .fields = LayerFields(),
          .plan = Plan};
}

}  // namespace annulus
