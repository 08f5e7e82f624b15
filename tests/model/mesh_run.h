#pragma once

// A small decoder on any mesh, fed with whole sequences; what a test compares comes back whole. The ranks are
// threads on CPUs:
//
//   const WholeBatch batch = RandomBatch(spec, {.length = 37, .batch = 2, .documents = Documents::kRandom});
//   const Outcome one = Train(spec, batch, {.cp = 1}), four = Train(spec, batch, {.cp = 4});
//   ExpectSame(one, four, 1e-12);
//
// or processes, each with the context of its device:
//
//   Context ctx(gpu);
//   ProcessMesh mesh = ...;  // of the same device
//   const Outcome outcome = RankModel(spec, batch, run, mesh, ctx).Train();

#include <gtest/gtest.h>

#include <cmath>
#include <deque>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "annulus/base/random.h"
#include "annulus/comm/process_mesh.h"
#include "annulus/device/transfer.h"
#include "annulus/model/decoder.h"
#include "annulus/train/optimizer.h"
#include "parallel/sequences.h"
#include "support/loopback.h"

namespace annulus::testing {

inline constexpr int32_t kNotCounted = -1;

// Sequences before any split, without meta tokens: [item][position].
struct WholeBatch {
  int64_t length = 0;
  SequenceBatch sequences;
  std::vector<std::vector<int32_t>> tokens, targets;

