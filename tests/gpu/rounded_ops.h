#pragma once

// What the naive branches of model_rounded.h are written with: ops of one CPU rank in f64, each tensor that a
// bf16 model stores rounded to bf16 as it is stored. Tensors live as long as the decoder.

#include <deque>

#include "annulus/ops/elementwise.h"
#include "annulus/ops/linear.h"
#include "annulus/ops/rms_norm.h"
#include "model/mesh_run.h"

namespace annulus::testing {

// To numbers of 8 bits: those of bf16, divided by `grid`. Different grids make errors of the same kind that
// have nothing to do with each other.
struct Rounding {
  double grid = 1;  // 0: nothing is rounded
  // kStored: a mistake that tests must find, gradients of decays and steps rounded after every token.
  enum class GateSums { kWide, kStored } gate_sums = GateSums::kWide;
};
inline constexpr Rounding kNoRounding = {0}, kToBFloat16 = {1};

class RoundedOps {
 public:
  struct Weights {
    TensorRef w, dw;
  };

  // `model` is of one rank on the CPU in f64; its gradients are written.
  RoundedOps(const ModelSpec& of, RankModel& rank_model, Rounding to)
      : spec(of), model(rank_model), ctx(rank_model.ctx()), geometry(rank_model.geometry()), rounding_(to) {}

  int64_t rows() const { return geometry.layout().local_rows(); }
  int64_t batch() const { return geometry.sequences().batch; }
  int64_t tokens() const { return rows() * batch(); }
  static TensorRef Tokens(TensorRef t) { return t.Reshaped({t.dim(0) * t.dim(1), t.dim(2)}); }

  // A parameter, or adjacent ones as one matrix, as the model has them.
  Weights Of(const std::string& first, const std::string& last) const {
    const int begin = model.params().table().IndexOf(first), end = model.params().table().IndexOf(last);
    return {model.params().Values(begin, end), model.params().Grads(begin, end)};
  }
  Weights Of(const std::string& name) const { return Of(name, name); }

  TensorRef New(Shape shape) {
    const TensorRef t = tensors_.emplace_back(Device{}, DType::kF64, shape).ref();
    ANNULUS_CHECK_OK(Zero(ctx, t));
    return t;
  }
  TensorRef NewColumns(int64_t columns) { return New({rows(), batch(), columns}); }
  const MatrixRef& Stored(const MatrixRef& m) const {
    const double grid = rounding_.grid;
    if (grid == 0) return m;
    for (int64_t row = 0; row < m.rows; ++row) {
      double* values = static_cast<double*>(m.data) + row * m.stride;
      for (int64_t i = 0; i < m.cols; ++i) {
        values[i] = ToFloat(ToBFloat16(static_cast<float>(values[i] * grid))) / grid;
      }
    }
    return m;
  }
  const TensorRef& Stored(const TensorRef& t) const {
    Stored(MatrixRef(t));
    return t;
  }

  // y (=, +=) x w^T
  void Product(ConstMatrixRef x, ConstMatrixRef w, Write write, MatrixRef y) {
    ANNULUS_CHECK_OK(LinearForward(ctx, x, w, write, y));
    Stored(y);
  }
  TensorRef Linear(ConstMatrixRef x, const Weights& weights) {
    const TensorRef y = NewColumns(weights.w.dim(0));
    Product(x, weights.w, Write::kOverwrite, y);
    return y;
  }
  // The weights' gradient from their input x is added; dx (=, +=) the input's.
  void LinearBackward(ConstMatrixRef dy, ConstMatrixRef x, const Weights& weights, Write write,
                      MatrixRef dx) {
    ANNULUS_CHECK_OK(LinearBackwardInput(ctx, dy, weights.w, write, dx));
    ANNULUS_CHECK_OK(LinearBackwardWeight(ctx, dy, x, weights.dw));
    Stored(dx);
  }

  TensorRef Norm(TensorRef x, const Weights& weights, double eps) {
    const TensorRef y = New(x.shape());
    ANNULUS_CHECK_OK(RmsNormForward(ctx, Tokens(x), weights.w, eps, Tokens(y)));
    return Stored(y);
  }
  // dx += the gradient of x.
  void NormBackward(TensorRef x, const Weights& weights, TensorRef dy, double eps, TensorRef dx) {
    ANNULUS_CHECK_OK(RmsNormBackward(ctx, Tokens(x), weights.w, Tokens(dy), eps, Tokens(dx), weights.dw));
    Stored(dx);
  }
  void Add(TensorRef x, TensorRef y) {
    ANNULUS_CHECK_OK(AddInPlace(ctx, x, y));
    Stored(y);
  }
  void Multiply(double factor, TensorRef x) {
    ANNULUS_CHECK_OK(Scale(ctx, factor, x));
    Stored(x);
  }
  TensorRef Copied(TensorRef x) {
    const TensorRef y = New(x.shape());
    ANNULUS_CHECK_OK(Copy(ctx, x, y));
    return y;
  }

  const Rounding& rounding() const { return rounding_; }

  const ModelSpec& spec;
  RankModel& model;
  Context& ctx;
  AttentionGeometry& geometry;

 private:
  Rounding rounding_;
  std::deque<Tensor> tensors_;
};

// The inside of a residual branch.
class RoundedBranch {
 public:
  virtual ~RoundedBranch() = default;
  virtual void Forward(TensorRef x, TensorRef y) = 0;                  // y += branch(x)
  virtual void Backward(TensorRef dy, Write write, TensorRef dx) = 0;  // dx (=, +=) the gradient of x
};

}  // namespace annulus::testing
