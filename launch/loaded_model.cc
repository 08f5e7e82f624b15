#include "loaded_model.h"

#include <cstdlib>

#include "annulus/base/file.h"
#include "annulus/device/transfer.h"
#include "annulus/model/decoder.h"
#include "annulus/train/batch.h"
#include "annulus/train/checkpoint.h"

namespace annulus {
namespace {

// A sequence of its own, on one rank.
AttentionGeometry GeometryOf(int64_t length, SequenceBatch sequences) {
  AttentionGeometry geometry(SequenceLayout(LayoutKind::kContiguous, length, 1), MakeLoopbackGroup(1)[0]);
  geometry.SetBatch(std::move(sequences));
  return geometry;
}

TensorRef UploadTokens(Context& ctx, const std::vector<int32_t>& tokens) {
  return Upload<int32_t>(ctx, ctx.scratch, tokens);
}

}  // namespace

bool IsFirstRank() {
  const char* rank = std::getenv("OMPI_COMM_WORLD_RANK");
  return rank == nullptr || absl::string_view(rank) == "0";
}

std::string CheckpointPath(const std::string& operand) {
  const std::string inside = operand + "/ckpt";
  return Exists(inside) ? inside : operand;
}

TensorFinder LoadedModel::finder() const {
  return [this](absl::string_view name) -> absl::StatusOr<ConstTensorRef> {
    return params->Value(params->table().IndexOf(name));
  };
}

absl::StatusOr<LoadedModel> LoadModel(const Arguments& arguments) {
  const std::string directory = arguments.Last("--checkpoint", "");
  if (directory.empty()) return Invalid("--checkpoint: expected DIR, a run directory or its ckpt");
  ANNULUS_ASSIGN_OR_RETURN(const std::string text, ReadFile(arguments.operand()));
  LoadedModel model;
  ANNULUS_ASSIGN_OR_RETURN(model.config, LoadConfig(arguments.operand(), text, arguments.All("--set")));
  ANNULUS_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(CheckpointPath(directory)));
  model.path = checkpoint.path(), model.step = checkpoint.meta().step;
  const bool doubles = model.config.spec.compute == ComputeType::kF64;
  model.params = std::make_unique<ParamStore>(Device{}, doubles ? DType::kF64 : DType::kF32,
                                              BuildParamTable(model.spec()), 1);
  Context ctx{Device{}};
  const auto find = [&](absl::string_view name) { return checkpoint.Find(name); };
  ANNULUS_RETURN_IF_ERROR(Prefixed(RestoreParameters(ctx, *model.params, find), model.path + ": "));
  return model;
}

absl::StatusOr<std::vector<double>> LogitsOf(const ModelSpec& spec, const ParamStore& params,
                                             const std::vector<int32_t>& tokens) {
  const auto length = static_cast<int64_t>(tokens.size());
  std::vector<int32_t> all;
  for (int64_t i = 0; i < spec.meta_tokens; ++i) all.push_back(static_cast<int32_t>(spec.vocab_size + i));
  all.insert(all.end(), tokens.begin(), tokens.end());
  Context ctx{Device{}};
  Decoder decoder(spec, Recompute::kBlock, params);
  SequenceBatch whole = WithMetaTokens(spec, {.batch = 1, .lengths = {length}, .document_starts = {}});
  AttentionGeometry geometry = GeometryOf(length + spec.meta_tokens, std::move(whole));
  ModelStep step{.geometry = geometry};
  const Tensor logits(Device{}, params.dtype(), {length, spec.vocab_size});
  ANNULUS_RETURN_IF_ERROR(decoder.Logits(ctx, step, UploadTokens(ctx, LocalTokens(spec, params.table(), all)),
                                         spec.meta_tokens, logits.ref()));
  return VisitFloat(params.dtype(), [&]<class T>() {
    const T* from = logits.ref().data<T>();
    return std::vector<double>(from, from + logits.ref().elements());
  });
}

absl::StatusOr<double> MeanLossOf(const RunSpec& run, const ModelSpec& spec, const ParamStore& params,
                                  const std::vector<Sequence>& sequences) {
  RunSpec alone = run;  // on one rank
  alone.model = spec;
  alone.parallel = ParallelSpec();
  alone.parallel.layout = LayoutKind::kContiguous;
  Context ctx{Device{}};
  Decoder decoder(spec, Recompute::kBlock, params);
  const Tensor loss(Device{}, DType::kF64, {1});
  int64_t counted = 0;
  for (const Sequence& sequence : sequences) {
    const SequenceLayout layout = LayoutOf(alone);
    const MicroBatch batch = MakeMicroBatch({sequence}, alone, layout, 0);
    AttentionGeometry geometry = GeometryOf(layout.length(), batch.sequences);
    ModelStep step{.geometry = geometry};
    ArenaScope scope(ctx.scratch);
    const TokenSlice slice{.tokens = UploadTokens(ctx, LocalTokens(spec, params.table(), batch.tokens)),
                           .targets = UploadTokens(ctx, batch.targets)};
    ANNULUS_RETURN_IF_ERROR(decoder.Loss(ctx, step, slice, {}, loss.ref()));
    counted += batch.counted_tokens;
  }
  if (counted == 0) return Invalid("data: no counted tokens in ", sequences.size(), " sequences");
  return *loss.ref().data<double>() / static_cast<double>(counted);
}

}  // namespace annulus
