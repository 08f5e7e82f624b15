#pragma once

// One token of the gated delta rule on the state of one head, on CPUs. g = e^a, or 0 where a document starts:
//
//   u = v - g S^T k      S <- g S + beta k u^T      o = S^T q

#include <algorithm>
#include <cmath>

#include "kernels/common/heads_cpu.h"
#include "kernels/delta_rule/delta_rule_kernels.h"

namespace annulus::kernels {

constexpr int64_t kDeltaPollRows = 64;

template <typename T>
struct DeltaToken {
  T g = 0, beta = 0;
  const T *q = nullptr, *k = nullptr, *v = nullptr;  // [K], [K], [V]
};

template <typename T>
DeltaToken<T> TokenOf(const DeltaRule& rule, int64_t row, int64_t item, int64_t head) {
  const int64_t token = row * rule.k.batch + item, gate = token * rule.k.heads + head;
  const bool starts = rule.ages.data<int32_t>()[token] == 0;
  return {.g = starts ? T{0} : std::exp(rule.a.data<T>()[gate]),
          .beta = rule.beta.data<T>()[gate],
          .q = HeadAt<T>(rule.q, row, item, head),
          .k = HeadAt<T>(rule.k, row, item, head),
          .v = HeadAt<T>(rule.v, row, item, head)};
}

// u[columns] = v - g S^T k.   s: [K, columns]; v null: zeros
template <typename T>
void DeltaResidual(const DeltaToken<T>& t, const T* v, const T* s, int64_t key_dim, int64_t columns, T* u) {
  if (v != nullptr) {
    std::copy_n(v, columns, u);
  } else {
    std::fill_n(u, columns, T{0});
  }
  for (int64_t i = 0; i < key_dim; ++i) {
    const T factor = t.g * t.k[i];
    const T* row = s + i * columns;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) u[j] -= factor * row[j];
  }
}

// to = g S + beta k u^T; to may be s.
template <typename T>
void DeltaUpdate(const DeltaToken<T>& t, const T* u, const T* s, int64_t key_dim, int64_t columns, T* to) {
  for (int64_t i = 0; i < key_dim; ++i) {
    const T factor = t.beta * t.k[i];
    const T* row = s + i * columns;
    T* out = to + i * columns;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) out[j] = t.g * row[j] + factor * u[j];
  }
}

// Calls fn(segment, item, head, index in batch * heads) for all.
template <typename Fn>
void ForEachDeltaHead(const DeltaRule& rule, Fn&& fn) {
  for (size_t s = 0; s < rule.segments.size(); ++s) {
    for (int64_t item = 0; item < rule.k.batch; ++item) {
      for (int64_t head = 0; head < rule.k.heads; ++head) {
        fn(static_cast<int64_t>(s), item, head, item * rule.k.heads + head);
      }
    }
  }
}

struct DeltaHead {
  int64_t segment = 0, item = 0, head = 0;
};

// The transition of a segment: the recurrence from the identity, without values.
//   u: [K], scratch   transition: [K, K]
template <typename T>
void DeltaTransition(const Context& ctx, const DeltaRule& rule, const DeltaHead& at, T* u, T* transition) {
  const int64_t k = rule.k.dim;
  std::fill_n(transition, k * k, T{0});
  for (int64_t i = 0; i < k; ++i) transition[i * k + i] = T{1};
  const RowRange rows = rule.segments[static_cast<size_t>(at.segment)];
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    if (row % kDeltaPollRows == 0) ctx.Poll();
    const DeltaToken<T> t = TokenOf<T>(rule, row, at.item, at.head);
    DeltaResidual<T>(t, nullptr, transition, k, k, u);
    DeltaUpdate<T>(t, u, transition, k, k, transition);
  }
}

}  // namespace annulus::kernels
