#pragma once

// Block attention on the host, by naive loops over one (item, head, query row) at a time: LSE by two passes,
// no tiles, no carry. Operands as in attention_block_cuda.h, but dense.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <thread>
#include <vector>

namespace annulus::testing {

struct Problem {
  int64_t q_rows, k_rows, batch, heads, kv_heads, dim, v_dim;
  double scale;
  std::vector<double> q, k, v, dout;  // [rows, batch, heads, dim]
  std::vector<int64_t> lo, hi;        // [q_rows, batch], in key rows of the whole problem
};

struct Solution {
  std::vector<double> out, lse, delta, dq, dk, dv;
};

// What of a solution is rounded besides its arithmetic: nothing; or weights and their gradients to bf16, for
// the naive error that any kernel on bf16 matrix units has.
using Round = double (*)(double);

inline void ForEachParallel(int64_t count, const std::function<void(int64_t)>& fn) {
  const int64_t threads = std::max<int64_t>(1, std::thread::hardware_concurrency());
  std::vector<std::thread> pool;
  for (int64_t t = 0; t < threads; ++t) {
    pool.emplace_back([=, &fn] {
      for (int64_t i = t; i < count; i += threads) fn(i);
    });
  }
  for (std::thread& thread : pool) thread.join();
}

// The solution in arithmetic of type T.
template <typename T>
class Solver {
 public:
  // Of the realizations, 0 rounds as it is, others round at multiples of each row's own: kernels hold weights
  // at such multiples, and where few keys decide a result, the error of one says little of another's.
  Solver(const Problem& p, Round round, uint32_t realization = 0)
      : p_(p), round_(round), realization_(realization) {
    const auto make = [](size_t n, T value) { return std::vector<T>(n, value); };
    const size_t stats = Size(p.q_rows * p.batch * p.heads);
    out_ = make(stats * Size(p.v_dim), 0);
    lse_ = make(stats, -std::numeric_limits<T>::infinity());
    delta_ = make(stats, 0);
    dq_ = make(p.q.size(), 0);
    dk_ = make(p.k.size(), 0);
    dv_ = make(p.v.size(), 0);
    weights_ = make(Size(p.k_rows), 0);
  }

  std::vector<T> SolveOut() {
    ForEachRow([this](const Row& row) { OutRow(row); });
    return out_;
  }
  Solution Solve() {
    ForEachRow([this](const Row& row) {
      OutRow(row);
      GradientRow(row);
    });
    const auto doubles = [](const std::vector<T>& x) { return std::vector<double>(x.begin(), x.end()); };
    return {doubles(out_), doubles(lse_), doubles(delta_), doubles(dq_), doubles(dk_), doubles(dv_)};
  }

 private:
  static size_t Size(int64_t n) { return static_cast<size_t>(n); }
  template <typename Fn>
  void ForEachRow(const Fn& fn) const {
    for (int64_t item = 0; item < p_.batch; ++item) {
      for (int64_t head = 0; head < p_.heads; ++head) {
        for (int64_t row = 0; row < p_.q_rows; ++row) fn(RowAt(item, head, row));
      }
    }
  }
  // From 1 to 2.
  static double Multiple(uint32_t realization, size_t stat) {
    const uint64_t h = (stat + (uint64_t{realization} << 40)) * 0x9E3779B97F4A7C15ull;
    return realization == 0 ? 1 : 1 + static_cast<double>((h ^ (h >> 29)) >> 40) * 0x1p-24;
  }
  T Rounded(T x) const { return static_cast<T>(round_(static_cast<double>(x) * multiple_) / multiple_); }
  static T Dot(const double* x, const double* y, int64_t n) {
    T dot = 0;
    for (int64_t d = 0; d < n; ++d) dot += static_cast<T>(x[d]) * static_cast<T>(y[d]);
    return dot;
  }
  static void Add(T factor, const double* x, int64_t n, T* to) {
    for (int64_t d = 0; d < n; ++d) to[d] += factor * static_cast<T>(x[d]);
  }

  // Of one item, head and query row: its keys are [lo, hi), key j at place(j) of all tokens and KV heads.
  struct Row {
    int64_t lo, hi;
    size_t stat;
    int64_t item, kv_head, batch, kv_heads;
    size_t place(int64_t j) const { return Size((j * batch + item) * kv_heads + kv_head); }
  };
  Row RowAt(int64_t item, int64_t head, int64_t row) const {
    const int64_t token = row * p_.batch + item;
    return {p_.lo[Size(token)],
            p_.hi[Size(token)],
            Size(token * p_.heads + head),
            item,
            head / (p_.heads / p_.kv_heads),
            p_.batch,
            p_.kv_heads};
  }

  // Leaves the row's weights.
  void OutRow(const Row& row) {
    if (row.lo >= row.hi) return;
    const size_t dim = Size(p_.dim), v_dim = Size(p_.v_dim);
    const double* q = &p_.q[row.stat * dim];
    const T scale = static_cast<T>(p_.scale);
    multiple_ = Multiple(realization_, row.stat);
    T largest = -std::numeric_limits<T>::infinity(), sum = 0;
    for (int64_t j = row.lo; j < row.hi; ++j) {
      weights_[Size(j)] = Dot(q, &p_.k[row.place(j) * dim], p_.dim) * scale;
      largest = std::max(largest, weights_[Size(j)]);
    }
    for (int64_t j = row.lo; j < row.hi; ++j) sum += std::exp(weights_[Size(j)] - largest);
    lse_[row.stat] = largest + std::log(sum);
    T* out = &out_[row.stat * v_dim];
    for (int64_t j = row.lo; j < row.hi; ++j) {
      weights_[Size(j)] = std::exp(weights_[Size(j)] - lse_[row.stat]);
      Add(Rounded(weights_[Size(j)]), &p_.v[row.place(j) * v_dim], p_.v_dim, out);
    }
  }

  void GradientRow(const Row& row) {
    if (row.lo >= row.hi) return;
    const size_t dim = Size(p_.dim), v_dim = Size(p_.v_dim);
    const double *q = &p_.q[row.stat * dim], *dout = &p_.dout[row.stat * v_dim];
    const T scale = static_cast<T>(p_.scale), *out = &out_[row.stat * v_dim];
    T& delta = delta_[row.stat];
    for (size_t d = 0; d < v_dim; ++d) delta += static_cast<T>(dout[d]) * out[d];
    for (int64_t j = row.lo; j < row.hi; ++j) {
      const size_t key = row.place(j);
      const T weight = weights_[Size(j)];
      const T dweight = Dot(dout, &p_.v[key * v_dim], p_.v_dim);
      const T dscore = scale * Rounded(weight * (dweight - delta));
      Add(Rounded(weight), dout, p_.v_dim, &dv_[key * v_dim]);
      Add(dscore, &p_.k[key * dim], p_.dim, &dq_[row.stat * dim]);
      Add(dscore, q, p_.dim, &dk_[key * dim]);
    }
  }

  const Problem& p_;
  const Round round_;
  const uint32_t realization_;
  double multiple_ = 1;  // of the row
  std::vector<T> out_, lse_, delta_, dq_, dk_, dv_, weights_;
};

}  // namespace annulus::testing
