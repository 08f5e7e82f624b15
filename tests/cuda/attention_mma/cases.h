#pragma once

// Problems of the attention check and their solutions.

#include <random>

#include "cuda/attention_mma/device_arrays.h"
#include "cuda/attention_mma/reference.h"

namespace annulus::testing {

// kStart: causal, the queries at the first keys; the keys behind them are seen by none.
enum class Mask { kFull, kCausal, kWindow, kDocuments, kRandom, kStart };

struct Case {
  const char* name;
  int64_t dim, v_dim, q_rows, k_rows, batch, heads, kv_heads;
  Mask mask = Mask::kCausal;
  int chunks = 1;
  bool striped = false;
  bool far = false;
  int64_t window = 50;
  double spread = 1.5;  // of the scores: neither flat nor one key
  double growth = 1;    // of the keys, from each 128 to the next: a power of two
};

// Bounds in key rows; not yet within [0, k_rows].
inline void FillBounds(const Case& c, std::mt19937& rng, Problem* p) {
  p->lo.assign(Size(c.q_rows * c.batch), 0);
  p->hi.assign(Size(c.q_rows * c.batch), c.k_rows);
  for (int64_t item = 0; item < c.batch; ++item) {
    std::vector<int64_t> document_start(Size(c.k_rows));
    for (int64_t j = 1; j < c.k_rows; ++j) {
      const bool starts = rng() % 40 == 0 || (j > 20 && j < 24);  // some documents of one token
      document_start[Size(j)] = starts ? j : document_start[Size(j - 1)];
    }
    for (int64_t i = 0; i < c.q_rows; ++i) {
      int64_t &lo = p->lo[Size(i * c.batch + item)], &hi = p->hi[Size(i * c.batch + item)];
      // Queries end where the keys end: the first may be before all keys.
      const int64_t position = c.k_rows - c.q_rows + i;
      switch (c.mask) {
        case Mask::kFull:
          break;
        case Mask::kCausal:
          hi = position + 1;
          break;
        case Mask::kStart:
          hi = i + 1;
          break;
        case Mask::kWindow:
          lo = position - c.window + 1;
          hi = position + 1;
          break;
        case Mask::kDocuments:
          lo = position < 0 ? 0 : document_start[Size(position)];
          hi = position + 1;
          break;
        case Mask::kRandom:
          lo = static_cast<int64_t>(rng() % Size(c.k_rows));
          hi = rng() % 4 == 0 ? lo - static_cast<int64_t>(rng() % 3)
                              : lo + 1 + static_cast<int64_t>(rng() % 200);
          break;
      }
    }
  }
}

// Operands that T holds.
template <typename T>
Problem MakeProblem(const Case& c, std::mt19937& rng) {
  Problem p{c.q_rows, c.k_rows, c.batch, c.heads, c.kv_heads, c.dim, c.v_dim, 1 / std::sqrt(double(c.dim)),
            {},       {},       {},      {},      {},         {}};
  std::normal_distribution<double> normal;
  const auto fill = [&](std::vector<double>* x, int64_t n, double sigma) {
    x->resize(Size(n));
    for (double& e : *x) e = RoundTo<T>(sigma * normal(rng));
  };
  fill(&p.q, c.q_rows * c.batch * c.heads * c.dim, c.spread);
  fill(&p.k, c.k_rows * c.batch * c.kv_heads * c.dim, 1);
  const int64_t key_width = c.batch * c.kv_heads * c.dim;
  for (int64_t i = 0; i < c.k_rows * key_width; ++i) {
    p.k[Size(i)] *= std::pow(c.growth, static_cast<double>(i / key_width / 128));
  }
  fill(&p.v, c.k_rows * c.batch * c.kv_heads * c.v_dim, 1);
  fill(&p.dout, c.q_rows * c.batch * c.heads * c.v_dim, 1);
  FillBounds(c, rng, &p);
  return p;
}

// A case with its solutions, made on all cores before the device is needed.
struct Prepared {
  Case c;
  std::mt19937 rng;
  Problem p;                                    // bounds are key rows
  std::vector<int64_t> lo, hi;                  // the bounds as the kernel gets them
  Solution exact, naive;                        // in double, and as T would have it
  std::vector<std::vector<double>> naive_outs;  // of further realizations
};

template <typename T>
Prepared Prepare(const Case& c, uint32_t seed, uint32_t realizations = 1) {
  Prepared made{.c = c,
                .rng = std::mt19937(seed),
                .p = {},
                .lo = {},
                .hi = {},
                .exact = {},
                .naive = {},
                .naive_outs = {}};
  Problem& p = made.p = MakeProblem<T>(c, made.rng);
  made.lo = p.lo;
  made.hi = p.hi;
  for (int64_t& x : p.lo) x = std::clamp<int64_t>(x, 0, c.k_rows);
  for (int64_t& x : p.hi) x = std::clamp<int64_t>(x, 0, c.k_rows);
  made.exact = Solver<double>(p, RoundNot).Solve();
  if constexpr (std::is_same_v<T, bf16>) {
    made.naive = Solver<double>(p, RoundTo<bf16>).Solve();
    for (uint32_t realization = 1; realization < realizations; ++realization) {
      made.naive_outs.push_back(Solver<double>(p, RoundTo<bf16>, realization).SolveOut());
    }
  } else {
    made.naive = Solver<T>(p, RoundNot).Solve();
  }
  return made;
}

// The block of all keys but for its operands; bounds are on the device.
template <typename T>
kernels::CudaAttentionBlock<T> BlockOfCase(const Prepared& prepared, const int64_t* lo, const int64_t* hi) {
  const Case& c = prepared.c;
  return {.q = {},
          .k = {},
          .v = {},
          .q_rows = c.q_rows,
          .k_rows = c.k_rows,
          .batch = c.batch,
          .heads = c.heads,
          .kv_heads = c.kv_heads,
          .dim = c.dim,
          .v_dim = c.v_dim,
          .lo = lo,
          .hi = hi,
          .scale = static_cast<float>(prepared.p.scale)};
}

template <typename T>
std::vector<Prepared> PrepareAll(const std::vector<Case>& cases, uint32_t realizations = 1) {
  std::vector<Prepared> prepared(cases.size());
  ForEachParallel(static_cast<int64_t>(cases.size()), [&](int64_t i) {
    prepared[Size(i)] = Prepare<T>(cases[Size(i)], static_cast<uint32_t>(i), realizations);
  });
  return prepared;
}

// What every kernel is checked on.
inline void AddCommonCases(int64_t dim, int64_t v_dim, std::vector<Case>* cases) {
  const Case common[] = {
      {"one", dim, v_dim, 1, 1, 1, 1, 1},
      {"causal", dim, v_dim, 256, 256, 1, 2, 2},
      {"full tails gqa", dim, v_dim, 129, 191, 2, 4, 2, Mask::kFull},
      {"causal tails gqa", dim, v_dim, 333, 333, 2, 6, 2},
      {"causal 4 chunks", dim, v_dim, 300, 517, 1, 4, 1, Mask::kCausal, 4},
      {"causal early queries", dim, v_dim, 400, 255, 1, 2, 1, Mask::kCausal, 2},
      {"window, far keys NaN", dim, v_dim, 140, 600, 2, 2, 1, Mask::kWindow},
      {"window 4 striped", dim, v_dim, 500, 500, 1, 2, 2, Mask::kWindow, 4, true},
      {"documents 4 chunks", dim, v_dim, 511, 511, 2, 2, 2, Mask::kDocuments, 4},
      {"documents 4 striped", dim, v_dim, 385, 385, 2, 4, 2, Mask::kDocuments, 4, true},
      {"random 4 chunks", dim, v_dim, 410, 390, 2, 4, 2, Mask::kRandom, 4},
      {"random 3 striped", dim, v_dim, 200, 700, 1, 3, 1, Mask::kRandom, 3, true},
  };
  cases->insert(cases->end(), std::begin(common), std::end(common));
}

// Under a sanitizer everything is slow: whole tiles with another of two keys, and tails with empty rows; four
// query tiles or more for each block of keys, so that every buffer of shared memory is used again.
inline void AddSmallCommonCases(int64_t dim, int64_t v_dim, std::vector<Case>* cases) {
  cases->push_back({"full gqa", dim, v_dim, 128, 130, 1, 2, 1, Mask::kFull});
  cases->push_back({"random gqa", dim, v_dim, 70, 100, 1, 2, 1, Mask::kRandom});
}

}  // namespace annulus::testing
