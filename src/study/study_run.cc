#include "annulus/study/study_run.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "annulus/base/file.h"
#include "annulus/train/report.h"
#include "study_json.h"
#include "study_key.h"
#include "study_slurm.h"

namespace annulus {
namespace {

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// What is known of a point and what is still to be done.
struct Work {
  StoredPoint stored;
  bool measure = false, predict = false;
  bool collected = false;  // measured by jobs of Slurm, or failed there: to be written down
  bool open() const { return measure || predict || collected; }
};

// Times of what was done, for how long the rest will take.
class Pace {
 public:
  void Add(const Work& work, double seconds) {
    double* sum = work.measure ? &measured_seconds_ : &predicted_seconds_;
    *sum += seconds;
    ++(work.measure ? measured_ : predicted_);
  }
  double Left(int64_t measurements, int64_t predictions) const {
    const double one_measured = measured_ > 0 ? measured_seconds_ / static_cast<double>(measured_) : 0;
    const double one_predicted = predicted_ > 0 ? predicted_seconds_ / static_cast<double>(predicted_) : 0;
    return static_cast<double>(measurements) * one_measured +
           static_cast<double>(predictions) * one_predicted;
  }

 private:
  double measured_seconds_ = 0, predicted_seconds_ = 0;
  int64_t measured_ = 0, predicted_ = 0;
};

class StudyRun {
 public:
  StudyRun(const StudySpec& spec, const std::vector<PlannedPoint>& points, const StudyRunOptions& options,
           const StudyHooks& hooks, StudyResults results)
      : spec_(spec), points_(points), options_(options), hooks_(hooks), results_(std::move(results)) {}

  absl::StatusOr<StudyResults> Run();

 private:
  std::string FolderOf(const PlannedPoint& planned) const {
    return absl::StrCat(options_.folder, "/points/", planned.point.id);
  }
  void ForgetStale(const PlannedPoint& planned, StoredPoint* stored) const;
  absl::StatusOr<Work> LookAt(const PlannedPoint& planned) const;
  absl::Status RunPoint(size_t index);
  void Predict(const PlannedPoint& planned, StoredPoint* stored) const;
  void SayProgress(size_t index) const;
  absl::Status WriteSlurm() const;

