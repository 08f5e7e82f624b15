#pragma once

// Runs a study: every point of its grid is predicted, and measured where the machine has its ranks.
//
//   DIR/lock, DIR/study.resolved.textproto
//   DIR/points/ID/result.json       written once the point is finished; what makes a study resumable
//   DIR/points/ID/config.textproto  what its runs train
//   DIR/points/ID/run-0001/         a run directory of `annulus train`, with run-0001.log; a new one each
//   time DIR/points/ID/slurm.sbatch      measures the point; slurm-KEY-1/, .log and .failed are of its runs
//
// Results carry keys of what they depend on: a changed study measures and predicts again what changed.

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "annulus/study/study.h"
#include "annulus/train/config.h"

namespace annulus {

// A point of the grid with what runs it.
struct PlannedPoint {
  StudyPoint point;
  absl::Status refused;                        // why it makes no sense; the rest is then empty
  ResolvedConfig config;                       // of a measured run: short, without evaluation and checkpoints
  int64_t steps = 0, steps_between_saves = 0;  // of the whole run, for its goodput
  std::string layout;
};

// The product of all axes. `run_text`: contents of spec.run. InvalidArgument if no point makes sense, or two
// are the same run.
absl::StatusOr<std::vector<PlannedPoint>> StudyGrid(const StudySpec& spec, const std::string& run_text);

// Results before any point is run: those that are refused say why.
PointResult OpenResult(const PlannedPoint& planned);
// InvalidArgument or NotFound where no point that makes sense has a machine profile: why the first has none.
absl::StatusOr<StudyResults> OpenResults(const StudySpec& spec, const std::vector<PlannedPoint>& points);

struct Measurement {
  StepFigures figures;       // medians over steps and repeats
  double spread = 0;         // (slowest - fastest repeat) / median
  std::string devices = {};  // of all repeats, "4 x NVIDIA H200"; empty: the runs do not say
};
struct Prediction {
  StepFigures figures;
  std::optional<Goodput> goodput;
};

// What starts a job: launch/mpirun and the program, absolute paths.
struct ProgramPaths {
  std::string mpirun, program;
};
// This program, and launch/mpirun beside its folder (build/annulus, bin/annulus of an installed tree) or, for
// a build elsewhere, in the sources.
absl::StatusOr<ProgramPaths> FindProgram();

// What points can be measured on.
struct MeasuringMachine {
  ProgramPaths program;
  int64_t gpus = 0, cpu_ranks = 1;  // ranks that this host has
  struct Host {
    std::string name;
    int64_t ranks = 0;
  };
  std::vector<Host> hosts = {};  // of a hostfile; empty: this host alone
};
// Lines of "name slots=4", as mpirun reads them. `name` stands for the file in messages.
absl::StatusOr<std::vector<MeasuringMachine::Host>> ParseHostfile(const std::string& name,
                                                                  const std::string& text);

// Whether it has the point's hosts and ranks.
bool CanMeasure(const MeasuringMachine& machine, const PlannedPoint& planned);
// Trains on the point's ranks, spec.repeats times, in run directories of their own.
absl::StatusOr<Measurement> MeasurePoint(const StudySpec& spec, const MeasuringMachine& machine,
                                         const PlannedPoint& planned, const std::string& folder);

// The profile that the point is predicted by, for its hosts.
absl::StatusOr<MachineProfile> ProfileOf(const PlannedPoint& planned);
// ResourceExhausted where a rank has not the memory.
absl::StatusOr<Prediction> PredictPoint(const StudySpec& spec, const PlannedPoint& planned);
// What a prediction depends on besides the study and the point: the profile, this program, and masked
// documents of the data.
std::string PredictionInputs(const PlannedPoint& planned);

// What runs a point. `folder` is the point's and exists.
struct StudyHooks {
  std::function<bool(const PlannedPoint&)> can_measure;
  std::function<absl::StatusOr<Measurement>(const PlannedPoint&, const std::string& folder)> measure;
  std::function<absl::StatusOr<Prediction>(const PlannedPoint&)> predict;
  std::function<std::string(const PlannedPoint&)> prediction_inputs;
  std::function<void(const std::string&)> say;              // a line of progress
  std::function<absl::Status(const StudyResults&)> report;  // after each point that was run, and at the end
};

struct StudyRunOptions {
  std::string folder = {};  // DIR
  ProgramPaths program = {};
  std::string study_text = {};  // for study.resolved.textproto
  enum class Failed { kKeep, kRetry } failed = Failed::kKeep;
  std::string only = {};  // id of the one point to run; empty: all
  enum class Slurm { kNone, kWriteScripts } slurm = Slurm::kNone;
};

// Results of all points; of `open` (OpenResults) what is not of points counts. A point that fails does not
// end the study.
absl::StatusOr<StudyResults> RunStudy(const StudySpec& spec, const std::vector<PlannedPoint>& points,
                                      const StudyRunOptions& options, const StudyHooks& hooks,
                                      StudyResults open);

}  // namespace annulus