  double counted() const {
    double n = 0;
    for (const auto& item : targets) {
      n += static_cast<double>(std::count_if(item.begin(), item.end(), [](int32_t t) { return t >= 0; }));
    }
    return n;
  }
};

struct BatchShape {
  int64_t length = 0, batch = 1;
  Lengths lengths = Lengths::kFull;
  Documents documents = Documents::kNone;
  uint64_t seed = 11;  // of the tokens
};

// Random tokens; the target is the next token, and is not counted at the end of a sequence and one time in
// eight.
inline WholeBatch RandomBatch(const ModelSpec& spec, const BatchShape& shape) {
  const RandomStream random(shape.seed, "tokens");
  WholeBatch whole{.length = shape.length,
                   .sequences = RandomSequences(5, shape.length, shape.batch, shape.lengths, shape.documents),
                   .tokens = {},
                   .targets = {}};
  uint64_t draws = 0;
  for (int64_t item = 0; item < shape.batch; ++item) {
    std::vector<int32_t> tokens, targets;
    for (int64_t p = 0; p < shape.length; ++p) {
      tokens.push_back(static_cast<int32_t>(random.Below(draws++, static_cast<uint64_t>(spec.vocab_size))));
    }
    for (int64_t p = 0; p < shape.length; ++p) {
      const bool counted =
          p + 1 < whole.sequences.lengths[static_cast<size_t>(item)] && random.Below(draws++, 8) > 0;
      targets.push_back(counted ? tokens[static_cast<size_t>(p) + 1] : kNotCounted);
    }
    whole.tokens.push_back(std::move(tokens));
    whole.targets.push_back(std::move(targets));
  }
  return whole;
}

// A block whose every size differs from the others, with grouped queries.
inline ModelSpec SmallSpec(std::vector<LayerSpec> layers) {
  return {.d_model = 16,
          .vocab_size = 29,
          .heads = 4,
          .kv_heads = 2,
          .head_dim = 6,
          .d_ff = 20,
          .norm_eps = 1e-5,
          .init_stddev = 0.3,  // far from linear, so that a missing term shows
          .tied_head = false,
          .layers = std::move(layers)};
}
inline BranchSpec MlpBranch() { return {.kind = BranchKind::kMlp}; }
inline BranchSpec AttentionBranch(int64_t window, std::optional<double> rope_theta = 100.0) {
  return {.kind = BranchKind::kAttention, .window = window, .rope_theta = rope_theta};
}
inline LayerSpec Layer(std::vector<BranchSpec> branches, Combine combine = Combine::kSum) {
  return {.branches = std::move(branches), .combine = combine};
}
inline LayerSpec Mlp() { return Layer({MlpBranch()}); }
inline LayerSpec Attention(int64_t window, std::optional<double> rope_theta = 100.0) {
  return Layer({AttentionBranch(window, rope_theta)});
}

// As Initialize, and norm weights off one. On CPUs, of whole parameters.
inline void FillRandom(ParamStore& params) {
  constexpr uint64_t seed = 3;
  params.Initialize(seed);
  for (size_t i = 0; i < params.table().params.size(); ++i) {
    const ParamInfo& info = params.table().params[i];
    if (info.init != Init::kOnes) continue;
    const RandomStream random(seed, "norm/" + info.name);
    VisitFloat(params.dtype(), [&]<class T>() {
      T* w = params.Value(static_cast<int>(i)).data<T>();
      for (int64_t j = 0; j < info.shape.elements(); ++j) {
        w[j] += static_cast<T>(0.2 * random.Normal(static_cast<uint64_t>(j)));
      }
    });
  }
}

// Contexts of ranks that run many small models one after the other: the memory of a new one is megabytes.
using KeptContexts = std::deque<Context>;  // by world rank
inline KeptContexts KeepContexts(int ranks) {
  KeptContexts contexts;
  for (int r = 0; r < ranks; ++r) contexts.emplace_back(Device{});
  return contexts;
}

struct MeshRun {
  DType dtype = DType::kF64;
  LayoutKind layout = LayoutKind::kZigzag;
  int dp = 1, cp = 1, tp = 1;
  Recompute recompute = Recompute::kAttentionOutput;
  TransportKind transport = TransportKind::kHost;
  std::function<void(ParamStore&)> fill = FillRandom;  // of parameters on the CPU in the accumulator dtype
  KeptContexts* contexts = nullptr;                    // null: a new one for each rank
};

inline std::vector<double> Doubles(ConstTensorRef t) {
  return VisitFloat(t.dtype(),
                    [&]<class T>() { return std::vector<double>(t.data<T>(), t.data<T>() + t.elements()); });
}

// The same of a tensor on the context's device.
inline std::vector<double> Doubles(Context& ctx, ConstTensorRef t) {
  const Tensor host(Device{}, t.dtype(), t.shape());
  Download(ctx, t, host.ref().raw());
  return Doubles(host.ref());
}

struct Outcome {
  double loss = 0;                                       // mean over counted tokens
  std::map<std::string, std::vector<double>> gradients;  // of `loss`, by whole parameter
  int64_t bytes_sent = 0;                                // by attention, all ranks
};

// One rank's share of a batch and the decoder on it, on ctx.device. Data-parallel ranks take equal runs of
// sequences. The mesh is for tensors on that device; both outlive the model.
class RankModel {
 public:
  RankModel(const ModelSpec& spec, const WholeBatch& whole, const MeshRun& run, const ProcessMesh& mesh,
            Context& ctx)
      : mesh_(mesh),
        shard_{.rank = mesh.at.tp, .size = run.tp},
        meta_(spec.meta_tokens),
        counted_(whole.counted()),
        ctx_(ctx),
        params_(ctx.device, run.dtype, BuildParamTable(spec, shard_), mesh.shape.world()),
        layout_(run.layout, whole.length + meta_, run.cp, run.tp),
        geometry_(layout_, mesh.cp, {.transport = run.transport, .available = {run.transport}}),
        tensor_(mesh.tp),
        decoder_(spec, run.recompute, params_, shard_),
        loss_(ctx.device, DType::kF64, {1}) {
    FillParameters(spec, run);
    const int64_t per_rank = whole.sequences.batch / run.dp;
    ANNULUS_CHECK(per_rank * run.dp == whole.sequences.batch);
    first_item_ = per_rank * mesh.at.dp;
    SequenceBatch mine{.batch = per_rank, .lengths = {}, .document_starts = {}};
    for (int64_t item = first_item_; item < first_item_ + per_rank; ++item) {
      mine.lengths.push_back(whole.sequences.lengths[static_cast<size_t>(item)]);
      if (whole.sequences.document_starts.empty()) continue;
      mine.document_starts.push_back(whole.sequences.document_starts[static_cast<size_t>(item)]);
    }
    std::vector<int32_t> tokens, targets;
    for (const int64_t row_position : layout_.LocalPositions(mesh.at.cp)) {
      for (int64_t item = first_item_; item < first_item_ + per_rank; ++item) {
        const int64_t position = row_position - meta_;
        const bool meta = position < 0, padding = position >= whole.length;
        const size_t i = static_cast<size_t>(item), p = static_cast<size_t>(position);
        const int64_t meta_token = spec.vocab_size + row_position;
        tokens.push_back(meta ? static_cast<int32_t>(meta_token) : padding ? 0 : whole.tokens[i][p]);
        targets.push_back(meta || padding ? kNotCounted : whole.targets[i][p]);
      }
    }
    geometry_.SetBatch(WithMetaTokens(spec, std::move(mine)));
    tokens_ = OnDevice(LocalTokens(spec, params_.table(), tokens)), targets_ = OnDevice(targets);
  }

