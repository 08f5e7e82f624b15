#pragma once

// Random exchange problems with a dense mask behind each, and attention replaced by integer sums, so that
// what a plan computes can be compared exactly with a direct computation:
//   forward    out[q] = sum over allowed k of weight(q, k) * value(k)
//   backward   grad[k] = sum over allowed q of weight(q, k) * value(q)
// Rows are numbered over all blocks: row i of rank r is r * block_rows + i.

#include <algorithm>
#include <functional>
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

// Differ from one execution of a plan to the next.
inline int64_t ToyValue(int64_t row, int64_t execution) {
  return ((row + 101 * execution) * 2654435761) % 1009 + 1;
}
inline int64_t ToyWeight(int64_t q, int64_t k) { return (q * 31 + k * 17) % 13 + 1; }

class ExchangeCaseMaker {
 public:
  explicit ExchangeCaseMaker(uint64_t seed) : random_(seed, "exchange_cases") {}

  uint64_t Below(uint64_t n) { return random_.Below(draw_++, n); }

  // A sequence of `tokens` (the rest of the ranks * block_rows rows is padding).
  ExchangeCase Make(int ranks, int64_t block_rows, int64_t tokens, CaseLayout layout, CaseMask mask) {
    static const char* const kLayouts[] = {"contiguous", "zigzag", "striped", "pieces"};
    static const char* const kMasks[] = {"causal", "window", "documents", "full", "sparse"};
    ExchangeCase result;
    result.name = absl::StrCat(ranks, " ranks, ", block_rows, " rows, ", tokens, " tokens, ",
                               kLayouts[static_cast<int>(layout)], ", ", kMasks[static_cast<int>(mask)]);
    result.problem.ranks = ranks;
    result.problem.block_rows = block_rows;
    MakeChunks(layout, &result);
    if (mask == CaseMask::kSparse) {
      AllowSparse(&result);
    } else {
      AllowByPosition(layout, mask, tokens, &result);
    }
    DeriveKeys(&result);
    return result;
  }

  ExchangeCase MakeRandom(int ranks) {
    const auto layout = static_cast<CaseLayout>(Below(4));
    const auto mask = static_cast<CaseMask>(Below(5));
    const int64_t half = static_cast<int64_t>(1 + Below(ranks > 8 ? 4 : 8));
    const int64_t rows = 2 * half * ranks;
    const int64_t tokens =
        rows - static_cast<int64_t>(Below(static_cast<uint64_t>(std::min<int64_t>(rows, 2 * rows / 3 + 1))));
    return Make(ranks, 2 * half, tokens, layout, mask);
  }

