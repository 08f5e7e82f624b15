#pragma once

// Block attention in double on the host, by naive loops over one (item, head, query row) at a time: LSE by
// two passes, no tiles, no carry. Operands as in attention_mma.h, but dense.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
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

// What the kernel rounds: nothing for the reference; weights and their gradients to bf16 for the naive error
// that any kernel on bf16 matrix units has.
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

inline Solution Solve(const Problem& p, Round round) {
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  Solution s;
  s.out.resize(size(p.q_rows * p.batch * p.heads * p.v_dim));
  s.lse.assign(size(p.q_rows * p.batch * p.heads), -INFINITY);
  s.delta.resize(s.lse.size());
  s.dq.resize(p.q.size());
  s.dk.resize(p.k.size());
  s.dv.resize(p.v.size());
  std::vector<double> weight(size(p.k_rows));
  for (int64_t item = 0; item < p.batch; ++item) {
    for (int64_t head = 0; head < p.heads; ++head) {
      const int64_t kv_head = head / (p.heads / p.kv_heads);
      for (int64_t i = 0; i < p.q_rows; ++i) {
        const int64_t stat = (i * p.batch + item) * p.heads + head;
        const int64_t lo = p.lo[size(i * p.batch + item)], hi = p.hi[size(i * p.batch + item)];
        const double *q = &p.q[size(stat * p.dim)], *dout = &p.dout[size(stat * p.v_dim)];
        const auto key = [&](int64_t j) { return (j * p.batch + item) * p.kv_heads + kv_head; };
        double largest = -INFINITY;
        for (int64_t j = lo; j < hi; ++j) {
          const double* k = &p.k[size(key(j) * p.dim)];
          double dot = 0;
          for (int64_t d = 0; d < p.dim; ++d) dot += q[d] * k[d];
          weight[size(j)] = dot * p.scale;
          largest = std::max(largest, weight[size(j)]);
        }
        if (lo >= hi) continue;
        double sum = 0;
        for (int64_t j = lo; j < hi; ++j) sum += std::exp(weight[size(j)] - largest);
        s.lse[size(stat)] = largest + std::log(sum);
        double* out = &s.out[size(stat * p.v_dim)];
        for (int64_t j = lo; j < hi; ++j) {
          weight[size(j)] = std::exp(weight[size(j)] - s.lse[size(stat)]);
          const double* v = &p.v[size(key(j) * p.v_dim)];
          const double w = round(weight[size(j)]);
          for (int64_t d = 0; d < p.v_dim; ++d) out[d] += w * v[d];
        }
        double delta = 0;
        for (int64_t d = 0; d < p.v_dim; ++d) delta += dout[d] * out[d];
        s.delta[size(stat)] = delta;
        double* dq = &s.dq[size(stat * p.dim)];
        for (int64_t j = lo; j < hi; ++j) {
          const double *k = &p.k[size(key(j) * p.dim)], *v = &p.v[size(key(j) * p.v_dim)];
          double *dk = &s.dk[size(key(j) * p.dim)], *dv = &s.dv[size(key(j) * p.v_dim)];
          double dweight = 0;
          for (int64_t d = 0; d < p.v_dim; ++d) dweight += dout[d] * v[d];
          const double ds = round(weight[size(j)] * (dweight - delta)), w = round(weight[size(j)]);
          for (int64_t d = 0; d < p.v_dim; ++d) dv[d] += w * dout[d];
          for (int64_t d = 0; d < p.dim; ++d) {
            dq[d] += p.scale * ds * k[d];
            dk[d] += p.scale * ds * q[d];
          }
        }
      }
    }
  }
  return s;
}

}  // namespace annulus::testing
