#pragma once

// A run, as plain data. Field names and nesting are those of src/config/annulus.proto, so that a message
// about `optim.adamw.lr` names both.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "annulus/comm/exchange_build.h"
#include "annulus/model/spec.h"
#include "annulus/parallel/latent_expansion.h"
#include "annulus/parallel/sequence_layout.h"

namespace annulus {

enum class SourceFormat { kText, kMegatron, kLlmC };

struct SourceSpec {
  SourceFormat format = SourceFormat::kText;
  std::string path;     // text: a file; megatron: prefix of .bin and .idx; llm.c: a .bin file
  double weight = 1.0;  // share of the sequences, relative to the other sources
  // Text only: documents end after each occurrence of this byte string; empty = one document.
  std::string document_separator;
  // llm.c only: a token that starts a document; negative = one document.
  int64_t document_start_token = -1;
  friend bool operator==(const SourceSpec&, const SourceSpec&) = default;
};

enum class Packing {
  kStream,     // sequences are cut from the token stream; documents may span two sequences
  kDocuments,  // whole documents are packed in order; longer ones are cut; the rest is padding
};

inline constexpr int64_t kMaxSeqLen = int64_t{1} << 30;

// Sequences of multi-query associative recall (src/data/recall_data_set.h) in place of sources.
struct RecallTask {
  int64_t length = 0;  // of a sequence; the rest of data.seq_len is padding
  int64_t pairs = 0;
  friend bool operator==(const RecallTask&, const RecallTask&) = default;
};
struct RecallSpec {
  std::vector<RecallTask> tasks;             // sequences take them in turns
  std::vector<RecallTask> validation_tasks;  // empty: those of training
  int64_t train_sequences = 100000;          // then they repeat
  int64_t validation_sequences = 1000;
  friend bool operator==(const RecallSpec&, const RecallSpec&) = default;
};

struct DataSpec {
  std::vector<SourceSpec> train;
  std::vector<SourceSpec> validation;  // empty: the tail of each training source
  double validation_fraction = 0.0;    // of each training source, when `validation` is empty
  int64_t seq_len = 0;
  bool document_mask = false;
  Packing packing = Packing::kStream;
  std::optional<RecallSpec> recall;  // then there are no sources
  friend bool operator==(const DataSpec&, const DataSpec&) = default;
};

// A plan as the configuration names it: chosen by its predicted time, one of PlanKind, or heads over all
// ranks.
enum class PlanName {
  kAuto,
  kAllGather,
  kKvRing,
  kBidirectionalKvRing,
  kDirectCast,
  kTokenRing,
  kBidirectionalTokenRing,
  kBalanced,
  kDoubleRing,
  kMesh,
  kArena,
  kUlysses,
};
const char* Name(PlanName name);  // "KV_RING"

// The exchange of one pass. What is 0 is left open: 1 for a named plan, but each divisor for `inner`; with
// kAuto whatever is fastest.
struct PassPlanSpec {
  PlanName plan = PlanName::kAuto;
  RingDirection direction = RingDirection::kFewestRows;
  int64_t head_split = 0;
  int64_t inner = 0;
  int64_t parts = 0;
  int64_t buffers = 2;
  Width output_width = Width::kAccumulator;
  friend bool operator==(const PassPlanSpec&, const PassPlanSpec&) = default;
};

enum class TransportChoice { kBest, kHost, kNccl, kCopyEngine };

struct ExchangeSpec {
  PassPlanSpec both;                              // fields of parallel.exchange itself
  std::optional<PassPlanSpec> forward, backward;  // in their place
  TransportChoice transport = TransportChoice::kBest;
  double throttle_gb_per_second = 0;  // 0 = as fast as the links are
  double buffer_gib = 0;              // that a plan may take on a rank; 0 = no limit
  std::string profile;                // file of a machine profile; empty = an assumed one
  LatentExchange latent = LatentExchange::kAuto;
  const PassPlanSpec& Of(Pass pass) const {
    const std::optional<PassPlanSpec>& own = pass == Pass::kForward ? forward : backward;
    return own.has_value() ? *own : both;
  }
  friend bool operator==(const ExchangeSpec&, const ExchangeSpec&) = default;
};

struct ParallelSpec {
  int64_t dp = 1;  // 0, in a configuration loaded without a number of ranks: ranks / (cp * tp)
  int64_t cp = 1;
  int64_t tp = 1;
  LayoutKind layout = LayoutKind::kZigzag;
  ExchangeSpec exchange;
  friend bool operator==(const ParallelSpec&, const ParallelSpec&) = default;
};

enum class ScheduleKind { kConstant, kCosine, kWarmupStableDecay };

struct ScheduleSpec {
  ScheduleKind kind = ScheduleKind::kCosine;
  int64_t warmup_steps = 0;
  int64_t decay_steps = 0;   // warm-up-stable-decay: length of the final linear decay
  double final_ratio = 0.1;  // lr at the end / peak lr
  friend bool operator==(const ScheduleSpec&, const ScheduleSpec&) = default;
};

struct OptimSpec {
  double lr = 0.0;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0.1;
  double clip_norm = 1.0;  // 0 = no clipping
  ScheduleSpec schedule;
  int64_t steps = 0;
  int64_t sequences_per_step = 1;  // global batch, over all data-parallel ranks and micro-steps
  int64_t micro_batch = 1;         // sequences that one data-parallel rank handles at a time
  friend bool operator==(const OptimSpec&, const OptimSpec&) = default;
};

enum class NanPolicy { kStop, kSkip };

struct CheckpointSpec {
  int64_t every_steps = 0;  // 0 = only at the end and on signals
  int64_t keep = 2;         // 0 = none is written, for runs that are only timed
  friend bool operator==(const CheckpointSpec&, const CheckpointSpec&) = default;
};

struct EvalSpec {
  int64_t every_steps = 0;  // 0 = only at the end
  int64_t sequences = 0;    // taken from the start of the validation split; 0 = all of it
  bool accuracy = false;    // also the share of counted targets that are the model's first choice
  friend bool operator==(const EvalSpec&, const EvalSpec&) = default;
};

struct SampleSpec {
  std::string prompt;
  int64_t tokens = 0;  // 0 = no sample at the end of training
  double temperature = 0.8;
  friend bool operator==(const SampleSpec&, const SampleSpec&) = default;
};

enum class ComputeType { kF32, kF64, kBF16, kAuto };
enum class DeviceChoice { kAuto, kCpu, kCuda };

struct RunSpec {
  std::string name;
  uint64_t seed = 0;
  ComputeType compute = ComputeType::kAuto;
  DeviceChoice device = DeviceChoice::kAuto;
  bool deterministic = false;
  AttentionChoice attention_kernel = AttentionChoice::kFastest;
  double step_deadline_seconds = 600;
  ModelSpec model;
  std::string pattern;  // as written
  Recompute recompute = Recompute::kAttentionOutput;
  DataSpec data;
  ParallelSpec parallel;
  OptimSpec optim;
  NanPolicy nan_policy = NanPolicy::kStop;
  CheckpointSpec checkpoint;
  EvalSpec eval;
  SampleSpec sample;
  std::string runs_dir = "runs";
  friend bool operator==(const RunSpec&, const RunSpec&) = default;
};

}  // namespace annulus