 private:
  void MakeChunks(CaseLayout layout, ExchangeCase* made) {
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
        made->problem.chunks.push_back({r, {begin, end}});
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

// One rank's memory while a plan runs with toy attention. Every slot row holds two values: the sum or value,
// and its negative, so that halves of different messages do not fit together.
class ToyRank {
 public:
  ToyRank(const ExchangeCase& exchange_case, const ExchangePlan& plan, int cp_rank, int64_t execution = 0)
      : case_(exchange_case),
        plan_(plan),
        cp_rank_(cp_rank),
        execution_(execution),
        out_(static_cast<size_t>(plan.problem.block_rows)) {
    const int64_t n = plan.problem.block_rows;
    for (const SlotSpec& spec : plan.ranks[static_cast<size_t>(cp_rank)].slots) {
      memory_.emplace_back(static_cast<size_t>(2 * n), kGarbage);
      slots_.emplace_back(memory_.back().data(), memory_.back().size());
      if (!spec.home) continue;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t value = spec.payload == Payload::kKv ? ToyValue(cp_rank * n + i, execution) : 0;
        memory_.back()[static_cast<size_t>(2 * i)] = value;
        memory_.back()[static_cast<size_t>(2 * i + 1)] = -value;
      }
    }
  }

  ToyRank(ToyRank&&) = default;

  std::vector<TensorRef> refs() {
    std::vector<TensorRef> result;
    for (const absl::Span<int64_t>& slot : slots_) {
      result.emplace_back(slot.data(), DType::kI64, Device{}, Shape{plan_.problem.block_rows, 2});
    }
    return result;
  }
  absl::Span<int64_t> slot(int index) { return slots_[static_cast<size_t>(index)]; }
  // Slots move, with what they hold, to other memory like refs().
  void Bind(const std::vector<TensorRef>& slots) {
    for (size_t s = 0; s < slots_.size(); ++s) {
      const absl::Span<int64_t> to(slots[s].data<int64_t>(), slots_[s].size());
      if (to.data() != slots_[s].data()) std::copy(slots_[s].begin(), slots_[s].end(), to.begin());
      slots_[s] = to;
    }
  }

  void Attend(const Step& step) {
    const int64_t n = plan_.problem.block_rows;
    if (step.grad_slot >= 0 && step.grad_write == GradWrite::kOverwrite) {
      std::fill(slot(step.grad_slot).begin() + 2 * step.rows.begin,
                slot(step.grad_slot).begin() + 2 * step.rows.end, 0);
    }
    for (const BlockPair& pair : step.pairs) {
      const RowRange& queries = plan_.problem.chunks[static_cast<size_t>(pair.q_chunk)].rows;
      for (int64_t i = queries.begin; i < queries.end; ++i) {
        for (int64_t j = pair.keys.begin; j < pair.keys.end; ++j) {
          const int64_t q = cp_rank_ * n + i, k = step.block * n + j;
          if (!case_.Allowed(q, k)) continue;
          out_[static_cast<size_t>(i)] += ToyWeight(q, k) * slot(step.slot)[static_cast<size_t>(2 * j)];
          if (slot(step.slot)[static_cast<size_t>(2 * j)] != -slot(step.slot)[static_cast<size_t>(2 * j + 1)])
            torn_ = true;
          if (step.grad_slot < 0) continue;
          slot(step.grad_slot)[static_cast<size_t>(2 * j)] += ToyWeight(q, k) * ToyValue(q, execution_);
          slot(step.grad_slot)[static_cast<size_t>(2 * j + 1)] -= ToyWeight(q, k) * ToyValue(q, execution_);
        }
      }
    }
  }
  void Reduce(const Step& step) {
    for (int64_t i = 2 * step.rows.begin; i < 2 * step.rows.end; ++i) {
      slot(step.grad_slot)[static_cast<size_t>(i)] += slot(step.slot)[static_cast<size_t>(i)];
    }
  }

  // Empty if outputs and, in backward, the gradient of the own block are those of the direct computation.
  std::string Compare() const {
    const int64_t n = plan_.problem.block_rows;
    if (torn_) return absl::StrCat("rank ", cp_rank_, " read a torn row");
    std::vector<int64_t> grad(static_cast<size_t>(2 * n));
    for (int64_t i = 0; i < n; ++i) {
      const int64_t own = cp_rank_ * n + i;
      int64_t out = 0;
      for (int64_t other = 0; other < case_.rows(); ++other) {
        if (case_.Allowed(own, other)) out += ToyWeight(own, other) * ToyValue(other, execution_);
        if (case_.Allowed(other, own))
          grad[static_cast<size_t>(2 * i)] += ToyWeight(other, own) * ToyValue(other, execution_);
      }
      grad[static_cast<size_t>(2 * i + 1)] = -grad[static_cast<size_t>(2 * i)];
      if (out_[static_cast<size_t>(i)] != out)
        return absl::StrCat("rank ", cp_rank_, ": out of row ", i, " is wrong");
    }
    const std::vector<SlotSpec>& specs = plan_.ranks[static_cast<size_t>(cp_rank_)].slots;
    for (size_t s = 0; s < specs.size(); ++s) {
      if (!specs[s].home || specs[s].payload != Payload::kKvGrad) continue;
      if (slots_[s] != grad) return absl::StrCat("rank ", cp_rank_, ": the gradient is wrong");
    }
    return "";
  }

 private:
  static constexpr int64_t kGarbage = 0x5a5a5a5a5a5a;
  const ExchangeCase& case_;
  const ExchangePlan& plan_;
  const int cp_rank_;
  const int64_t execution_;
  std::vector<std::vector<int64_t>> memory_;
  std::vector<absl::Span<int64_t>> slots_;
  std::vector<int64_t> out_;
  bool torn_ = false;
};

// Runs all ranks of a plan in one thread, each time taking a random one of the steps that may run, a send
// together with its receive. Empty if it ends with the right results, else what is wrong.
inline std::string RunInRandomOrder(const ExchangeCase& exchange_case, const ExchangePlan& plan,
                                    uint64_t seed) {
  const RandomStream random(seed, "order");
  std::vector<ToyRank> ranks;
  std::vector<std::vector<bool>> done;
  for (size_t r = 0; r < plan.ranks.size(); ++r) {
    ranks.emplace_back(exchange_case, plan, static_cast<int>(r));
    done.emplace_back(plan.ranks[r].steps.size());
  }
  const auto runnable = [&](size_t r, size_t s) {
    const std::vector<Step>& steps = plan.ranks[r].steps;
    if (done[r][s]) return false;
    for (const int before : steps[s].after) {
      if (!done[r][static_cast<size_t>(before)]) return false;
    }
    const auto computes = [](const Step& step) {
      return step.kind == StepKind::kAttend || step.kind == StepKind::kReduce;
    };
    for (size_t before = 0; before < s && computes(steps[s]); ++before) {
      if (computes(steps[before]) && !done[r][before]) return false;
    }
    return true;
  };
  struct Choice {
    size_t rank, step, to_rank = 0, to_step = 0;
  };
  for (uint64_t draw = 0;; ++draw) {
    std::vector<Choice> choices;
    for (size_t r = 0; r < plan.ranks.size(); ++r) {
      for (size_t s = 0; s < plan.ranks[r].steps.size(); ++s) {
        const Step& step = plan.ranks[r].steps[s];
        if (step.kind == StepKind::kReceive || !runnable(r, s)) continue;
        if (step.kind != StepKind::kSend) {
          choices.push_back({r, s});
          continue;
        }
        const size_t to = static_cast<size_t>(step.peer);
        for (size_t t = 0; t < plan.ranks[to].steps.size(); ++t) {
          const Step& receive = plan.ranks[to].steps[t];
          const bool match = receive.kind == StepKind::kReceive && receive.peer == static_cast<int>(r) &&
                             receive.message == step.message && receive.rows.size() == step.rows.size();
          if (match && runnable(to, t)) choices.push_back({r, s, to, t});
        }
      }
    }
    if (choices.empty()) break;
    const Choice& choice = choices[random.Below(draw, choices.size())];
    const Step& step = plan.ranks[choice.rank].steps[choice.step];
    done[choice.rank][choice.step] = true;
    if (step.kind == StepKind::kAttend) ranks[choice.rank].Attend(step);
    if (step.kind == StepKind::kReduce) ranks[choice.rank].Reduce(step);
    if (step.kind == StepKind::kSend) {
      const Step& receive = plan.ranks[choice.to_rank].steps[choice.to_step];
      const absl::Span<int64_t> from = ranks[choice.rank].slot(step.slot);
      std::copy(from.begin() + 2 * step.rows.begin, from.begin() + 2 * step.rows.end,
                ranks[choice.to_rank].slot(receive.slot).begin() + 2 * receive.rows.begin);
      done[choice.to_rank][choice.to_step] = true;
    }
  }
  for (size_t r = 0; r < ranks.size(); ++r) {
    const auto stuck = std::find(done[r].begin(), done[r].end(), false);
    if (stuck != done[r].end())
      return absl::StrCat("rank ", r, " is stuck at step ", stuck - done[r].begin());
    if (std::string wrong = ranks[r].Compare(); !wrong.empty()) return wrong;
  }
  return "";
}

// Whether two steps of a rank may run together and touch one row of a slot, at least one writing it. By
// search from each step and row by row.
inline bool HasRace(const ExchangePlan& plan) {
  const size_t n = static_cast<size_t>(plan.problem.block_rows);
  for (const RankPlan& rank : plan.ranks) {
    const size_t count = rank.steps.size();
    // reads, writes: [step][slot * n + row]
    std::vector<std::vector<bool>> reads(count, std::vector<bool>(rank.slots.size() * n)), writes = reads;
    const auto mark = [&](std::vector<bool>& rows, int slot, const RowRange& range) {
      for (int64_t i = range.begin; i < range.end; ++i)
        rows[static_cast<size_t>(slot) * n + static_cast<size_t>(i)] = true;
    };
    std::vector<std::vector<size_t>> next(count);
    std::vector<size_t> computing;
    for (size_t s = 0; s < count; ++s) {
      const Step& step = rank.steps[s];
      for (const int before : step.after) next[static_cast<size_t>(before)].push_back(s);
      const bool attend = step.kind == StepKind::kAttend;
      if (attend || step.kind == StepKind::kReduce) {
        if (!computing.empty()) next[computing.back()].push_back(s);
        computing.push_back(s);
      }
      for (const BlockPair& pair : step.pairs) {
        mark(reads[s], step.slot, pair.keys);
        if (step.grad_slot >= 0) mark(writes[s], step.grad_slot, pair.keys);
      }
      if (attend && step.grad_write == GradWrite::kOverwrite) mark(writes[s], step.grad_slot, step.rows);
      if (!attend) mark(step.kind == StepKind::kReceive ? writes[s] : reads[s], step.slot, step.rows);
      if (step.kind == StepKind::kReduce) mark(writes[s], step.grad_slot, step.rows);
    }
    for (size_t s = 0; s < count; ++s) {
      std::vector<bool> reached(count);
      const std::function<void(size_t)> visit = [&](size_t from) {
        for (const size_t to : next[from]) {
          if (!reached[to]) reached[to] = true, visit(to);
        }
      };
      visit(s);
      for (size_t t = s + 1; t < count; ++t) {
        if (reached[t]) continue;
        for (size_t i = 0; i < reads[s].size(); ++i) {
          if ((writes[s][i] && (writes[t][i] || reads[t][i])) || (reads[s][i] && writes[t][i])) return true;
        }
      }
    }
  }
  return false;
}

}  // namespace annulus::testing