  ParamStore& params() { return params_; }
  Context& ctx() { return ctx_; }
  const ProcessMesh& mesh() const { return mesh_; }
  const TensorParallel& tensor() const { return tensor_; }
  AttentionGeometry& geometry() { return geometry_; }
  TokenSlice slice() const { return {.tokens = tokens_.ref(), .targets = targets_.ref()}; }
  double counted() const { return counted_; }  // of the whole batch

  // Mean loss of the whole batch. Collective.
  double Loss() {
    ModelStep step{.geometry = geometry_, .tensor = tensor_};
    ZeroBytes(loss_.ref(), ctx_.stream());
    ANNULUS_CHECK_OK(decoder_.Loss(ctx_, step, slice(), {}, loss_.ref()));
    bytes_sent_ = step.stats.bytes_sent;
    return MeanLoss();
  }
  // The same, and gradients of it from this rank's tokens.
  double LossAndGradients(const BucketHooks& hooks = {}) {
    for (int bucket = 0; bucket < params_.buckets(); ++bucket) {
      ZeroBytes(params_.BucketGrads(bucket), ctx_.stream());
    }
    ModelStep step{.geometry = geometry_, .tensor = tensor_};
    ZeroBytes(loss_.ref(), ctx_.stream());
    ANNULUS_CHECK_OK(decoder_.LossAndGradients(ctx_, step, slice(), 1 / counted_, hooks, loss_.ref()));
    bytes_sent_ = step.stats.bytes_sent;
    return MeanLoss();
  }
  // Loss and gradients of the whole batch, on every rank. Collective.
  Outcome Train() {
    Outcome outcome;
    outcome.loss = LossAndGradients();
    Communicator world = mesh_.world, group = mesh_.dp_cp;
    outcome.bytes_sent =
        static_cast<int64_t>(world.AllReduceValue(static_cast<double>(bytes_sent_), ReduceOp::kSum).value());
    for (int bucket = 0; bucket < params_.buckets(); ++bucket) {
      const TensorRef grads = params_.BucketGrads(bucket);
      const int64_t replicated = params_.table().buckets[static_cast<size_t>(bucket)].replicated;
      ANNULUS_CHECK_OK(tensor_.AllReduce(grads.Rows(0, replicated)));
      ANNULUS_CHECK_OK(group.AllReduce(grads, ReduceOp::kSum));
    }
    for (size_t i = 0; i < params_.table().params.size(); ++i) {
      const ParamInfo& info = params_.table().params[i];
      outcome.gradients[info.name] = Whole(info, Doubles(ctx_, params_.Grad(static_cast<int>(i))));
    }
    return outcome;
  }
  // Puts this rank's logits into [item][position][vocab] of the whole batch; meta tokens and padding are left
  // out. Ranks of a tensor-parallel group have the same; the first writes.
  void Logits(const ModelSpec& spec, std::vector<double>* whole) {
    const int64_t vocab = spec.vocab_size, batch = geometry_.sequences().batch,
                  length = layout_.length() - meta_;
    const Tensor logits(ctx_.device, params_.dtype(), {tokens_.ref().elements(), vocab});
    ModelStep step{.geometry = geometry_, .tensor = tensor_};
    ANNULUS_CHECK_OK(decoder_.Logits(ctx_, step, tokens_.ref(), 0, logits.ref()));
    if (tensor_.rank() > 0) return;
    const std::vector<double> values = Doubles(ctx_, logits.ref());
    for (int64_t row = 0; row < layout_.local_rows(); ++row) {
      const int64_t position = layout_.PositionOf(mesh_.at.cp, row) - meta_;
      if (position < 0 || position >= length) continue;
      for (int64_t item = 0; item < batch; ++item) {
        std::copy_n(values.begin() + (row * batch + item) * vocab, vocab,
                    whole->begin() + ((first_item_ + item) * length + position) * vocab);
      }
    }
  }
  int64_t bytes_sent() const { return bytes_sent_; }  // by the last pass

