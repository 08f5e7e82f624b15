#pragma once

// Random exchange problems with a dense mask behind each. Rows are numbered over all blocks: row i of rank r
// is r * block_rows + i.

#include <algorithm>
#include <string>
#include <vector>

#include "annulus/base/random.h"
#include "annulus/comm/exchange_plan.h"

namespace annulus::testing {

enum class CaseLayout { kContiguous, kZigzag, kStriped, kPieces };
enum class CaseMask { kCausal, kWindow, kDocuments, kFull, kSparse };

struct ExchangeCase {
  std::string name;
  ExchangeProblem problem;
  std::vector<bool> allowed;  // [rows * rows], q * rows + k

  int64_t rows() const { return problem.ranks * problem.block_rows; }
  bool Allowed(int64_t q, int64_t k) const { return allowed[static_cast<size_t>(q * rows() + k)]; }
};

// How a case is cut.
struct CaseCut {
  int parts = 1;  // of each layout chunk
  int64_t heads = 1, kv_heads = 1;
};

class ExchangeCaseMaker {
 public:
  explicit ExchangeCaseMaker(uint64_t seed) : random_(seed, "exchange_cases") {}

  uint64_t Below(uint64_t n) { return random_.Below(draw_++, n); }

  // A sequence of `tokens` (the rest of the ranks * block_rows rows is padding).
  ExchangeCase Make(int ranks, int64_t block_rows, int64_t tokens, CaseLayout layout, CaseMask mask,
                    const CaseCut& cut = {}) {
    static const char* const kLayouts[] = {"contiguous", "zigzag", "striped", "pieces"};
    static const char* const kMasks[] = {"causal", "window", "documents", "full", "sparse"};
    ExchangeCase result;
    result.name = absl::StrCat(ranks, " ranks, ", block_rows, " rows, ", tokens, " tokens, ",
                               kLayouts[static_cast<int>(layout)], ", ", kMasks[static_cast<int>(mask)], ", ",
                               cut.parts, " parts, ", cut.heads, " heads over ", cut.kv_heads);
    result.problem.ranks = ranks;
    result.problem.block_rows = block_rows;
    result.problem.heads = cut.heads;
    result.problem.kv_heads = cut.kv_heads;
    MakeChunks(layout, cut.parts, &result);
    if (mask == CaseMask::kSparse) {
      AllowSparse(&result);
    } else {
      AllowByPosition(layout, mask, tokens, &result);
    }
    DeriveKeys(&result);
    return result;
  }

  ExchangeCase MakeRandom(int ranks, const CaseCut& cut = {}) {
    const auto layout = static_cast<CaseLayout>(Below(4));
    const auto mask = static_cast<CaseMask>(Below(5));
    const int64_t half = static_cast<int64_t>(1 + Below(ranks > 8 ? 4 : 8));
    const int64_t rows = 2 * half * ranks;
    const int64_t tokens =
        rows - static_cast<int64_t>(Below(static_cast<uint64_t>(std::min<int64_t>(rows, 2 * rows / 3 + 1))));
    return Make(ranks, 2 * half, tokens, layout, mask, cut);
  }

 private:
  void MakeChunks(CaseLayout layout, int parts, ExchangeCase* made) {
    const int64_t n = made->problem.block_rows;
    for (int r = 0; r < made->problem.ranks; ++r) {
      std::vector<int64_t> ends = {n};
      if (layout == CaseLayout::kZigzag) ends = {n / 2, n};
      if (layout == CaseLayout::kPieces) {
        for (uint64_t i = Below(3); i > 0; --i)
          ends.push_back(static_cast<int64_t>(Below(static_cast<uint64_t>(n + 1))));
        std::sort(ends.begin(), ends.end());
      }
      int64_t begin = 0;
      for (const int64_t end : ends) {
        for (int part = 0; part < parts; ++part) {
          const RowRange rows{begin + (end - begin) * part / parts,
                              begin + (end - begin) * (part + 1) / parts};
          const int64_t position = PositionOf(layout, made->problem, r, rows.begin);
          made->problem.chunks.push_back({.owner = r, .rows = rows, .position = position, .part = part});
        }
        begin = end;
      }
    }
  }