  const StudySpec& spec_;
  const std::vector<PlannedPoint>& points_;
  const StudyRunOptions& options_;
  const StudyHooks& hooks_;
  StudyResults results_;
  std::vector<Work> work_;
  Pace pace_;
};

// State and reason follow from what there is.
void Settle(Work* work) {
  PointResult& result = work->stored.result;
  const std::string& measurement_error = work->stored.measurement_error;
  const std::string& prediction_error = work->stored.prediction_error;
  result.reason = !measurement_error.empty() ? measurement_error
                  : result.measured && !prediction_error.empty()
                      ? absl::StrCat("not predicted: ", prediction_error)
                      : prediction_error;
  const bool known = result.measured || result.predicted;
  const bool failed = !measurement_error.empty() || (!known && !prediction_error.empty());
  const bool refused = measurement_error.empty() && absl::StartsWith(prediction_error, kRefusedText);
  result.state = work->measure || work->predict ? PointState::kOpen
                 : failed                       ? refused ? PointState::kRefused : PointState::kFailed
                 : known                        ? PointState::kDone
                                                : PointState::kOpen;
}

void Take(absl::StatusOr<Measurement> measurement, StoredPoint* stored) {
  if (!measurement.ok()) {
    stored->measurement_error = std::string(measurement.status().message());
    return;
  }
  stored->result.measured = std::move(measurement->figures);
  stored->result.measured_spread = measurement->spread;
  stored->result.measured_on = std::move(measurement->devices);
}

// What an earlier start left of the point; nothing where it left nothing that can be read.
absl::StatusOr<StoredPoint> ReadStored(const std::string& folder) {
  const absl::StatusOr<std::string> text = ReadFile(folder + "/result.json");
  if (!text.ok() && !absl::IsNotFound(text.status())) return text.status();
  absl::StatusOr<StoredPoint> parsed = text.ok() ? ParseStoredPoint(*text) : absl::StatusOr<StoredPoint>();
  return parsed.ok() ? *std::move(parsed) : StoredPoint();
}

// Forgets what depends on something that has changed since.
void StudyRun::ForgetStale(const PlannedPoint& planned, StoredPoint* stored) const {
  const std::string runs = RunTextOf(planned);
  const std::string measurement = MeasurementKey(spec_, runs);
  const std::string prediction = PredictionKey(spec_, planned, runs, hooks_.prediction_inputs(planned));
  const bool retry = options_.failed == StudyRunOptions::Failed::kRetry;
  const bool remeasure = std::exchange(stored->measurement_key, measurement) != measurement;
  const bool repredict = std::exchange(stored->prediction_key, prediction) != prediction;
  if (remeasure) stored->result.measured.reset();
  if (remeasure) stored->result.measured_on.clear();
  if (remeasure || retry) stored->measurement_error.clear();
  if (repredict) stored->result.predicted.reset();
  if (repredict) stored->result.goodput.reset();
  if (repredict || retry) stored->prediction_error.clear();
}

absl::StatusOr<Work> StudyRun::LookAt(const PlannedPoint& planned) const {
  Work work;
  PointResult& result = work.stored.result;
  const PointResult open = OpenResult(planned);
  if (!planned.refused.ok()) {
    result = open;
    return work;
  }
  ANNULUS_ASSIGN_OR_RETURN(work.stored, ReadStored(FolderOf(planned)));
  ForgetStale(planned, &work.stored);
  result.point = open.point;
  result.machine = open.machine;
  result.layout = open.layout;
  const RunSpec& run = planned.config.spec;
  result.tokens_per_step = run.optim.sequences_per_step * run.data.seq_len;

  const bool wanted = options_.only.empty() || options_.only == planned.point.id;
  const bool unmeasured = wanted && !result.measured && work.stored.measurement_error.empty();
  if (unmeasured) {
    const SlurmRuns runs{.spec = spec_, .key = work.stored.measurement_key, .folder = FolderOf(planned)};
    if (options_.failed == StudyRunOptions::Failed::kRetry) ANNULUS_RETURN_IF_ERROR(ForgetFailures(runs));
    absl::StatusOr<std::optional<Measurement>> collected = Collect(runs);
    work.collected = !collected.ok() || collected->has_value();
    if (!collected.ok()) Take(collected.status(), &work.stored);
    if (collected.ok() && collected->has_value()) Take(**std::move(collected), &work.stored);
  }
  work.measure = unmeasured && !work.collected && hooks_.can_measure(planned);
  work.predict = wanted && !result.predicted && work.stored.prediction_error.empty();
  Settle(&work);
  return work;
}

void StudyRun::Predict(const PlannedPoint& planned, StoredPoint* stored) const {
  absl::StatusOr<Prediction> prediction = hooks_.predict(planned);
  if (!prediction.ok()) {
    const bool refused = absl::IsResourceExhausted(prediction.status());
    stored->prediction_error =
        absl::StrCat(refused ? kRefusedText : "", std::string(prediction.status().message()));
    return;
  }
  stored->result.predicted = std::move(prediction->figures);
  stored->result.goodput = prediction->goodput;
}

absl::Status StudyRun::RunPoint(size_t index) {
  const PlannedPoint& planned = points_[index];
  Work& work = work_[index];
  const std::string folder = FolderOf(planned);
  const double start = Now();
  ANNULUS_RETURN_IF_ERROR(MakeDirectories(folder));
  if (work.predict) Predict(planned, &work.stored);
  if (work.measure) {
    ANNULUS_RETURN_IF_ERROR(WriteFileAtomically(folder + "/config.textproto", planned.config.text));
    Take(hooks_.measure(planned, folder), &work.stored);
  }
  pace_.Add(work, Now() - start);
  work.measure = work.predict = work.collected = false;
  Settle(&work);
  ANNULUS_RETURN_IF_ERROR(WriteFileAtomically(folder + "/result.json", StoredPointJson(work.stored)));
  results_.points[index] = work.stored.result;
  SayProgress(index);
  return hooks_.report(results_);
}

std::string StepTime(const StepFigures& figures) {
  const double seconds = figures.step_seconds;
  return seconds < 1 ? absl::StrFormat("%.4g ms", seconds * 1e3) : absl::StrFormat("%.4g s", seconds);
}

void StudyRun::SayProgress(size_t index) const {
  const PointResult& result = results_.points[index];
  std::string text =
      absl::StrFormat("point %d/%d %s | %s", index + 1, points_.size(), result.point.id, result.layout);
  if (result.state == PointState::kFailed) {
    absl::StrAppend(&text, " | FAILED: ", result.reason);
  } else if (result.state == PointState::kRefused) {
    absl::StrAppend(&text, " | ", result.reason);
  } else {
    if (result.measured) absl::StrAppend(&text, " | measured ", StepTime(*result.measured));
    if (result.predicted) absl::StrAppend(&text, " | predicted ", StepTime(*result.predicted));
    if (!result.reason.empty()) absl::StrAppend(&text, " | ", result.reason);
  }
  const auto measurements =
      std::count_if(work_.begin(), work_.end(), [](const Work& work) { return work.measure; });
  const auto predictions = std::count_if(work_.begin(), work_.end(),
                                         [](const Work& work) { return !work.measure && work.predict; });
  if (measurements + predictions > 0) {
    absl::StrAppend(&text, " | ETA ", FormatDuration(pace_.Left(measurements, predictions)));
  }
  hooks_.say(text);
}

// Of points that could be measured elsewhere, and have not failed there.
absl::Status StudyRun::WriteSlurm() const {
  std::vector<std::string> scripts;
  for (size_t i = 0; i < points_.size(); ++i) {
    const PlannedPoint& planned = points_[i];
    const PointResult& result = results_.points[i];
    const StoredPoint& stored = work_[i].stored;
    const bool wanted = options_.only.empty() || options_.only == planned.point.id;
    const bool known = result.measured || !stored.measurement_error.empty();
    if (!wanted || !planned.refused.ok() || known || hooks_.can_measure(planned)) continue;
    const SlurmRuns runs{.spec = spec_, .key = stored.measurement_key, .folder = FolderOf(planned)};
    ANNULUS_ASSIGN_OR_RETURN(scripts.emplace_back(), WriteSlurmScript(runs, planned, options_.program));
  }
  return WriteSubmitAll(options_.folder, scripts);
}

absl::StatusOr<StudyResults> StudyRun::Run() {
  results_.points.clear();
  for (const PlannedPoint& planned : points_) {
    ANNULUS_ASSIGN_OR_RETURN(Work work, LookAt(planned));
    results_.points.push_back(work.stored.result);
    work_.push_back(std::move(work));
  }
  for (size_t i = 0; i < points_.size(); ++i) {
    if (work_[i].open()) ANNULUS_RETURN_IF_ERROR(RunPoint(i));
  }
  if (options_.slurm == StudyRunOptions::Slurm::kWriteScripts) ANNULUS_RETURN_IF_ERROR(WriteSlurm());
  ANNULUS_RETURN_IF_ERROR(hooks_.report(results_));
  return results_;
}

}  // namespace

absl::StatusOr<StudyResults> RunStudy(const StudySpec& spec, const std::vector<PlannedPoint>& points,
                                      const StudyRunOptions& options, const StudyHooks& hooks,
                                      StudyResults open) {
  const auto is_only = [&](const PlannedPoint& planned) { return planned.point.id == options.only; };
  if (!options.only.empty() && std::none_of(points.begin(), points.end(), is_only)) {
    return Invalid("--point=", options.only, ": expected the id of a point, such as ",
                   points.front().point.id);
  }
  ANNULUS_RETURN_IF_ERROR(MakeDirectories(options.folder + "/points"));
  absl::StatusOr<FileLock> lock =
      FileLock::Take(options.folder + "/lock", absl::StrCat("a study, pid ", getpid()));
  ANNULUS_RETURN_IF_ERROR(Prefixed(lock.status(), "--out: expected no other study in it: "));
  ANNULUS_RETURN_IF_ERROR(
      WriteFileAtomically(options.folder + "/study.resolved.textproto", options.study_text));
  return StudyRun(spec, points, options, hooks, std::move(open)).Run();
}

}  // namespace annulus
