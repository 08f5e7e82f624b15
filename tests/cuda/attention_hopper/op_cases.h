#pragma once

// Random calls of the attention op on the device.

#include <functional>
#include <random>

#include "annulus/ops/attention.h"
#include "cuda/attention_hopper/op_reference.h"

namespace annulus::testing {

enum class OpMask { kFull, kCausal, kCausalEnd, kWindow, kDocuments, kRandom, kEmpty };
inline constexpr const char* kOpMaskNames[] = {"full",      "causal", "causal, end", "window",
                                               "documents", "random", "empty"};

struct OpCase {
  int64_t dim = 128, v_dim = 128, q_rows = 1, k_rows = 1, batch = 1, heads = 1, kv_heads = 1;
  OpMask mask = OpMask::kFull;
  int64_t extent = 1;           // of windows; the mean of documents
  KeyPositions positions = {};  // of the keys
  int64_t chunks = 1;           // of the keys, for the carry
  uint32_t seed = 0;

  MaskShape shape() const {
    return mask == OpMask::kFull     ? MaskShape::kFull
           : mask == OpMask::kCausal ? MaskShape::kCausal
                                     : MaskShape::kGeneral;
  }
  std::string text() const;
};
OpCase RandomOpCase(std::mt19937& rng);

// Where operands and results lie.
using Allocate = std::function<TensorRef(DType, const Shape&)>;

// Operands of a case; K and V in the columns of one tensor.
class OpOperands {
 public:
  OpOperands(Context& ctx, const OpCase& c, const Allocate& allocate);

  // Keys [begin, end).
  AttentionBlock Block(int64_t begin, int64_t end, MaskShape shape) const;
  HeadsRef dout() const { return HeadsOf(dout_, 0, c_.heads, c_.v_dim); }
  const OpProblem& problem() const { return problem_; }

 private:
  const OpCase c_;
  TensorRef q_, kv_, dout_, lo_, hi_;
  OpProblem problem_;
};

// Results of a case, dense.
//   dtype: of all but the LSE
class OpResults {
 public:
  OpResults(const OpCase& c, DType dtype, const Allocate& allocate);

  // All keys in one call each, results as no keys gave them.
  void RunWhole(Context& ctx, const OpOperands& in);
  // In f32, over the chunks of the case, added to nothing.
  void RunCarried(Context& ctx, const OpOperands& in);
  const TensorRef& of(Result result) const { return tensors_[result]; }

 private:
  void Poison(Context& ctx);
  AttentionGradients Gradients(const OpOperands& in, const HeadsRef& out) const;
  HeadsRef Heads(Result result) const;

  const OpCase c_;
  std::array<TensorRef, kResults> tensors_;
  TensorRef rounded_out_, delta_;
};

}  // namespace annulus::testing
