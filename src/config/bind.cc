#include "bind.h"

#include "absl/strings/match.h"
#include "annulus/base/nearest.h"
#include "bind_exchange.h"
#include "bind_model.h"
#include "section.h"

namespace annulus::config {
namespace {

using Bound = RealRange::Bound;

// Bounds on sizes are far above any use; they keep the products that later code forms (bytes, tokens of a
// run) inside 64 bits.
constexpr IntRange kCount{0, int64_t{1} << 40};
constexpr IntRange kSteps{1, int64_t{1} << 32};
constexpr IntRange kWarmup{0, int64_t{1} << 32};
constexpr IntRange kSequences{1, int64_t{1} << 24};
constexpr RealRange kFraction{0.0, 1.0, Bound::kClosed, Bound::kOpen};
constexpr RealRange kRatio{0.0, 1.0};
constexpr RealRange kPositive{0.0, 1e9, Bound::kOpen};
constexpr RealRange kNotNegative{0.0, 1e9};
constexpr size_t kMostSources = 1000;

SourceSpec BindSource(const Section& source) {
  SourceSpec out;
  source.Real("weight", Presence::kOptional, kPositive, &out.weight);
  const std::string kind = source.Chosen("source");
  if (kind == "text") {
    out.format = SourceFormat::kText;
    const Section text = source.Child("text");
    text.Path("path", Presence::kRequired, &out.path);
    text.String("document_separator", Presence::kOptional, &out.document_separator);
  } else if (kind == "megatron") {
    out.format = SourceFormat::kMegatron;
    source.Child("megatron").Path("prefix", Presence::kRequired, &out.path);
  } else if (kind == "llmc") {
    out.format = SourceFormat::kLlmC;
    const Section llmc = source.Child("llmc");
    llmc.Path("path", Presence::kRequired, &out.path);
    llmc.Int("document_start_token", Presence::kOptional, {-1, kVocabularyRange.high - 1},
             &out.document_start_token);
  } else {
    source.provenance()->Missing(source.path(), "one of text { path }, megatron { prefix }, llmc { path }");
  }
  return out;
}

std::vector<SourceSpec> BindSources(const Section& data, const std::string& name) {
  const std::vector<Section> sources = data.Children(name);
  std::vector<SourceSpec> out;
  if (sources.size() > kMostSources) {
    data.provenance()->Refuse(data.PathOf(name), absl::StrCat(sources.size(), " sources"),
                              absl::StrCat("expected at most ", kMostSources));
    return out;
  }
  for (const Section& source : sources) out.push_back(BindSource(source));
  return out;
}

std::vector<annulus::RecallTask> BindTasks(const Section& recall, const std::string& name) {
  std::vector<annulus::RecallTask> out;
  for (const Section& task : recall.Children(name)) {
    annulus::RecallTask& bound = out.emplace_back();
    task.Int("length", Presence::kRequired, kLengthRange, &bound.length);
    task.Int("pairs", Presence::kRequired, kLengthRange, &bound.pairs);
  }
  return out;
}

RecallSpec BindRecall(const Section& recall) {
  RecallSpec out;
  out.tasks = BindTasks(recall, "task");
  if (out.tasks.empty()) {
    recall.provenance()->Missing(recall.PathOf("task"), "at least one, such as task { length: 64 pairs: 4 }");
  }
  out.validation_tasks = BindTasks(recall, "validation_task");
  recall.Int("train_sequences", Presence::kOptional, {1, kCount.high}, &out.train_sequences);
  recall.Int("validation_sequences", Presence::kOptional, kCount, &out.validation_sequences);
  return out;
}

void BindData(const Section& data, DataSpec* out) {
  out->train = BindSources(data, "train");
  out->validation = BindSources(data, "validation");
  if (data.Has("recall")) {
    out->recall = BindRecall(data.Child("recall"));
  } else if (data.Children("train").empty()) {
    data.provenance()->Missing(data.PathOf("train"),
                               "at least one source, such as train { text { path: \"...\" } }");
  }
  data.Real("validation_fraction", Presence::kOptional, kFraction, &out->validation_fraction);
  data.Int("seq_len", Presence::kRequired, kLengthRange, &out->seq_len);
  data.Bool("document_mask", &out->document_mask);
  data.Enum<Packing>("packing", {{"STREAM", Packing::kStream}, {"DOCUMENTS", Packing::kDocuments}},
                     &out->packing);
}

void BindParallel(const Section& parallel, ParallelSpec* out) {
  parallel.Int("cp", Presence::kOptional, kRanksRange, &out->cp);
  parallel.Int("tp", Presence::kOptional, kRanksRange, &out->tp);
  out->dp = 0;
  if (parallel.Has("dp")) parallel.Int("dp", Presence::kRequired, kRanksRange, &out->dp);
  parallel.Enum<LayoutKind>("layout",
                            {{"CONTIGUOUS", LayoutKind::kContiguous},
                             {"ZIGZAG", LayoutKind::kZigzag},
                             {"STRIPED", LayoutKind::kStriped}},
                            &out->layout);
  BindExchange(parallel.Child("exchange"), &out->exchange);
}

void BindSchedule(const Section& schedule, ScheduleSpec* out) {
  const std::string kind = schedule.Chosen("kind");
  if (kind == "constant") {
    out->kind = ScheduleKind::kConstant;
    schedule.Child(kind).Int("warmup_steps", Presence::kOptional, kWarmup, &out->warmup_steps);
  } else if (kind == "warmup_stable_decay") {
    out->kind = ScheduleKind::kWarmupStableDecay;
    const Section decay = schedule.Child(kind);
    decay.Int("warmup_steps", Presence::kOptional, kWarmup, &out->warmup_steps);
    decay.Int("decay_steps", Presence::kRequired, kSteps, &out->decay_steps);
    decay.Real("final_ratio", Presence::kOptional, kRatio, &out->final_ratio);
  } else {
    out->kind = ScheduleKind::kCosine;
    const Section cosine = schedule.Child("cosine");
    cosine.Int("warmup_steps", Presence::kOptional, kWarmup, &out->warmup_steps);
    cosine.Real("final_ratio", Presence::kOptional, kRatio, &out->final_ratio);
  }
}

// sequences_per_step as given, or from tokens_per_step.
void BindBatch(const Section& optim, int64_t seq_len, int64_t* sequences) {
  if (optim.Chosen("batch") != "tokens_per_step") {
    return optim.Int("sequences_per_step", Presence::kRequired, kSequences, sequences);
  }
  int64_t tokens = 0;
  optim.Int("tokens_per_step", Presence::kRequired, {1, kSequences.high * kLengthRange.high}, &tokens);
  if (tokens == 0 || seq_len == 0) return;  // already refused
  const std::string path = optim.PathOf("tokens_per_step");
  if (tokens % seq_len != 0) {
    optim.provenance()->Refuse(
        path, absl::StrCat(tokens),
        absl::StrCat("expected a multiple of data.seq_len=", seq_len, NearestMultiple(tokens, seq_len)));
    return;
  }
  if (tokens / seq_len > kSequences.high) {
    optim.provenance()->Refuse(
        path, absl::StrCat(tokens),
        absl::StrCat("expected at most ", kSequences.high, " sequences of data.seq_len=", seq_len,
                     " (nearest valid value ", kSequences.high * seq_len, ")"));
    return;
  }
  *sequences = tokens / seq_len;
  optim.provenance()->MarkUnset(
      optim.PathOf("sequences_per_step"),
      absl::StrCat("sequences_per_step: ", *sequences, " (derived: tokens_per_step / data.seq_len)"));
}

void BindOptim(const Section& optim, int64_t seq_len, OptimSpec* out) {
  if (const auto adamw = optim.RequiredChild("adamw")) {
    adamw->Real("lr", Presence::kRequired, kPositive, &out->lr);
    adamw->Real("beta1", Presence::kOptional, kFraction, &out->beta1);
    adamw->Real("beta2", Presence::kOptional, kFraction, &out->beta2);
    adamw->Real("eps", Presence::kOptional, kPositive, &out->eps);
    adamw->Real("weight_decay", Presence::kOptional, kNotNegative, &out->weight_decay);
  }
  BindSchedule(optim.Child("schedule"), &out->schedule);
  optim.Real("clip_norm", Presence::kOptional, kNotNegative, &out->clip_norm);
  optim.Int("steps", Presence::kRequired, kSteps, &out->steps);
  BindBatch(optim, seq_len, &out->sequences_per_step);
  optim.Int("micro_batch", Presence::kOptional, kSequences, &out->micro_batch);
}

// In the order of the schema, except that the data is read before the model that may take its vocabulary.
void BindSections(const Section& root, RunSpec* spec) {
  if (const auto data = root.RequiredChild("data")) BindData(*data, &spec->data);
  if (const auto model = root.RequiredChild("model")) BindModel(*model, spec);
  BindParallel(root.Child("parallel"), &spec->parallel);
  if (const auto optim = root.RequiredChild("optim")) BindOptim(*optim, spec->data.seq_len, &spec->optim);
  const Section checkpoint = root.Child("checkpoint");
  checkpoint.Int("every_steps", Presence::kOptional, kCount, &spec->checkpoint.every_steps);
  checkpoint.Int("keep", Presence::kOptional, {0, 1 << 20}, &spec->checkpoint.keep);
  bool on_usr1 = true;  // the only signal there is: always handled
  checkpoint.Enum<bool>("on_signal", {{"SIGUSR1", true}}, &on_usr1);
  const Section eval = root.Child("eval");
  eval.Int("every_steps", Presence::kOptional, kCount, &spec->eval.every_steps);
  eval.Int("sequences", Presence::kOptional, kCount, &spec->eval.sequences);
  eval.Bool("accuracy", &spec->eval.accuracy);
  const Section sample = root.Child("sample");
  sample.String("prompt", Presence::kOptional, &spec->sample.prompt);
  sample.Int("tokens", Presence::kOptional, {0, 1 << 24}, &spec->sample.tokens);
  sample.Real("temperature", Presence::kOptional, {0.0, 100.0, Bound::kOpen}, &spec->sample.temperature);
}

}  // namespace

RunSpec Bind(Run* run, Provenance* provenance) {
  RunSpec spec;
  const Section root(run, "", provenance);
  root.FileName("name", &spec.name);
  root.Seed("seed", &spec.seed);
  root.Enum<ComputeType>("compute",
                         {{"F32", ComputeType::kF32},
                          {"F64", ComputeType::kF64},
                          {"BF16", ComputeType::kBF16},
                          {"BEST", ComputeType::kAuto}},
                         &spec.compute);
  root.Enum<DeviceChoice>(
      "device", {{"AUTO", DeviceChoice::kAuto}, {"CPU", DeviceChoice::kCpu}, {"CUDA", DeviceChoice::kCuda}},
      &spec.device);
  root.Bool("deterministic", &spec.deterministic);
  root.Enum<AttentionChoice>("attention_kernel",
                             {{"FASTEST", AttentionChoice::kFastest},
                              {"HOPPER", AttentionChoice::kHopper},
                              {"CUDNN", AttentionChoice::kCudnn},
                              {"CUDA_MMA", AttentionChoice::kTensorCore}},
                             &spec.attention_kernel);
  root.Real("step_deadline_seconds", Presence::kOptional, kNotNegative, &spec.step_deadline_seconds);
  root.Enum<annulus::Recompute>("recompute",
                                {{"NONE", annulus::Recompute::kNone},
                                 {"ELEMENTWISE", annulus::Recompute::kElementwise},
                                 {"ATTENTION_OUTPUT", annulus::Recompute::kAttentionOutput},
                                 {"BLOCK", annulus::Recompute::kBlock}},
                                &spec.recompute);
  root.Enum<NanPolicy>("nan_policy", {{"STOP", NanPolicy::kStop}, {"SKIP", NanPolicy::kSkip}},
                       &spec.nan_policy);
  BindSections(root, &spec);
  root.Path("runs_dir", Presence::kOptional, &spec.runs_dir);
  return spec;
}

}  // namespace annulus::config