 private:
  void FillParameters(const ModelSpec& spec, const MeshRun& run) {
    ParamStore host(Device{}, AccumOf(run.dtype), BuildParamTable(spec), 1);
    run.fill(host);
    const auto find = [&](absl::string_view name) -> absl::StatusOr<ConstTensorRef> {
      return host.Value(host.table().IndexOf(name));
    };
    ANNULUS_CHECK_OK(RestoreParameters(ctx_, params_, find));
  }
  // The whole parameter from what this rank and the others of its tensor-parallel group hold.
  std::vector<double> Whole(const ParamInfo& info, const std::vector<double>& local) {
    if (info.parts.empty()) return local;
    std::vector<double> whole(static_cast<size_t>(info.logical.elements()));
    for (const LogicalRun& run : LogicalRuns(info, 0, info.shape.elements())) {
      std::copy_n(local.begin() + run.local, run.elements, whole.begin() + run.logical);
    }
    Communicator tp = mesh_.tp;
    const Shape shape{static_cast<int64_t>(whole.size())};
    ANNULUS_CHECK_OK(tp.AllReduce(TensorRef(whole.data(), DType::kF64, Device{}, shape), ReduceOp::kSum));
    return whole;
  }
  Tensor OnDevice(const std::vector<int32_t>& values) {
    Tensor tensor(ctx_.device, DType::kI32, {static_cast<int64_t>(values.size())});
    Upload(ctx_, values.data(), tensor.ref().bytes(), tensor.ref());
    return tensor;
  }
  double MeanLoss() {
    const double sum = Doubles(ctx_, loss_.ref())[0];
    return mesh_.dp_cp.AllReduceValue(sum, ReduceOp::kSum).value() / counted_;
  }

  ProcessMesh mesh_;
  TensorShard shard_;
  int64_t meta_;
  double counted_;
  Context& ctx_;
  ParamStore params_;
  SequenceLayout layout_;
  AttentionGeometry geometry_;
  TensorParallel tensor_;
  Decoder decoder_;
  int64_t first_item_ = 0;
  Tensor tokens_, targets_, loss_;
  int64_t bytes_sent_ = 0;
};

// Runs fn(model) on a thread for each rank of the mesh.
template <typename Fn>
void OnMesh(const ModelSpec& spec, const WholeBatch& whole, const MeshRun& run, Fn&& fn) {
  OnLoopback(run.dp * run.cp * run.tp, [&](Communicator world) {
    absl::StatusOr<ProcessMesh> mesh = ProcessMesh::Create({.dp = run.dp, .cp = run.cp, .tp = run.tp}, world);
    std::optional<Context> own;
    if (run.contexts == nullptr) own.emplace(Device{});
    Context& ctx = own.has_value() ? *own : run.contexts->at(static_cast<size_t>(world.rank()));
    RankModel model(spec, whole, run, mesh.value(), ctx);
    fn(model);
  });
}

inline Outcome Train(const ModelSpec& spec, const WholeBatch& whole, const MeshRun& run) {
  Outcome outcome;
  OnMesh(spec, whole, run, [&](RankModel& model) {
    Outcome of_rank = model.Train();
    if (model.mesh().world.rank() == 0) outcome = std::move(of_rank);
  });
  return outcome;
}

inline std::vector<double> Logits(const ModelSpec& spec, const WholeBatch& whole, const MeshRun& run) {
  std::vector<double> logits(static_cast<size_t>(whole.sequences.batch * whole.length * spec.vocab_size));
  OnMesh(spec, whole, run, [&](RankModel& model) { model.Logits(spec, &logits); });
  return logits;
}

// Largest difference relative to the largest entry of `expected`; both finite.
inline double RelativeDifference(const std::vector<double>& got, const std::vector<double>& expected) {
  ANNULUS_CHECK(got.size() == expected.size());
  double difference = 0, largest = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    if (!std::isfinite(got[i]) || !std::isfinite(expected[i])) return std::numeric_limits<double>::infinity();
    difference = std::max(difference, std::abs(got[i] - expected[i]));
    largest = std::max(largest, std::abs(expected[i]));
  }
  return difference == 0 ? 0 : difference / largest;
}

// |got - expected| / |expected| in the Euclidean norm over all parameters.
inline double GradientError(const Outcome& got, const Outcome& expected) {
  double difference = 0, norm = 0;
  for (const auto& [name, want] : expected.gradients) {
    const std::vector<double>& have = got.gradients.at(name);
    for (size_t j = 0; j < want.size(); ++j) {
      const double d = have[j] - want[j];
      difference += d * d;
      norm += want[j] * want[j];
    }
  }
  return std::sqrt(difference / norm);
}

inline void ExpectSame(const Outcome& got, const Outcome& expected, double tolerance) {
  EXPECT_LE(std::abs(got.loss - expected.loss), tolerance * expected.loss);
  ASSERT_EQ(got.gradients.size(), expected.gradients.size());
  for (const auto& [name, want] : expected.gradients) {
    EXPECT_LE(RelativeDifference(got.gradients.at(name), want), tolerance) << name;
  }
}

}  // namespace annulus::testing
