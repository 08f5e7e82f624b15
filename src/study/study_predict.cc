// Predicting a point: a step by the simulator, and the goodput of the whole run where hosts fail.

#include "annulus/base/file.h"
#include "annulus/base/hash.h"
#include "annulus/model/params.h"
#include "annulus/study/study_run.h"
#include "annulus/train/exchange.h"
#include "annulus/train/placement.h"
#include "annulus/train/profile.h"
#include "annulus/train/report.h"
#include "step_cost_exchange.h"

namespace annulus {
namespace {

// A checkpoint holds parameters and both moments of AdamW, each in f32.
constexpr int64_t kCheckpointBytesPerElement = 12;

absl::Status CheckMemory(const StepFigures& figures, const MachineProfile& machine) {
  const int64_t needed = figures.memory_bytes();
  if (machine.memory_bytes == 0 || needed <= machine.memory_bytes) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(
      "memory: a rank is predicted to need ", FormatBytes(static_cast<double>(needed)), ", expected at most ",
      FormatBytes(static_cast<double>(machine.memory_bytes)), " (", MemoryText(figures.memory), ", other ",
      FormatBytes(static_cast<double>(figures.other_memory_bytes)), ")"));
}

absl::StatusOr<RunSpec> PlannedRun(const PlannedPoint& planned) {
  RunSpec run = planned.config.spec;
  ANNULUS_RETURN_IF_ERROR(ResolvePlannedDevice(&run));
  return run;
}

absl::StatusOr<MachineProfile> ProfileFor(const RunSpec& run, const StudyPoint& point) {
  ANNULUS_ASSIGN_OR_RETURN(MachineProfile machine, ProfileOf(run));
  const int64_t ranks = point.ranks / point.hosts, most = machine.network.ranks_per_host;
  if (most > 0 && ranks > most) {
    return Invalid("ranks_per_host=", ranks, ": expected at most ", most, ", the ranks of a host of ",
                   machine.device);
  }
  machine.network.ranks_per_host = point.hosts > 1 ? static_cast<int>(ranks) : 0;
  return machine;
}

// Whatever changes in the simulator, or in what it prices, is another program.
std::string ProgramHash() {
  const absl::StatusOr<MappedFile> program = MappedFile::Open("/proc/self/exe");
  return program.ok() ? Hex64(Hash64(program->bytes().data(), program->bytes().size())) : "";
}

}  // namespace

absl::StatusOr<MachineProfile> ProfileOf(const PlannedPoint& planned) {
  ANNULUS_ASSIGN_OR_RETURN(const RunSpec run, PlannedRun(planned));
  return ProfileFor(run, planned.point);
}

std::string PredictionInputs(const PlannedPoint& planned) {
  static const std::string program = ProgramHash();
  const absl::StatusOr<RunSpec> run = PlannedRun(planned);
  if (!run.ok()) return absl::StrCat(program, " ", run.status().message());
  const absl::StatusOr<MachineProfile> machine = ProfileFor(*run, planned.point);
  return absl::StrCat(program, " ", TypicalBatch(*run).note, " ",
                      machine.ok() ? ProfileText(*machine) : std::string(machine.status().message()));
}

absl::StatusOr<Prediction> PredictPoint(const StudySpec& spec, const PlannedPoint& planned) {
  ANNULUS_ASSIGN_OR_RETURN(const RunSpec run, PlannedRun(planned));
  ANNULUS_ASSIGN_OR_RETURN(const MachineProfile machine, ProfileFor(run, planned.point));
  const PlanEffort effort = EffortFor(run.parallel.cp);
  Prediction prediction;
  ANNULUS_ASSIGN_OR_RETURN(prediction.figures, PredictStep(run, machine, effort,
                                                           {.seed = spec.seed,
                                                            .jitter = spec.jitter,
                                                            .straggler_share = spec.straggler_share,
                                                            .straggler_slowdown = spec.straggler_slowdown}));
  ANNULUS_RETURN_IF_ERROR(CheckMemory(prediction.figures, machine));
  if (machine.reliability.failure_hours > 0) {
    prediction.goodput = SimulateGoodput(
        {.step_seconds = prediction.figures.step_seconds,
         .hosts = planned.point.hosts,
         .checkpoint_bytes = BuildParamTable(run.model).logical_elements() * kCheckpointBytesPerElement,
         .steps_between_saves = planned.steps_between_saves,
         .steps = spec.goodput_steps > 0 ? spec.goodput_steps : planned.steps,
         .reliability = machine.reliability,
         .seed = spec.seed});
  }
  return prediction;
}

}  // namespace annulus
