#include "annulus/train/sample.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "annulus/base/random.h"
#include "annulus/device/transfer.h"
#include "annulus/model/decoder.h"
#include "annulus/ops/elementwise.h"

namespace annulus {
namespace {

// Index of the token drawn from softmax(logits / temperature) with a uniform number u in [0, 1).
template <typename T>
int32_t Draw(absl::Span<const T> logits, double temperature, double u) {
  const auto best = std::max_element(logits.begin(), logits.end());
  if (temperature == 0) return static_cast<int32_t>(best - logits.begin());
  double total = 0;
  for (T logit : logits) total += std::exp((logit - *best) / temperature);
  double left = u * total;
  for (size_t i = 0; i < logits.size(); ++i) {
    left -= std::exp((logits[i] - *best) / temperature);
    if (left < 0) return static_cast<int32_t>(i);
  }
  return static_cast<int32_t>(best - logits.begin());
}

}  // namespace

absl::Status Sample(const ModelSpec& model, const ParamStore& params, const SampleSpec& spec,
                    int64_t max_context, uint64_t seed, const std::function<void(char)>& emit) {
  if (model.vocab_size < 256) {
    return Invalid("model.vocab_size=", model.vocab_size, ": expected at least 256 to sample bytes");
  }
  std::vector<int32_t> tokens;
  for (unsigned char byte : spec.prompt) tokens.push_back(byte);
  if (tokens.empty()) tokens.push_back('\n');

  // Each byte has a context of another length; kernels of the deterministic kind need no plan for each.
  Context ctx(params.BucketValues(0).device(), Determinism::kRequired);
  Decoder decoder(model, Recompute::kBlock, params);
  const RandomStream random(seed, "sample");
  const DType wide = AccumOf(params.dtype());
  const Tensor host(Device{}, wide, {model.vocab_size});
  for (int64_t i = 0; i < spec.tokens; ++i) {
    const int64_t length = std::min<int64_t>(static_cast<int64_t>(tokens.size()), max_context);
    AttentionGeometry geometry(SequenceLayout(LayoutKind::kContiguous, length, 1), MakeLoopbackGroup(1)[0]);
    geometry.SetBatch({.batch = 1, .lengths = {length}, .document_starts = {}});
    ModelStep step{.geometry = geometry, .stats = {}};
    ArenaScope scope(ctx.scratch);
    const TensorRef logits = ctx.scratch.Allocate(params.dtype(), {1, model.vocab_size});
    const TensorRef wide_logits = ctx.scratch.Allocate(wide, logits.shape());
    const TensorRef context =
        Upload<int32_t>(ctx, ctx.scratch, absl::MakeConstSpan(tokens).last(static_cast<size_t>(length)));
    ANNULUS_RETURN_IF_ERROR(decoder.Logits(ctx, step, context, logits));
    ANNULUS_RETURN_IF_ERROR(Cast(ctx, logits, wide_logits));
    Download(ctx, wide_logits, host.ref().raw());
    // Bytes only: a larger vocabulary's other tokens have no text.
    const int32_t next = VisitFloat(wide, [&]<class T>() {
      return Draw<T>({host.ref().data<T>(), 256}, spec.temperature, random.Uniform(static_cast<uint64_t>(i)));
    });
    tokens.push_back(next);
    emit(static_cast<char>(next));
  }
  return absl::OkStatus();
}

}  // namespace annulus