  // Global position of row i of rank r.
  static int64_t PositionOf(CaseLayout layout, const ExchangeProblem& problem, int64_t r, int64_t i) {
    const int64_t n = problem.block_rows, half = n / 2;
    switch (layout) {
      case CaseLayout::kContiguous:
      case CaseLayout::kPieces:
        return r * n + i;
      case CaseLayout::kZigzag:
        return i < half ? r * half + i : (2 * problem.ranks - 1 - r) * half + (i - half);
      case CaseLayout::kStriped:
        return i * problem.ranks + r;
    }
    return -1;
  }

  void AllowByPosition(CaseLayout layout, CaseMask mask, int64_t tokens, ExchangeCase* made) {
    const int64_t rows = made->rows(), n = made->problem.block_rows;
    std::vector<int64_t> position, document(static_cast<size_t>(rows));
    for (int64_t row = 0; row < rows; ++row)
      position.push_back(PositionOf(layout, made->problem, row / n, row % n));
    for (size_t p = 1; p < document.size(); ++p) document[p] = document[p - 1] + (Below(7) == 0 ? 1 : 0);
    const int64_t window = static_cast<int64_t>(1 + Below(static_cast<uint64_t>(rows)));
    for (const int64_t q : position) {
      for (const int64_t k : position) {
        bool allowed = q < tokens && k < tokens;
        if (mask != CaseMask::kFull) allowed = allowed && k <= q;
        if (mask == CaseMask::kWindow) allowed = allowed && q - k < window;
        if (mask == CaseMask::kDocuments) {
          allowed = allowed && document[static_cast<size_t>(q)] == document[static_cast<size_t>(k)];
        }
        made->allowed.push_back(allowed);
      }
    }
  }

  // Chunks see random ranges of random chunks: blocks skip ranks on their way.
  void AllowSparse(ExchangeCase* made) {
    const int64_t rows = made->rows(), n = made->problem.block_rows;
    made->allowed.assign(static_cast<size_t>(rows * rows), false);
    const uint64_t one_in = 1 + Below(4);
    for (const Chunk& q : made->problem.chunks) {
      for (const Chunk& k : made->problem.chunks) {
        if (Below(one_in) != 0 || k.rows.empty()) continue;
        const auto size = static_cast<uint64_t>(k.rows.size());
        const int64_t begin = k.rows.begin + static_cast<int64_t>(Below(size));
        const int64_t end =
            begin + 1 + static_cast<int64_t>(Below(static_cast<uint64_t>(k.rows.end - begin)));
        for (int64_t i = q.rows.begin; i < q.rows.end; ++i) {
          for (int64_t j = begin; j < end; ++j) {
            made->allowed[static_cast<size_t>((q.owner * n + i) * rows + k.owner * n + j)] = true;
          }
        }
      }
    }
  }

  static void DeriveKeys(ExchangeCase* made) {
    ExchangeProblem& problem = made->problem;
    for (const Chunk& q : problem.chunks) {
      for (const Chunk& k : problem.chunks) {
        RowRange keys;
        int64_t pairs = 0;
        for (int64_t i = q.rows.begin; i < q.rows.end; ++i) {
          for (int64_t j = k.rows.begin; j < k.rows.end; ++j) {
            if (!made->Allowed(q.owner * problem.block_rows + i, k.owner * problem.block_rows + j)) continue;
            keys = pairs == 0 ? RowRange{j, j + 1}
                              : RowRange{std::min(keys.begin, j), std::max(keys.end, j + 1)};
            ++pairs;
          }
        }
        problem.keys.push_back(keys);
        problem.pairs.push_back(pairs);
      }
    }
  }

  RandomStream random_;
  uint64_t draw_ = 0;
};

}  // namespace annulus::testing
