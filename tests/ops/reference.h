#pragma once

// Naive references: plain loops over dense row-major vectors, in any floating type.

#include <cmath>
#include <cstdint>
#include <vector>

namespace annulus::testing::reference {

template <typename W>
using Values = std::vector<W>;

inline size_t At(int64_t row, int64_t col, int64_t cols) { return static_cast<size_t>(row * cols + col); }

struct GemmDims {
  int64_t m = 0, n = 0, k = 0;
};

// y[m, n] += sum_k a[m, k] b[k, n], a and b through accessors (row, column) -> value.
template <typename W, typename A, typename B>
Values<W> Gemm(const GemmDims& dims, const A& a, const B& b, Values<W> y) {
  for (int64_t i = 0; i < dims.m; ++i) {
    for (int64_t j = 0; j < dims.n; ++j) {
      W sum = 0;
      for (int64_t k = 0; k < dims.k; ++k) sum += a(i, k) * b(k, j);
      y[At(i, j, dims.n)] += sum;
    }
  }
  return y;
}

template <typename W>
Values<W> RmsNorm(const Values<W>& x, const Values<W>& w, double eps) {
  const auto d = static_cast<int64_t>(w.size());
  Values<W> y(x.size());
  for (int64_t t = 0; d > 0 && t < static_cast<int64_t>(x.size()) / d; ++t) {
    W mean = 0;
    for (int64_t i = 0; i < d; ++i) mean += x[At(t, i, d)] * x[At(t, i, d)] / static_cast<W>(d);
    for (int64_t i = 0; i < d; ++i) {
      y[At(t, i, d)] = w[static_cast<size_t>(i)] * x[At(t, i, d)] / std::sqrt(mean + static_cast<W>(eps));
    }
  }
  return y;
}

// gate_up: [tokens, 2 d] -> [tokens, d]
template <typename W>
Values<W> Swiglu(const Values<W>& gate_up, int64_t tokens, int64_t d) {
  Values<W> h(static_cast<size_t>(tokens * d));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < d; ++i) {
      const W gate = gate_up[At(t, i, 2 * d)], up = gate_up[At(t, d + i, 2 * d)];
      h[At(t, i, d)] = gate * (1 / (1 + std::exp(-gate))) * up;
    }
  }
  return h;
}

struct LossDims {
  int64_t tokens = 0, d = 0, vocab = 0;
};

// Softmax of one token's logits, as a vector that sums to one; the last element is the log of the normaliser.
template <typename W>
Values<W> SoftmaxAndLogSum(const Values<W>& x, const Values<W>& w, const LossDims& dims, int64_t token) {
  Values<W> p;
  W sum = 0;
  for (int64_t v = 0; v < dims.vocab; ++v) {
    W logit = 0;
    for (int64_t i = 0; i < dims.d; ++i) logit += x[At(token, i, dims.d)] * w[At(v, i, dims.d)];
    p.push_back(std::exp(logit));
    sum += p.back();
  }
  for (W& value : p) value /= sum;
  p.push_back(std::log(sum));
  return p;
}

template <typename W>
struct LossResult {
  W loss = 0;
  Values<W> dx, dw;
};

// Loss and gradients of scale * loss; only for logits small enough not to overflow.
template <typename W>
LossResult<W> CrossEntropy(const Values<W>& x, const Values<W>& w, const LossDims& dims,
                           const std::vector<int32_t>& targets, double scale) {
  LossResult<W> result{.loss = 0, .dx = Values<W>(x.size()), .dw = Values<W>(w.size())};
  for (int64_t t = 0; t < dims.tokens; ++t) {
    const int32_t target = targets[static_cast<size_t>(t)];
    if (target < 0) continue;
    const Values<W> p = SoftmaxAndLogSum(x, w, dims, t);
    result.loss -= std::log(p[static_cast<size_t>(target)]);
    for (int64_t v = 0; v < dims.vocab; ++v) {
      const W dlogit = static_cast<W>(scale) * (p[static_cast<size_t>(v)] - (v == target ? 1 : 0));
      for (int64_t i = 0; i < dims.d; ++i) {
        result.dx[At(t, i, dims.d)] += dlogit * w[At(v, i, dims.d)];
        result.dw[At(v, i, dims.d)] += dlogit * x[At(t, i, dims.d)];
      }
    }
  }
  return result;
}

}  // namespace annulus::testing::reference
