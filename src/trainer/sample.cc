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

// Kernels of the deterministic kind, for as long as it lives: each byte has a context of another length, and
// they need no plan for each.
class WithoutPlans {
 public:
  explicit WithoutPlans(Context& ctx) : ctx_(ctx), before_(ctx.determinism) {
    ctx.determinism = Determinism::kRequired;
  }
  ~WithoutPlans() { ctx_.determinism = before_; }
  WithoutPlans(const WithoutPlans&) = delete;
  WithoutPlans& operator=(const WithoutPlans&) = delete;

 private:
  Context& ctx_;
  const Determinism before_;
};

// Logits of what follows `tokens`, into host memory.   logits: [vocab] of the accumulator dtype
absl::Status NextLogits(Context& ctx, const TrainedModel& model, Decoder& decoder,
                        absl::Span<const int32_t> tokens, TensorRef logits) {
  const int64_t meta = model.spec.meta_tokens, length = meta + static_cast<int64_t>(tokens.size());
  const SequenceLayout layout(LayoutKind::kContiguous, length, 1, model.tensor.size());
  AttentionGeometry geometry(layout, MakeLoopbackGroup(1)[0]);
  geometry.SetBatch({.batch = 1, .lengths = {length}, .document_starts = {}});
  ModelStep step{.geometry = geometry, .tensor = model.tensor};
  std::vector<int32_t> all;
  for (int64_t i = 0; i < meta; ++i) all.push_back(static_cast<int32_t>(model.spec.vocab_size + i));
  all.insert(all.end(), tokens.begin(), tokens.end());
  all.resize(static_cast<size_t>(layout.local_rows()));  // padding
  ArenaScope scope(ctx.scratch);
  const TensorRef local =
      Upload<int32_t>(ctx, ctx.scratch, LocalTokens(model.spec, model.params.table(), all));
  const TensorRef narrow = ctx.scratch.Allocate(model.params.dtype(), {1, logits.dim(0)});
  const TensorRef wide = ctx.scratch.Allocate(logits.dtype(), narrow.shape());
  ANNULUS_RETURN_IF_ERROR(decoder.Logits(ctx, step, local, length - 1, narrow));
  ANNULUS_RETURN_IF_ERROR(Cast(ctx, narrow, wide));
  Download(ctx, wide, logits.raw());
  return absl::OkStatus();
}

}  // namespace

absl::Status Sample(Context& ctx, const TrainedModel& model, const SampleSpec& spec, uint64_t seed,
                    const std::function<void(char)>& emit) {
  if (model.spec.vocab_size < 256) {
    return Invalid("model.vocab_size=", model.spec.vocab_size, ": expected at least 256 to sample bytes");
  }
  std::vector<int32_t> tokens;
  for (unsigned char byte : spec.prompt) tokens.push_back(byte);
  if (tokens.empty()) tokens.push_back('\n');

  const WithoutPlans scope(ctx);
  Decoder decoder(model.spec, Recompute::kBlock, model.params,
                  {.rank = model.tensor.rank(), .size = model.tensor.size()});
  const RandomStream random(seed, "sample");
  const Tensor logits(Device{}, AccumOf(model.params.dtype()), {model.spec.vocab_size});
  for (int64_t i = 0; i < spec.tokens; ++i) {
    const auto length = std::min(tokens.size(), static_cast<size_t>(model.max_context));
    ANNULUS_RETURN_IF_ERROR(
        NextLogits(ctx, model, decoder, absl::MakeConstSpan(tokens).last(length), logits.ref()));
    // Bytes only: a larger vocabulary's other tokens have no text.
    const int32_t next = VisitFloat(logits.ref().dtype(), [&]<class T>() {
      return Draw<T>({logits.ref().data<T>(), 256}, spec.temperature,
                     random.Uniform(static_cast<uint64_t>(i)));
    });
    tokens.push_back(next);
    emit(static_cast<char>(next));
  }
  return absl::OkStatus();
}

}  // namespace annulus
