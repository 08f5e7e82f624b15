#include <algorithm>
#include <tuple>

#include "annulus/base/check.h"
#include "annulus/base/hash.h"
#include "annulus/comm/exchange_plan.h"
#include "row_set.h"

namespace annulus {
namespace {

// Feeds a hasher with everything that two ranks could disagree on. Lists come with their lengths, so that no
// two plans feed it the same.
class PlanHasher {
 public:
  uint64_t Hash(const ExchangePlan& plan) {
    const auto& [name, pass, problem, groups, super_rows, super_size, ranks] = plan;
    AddAll(name, pass, problem, groups, super_rows, super_size, ranks);
    return hasher_.Digest();
  }

 private:
  template <typename T>
    requires(std::is_integral_v<T> || std::is_enum_v<T>)
  void Add(const T& value) {
    hasher_.UpdateValue(static_cast<int64_t>(value));
  }
  template <typename T>
  void Add(const std::vector<T>& values) {
    Add(values.size());
    for (const T& value : values) Add(value);
  }
  template <typename... Values>
  void AddAll(const Values&... values) {
    (Add(values), ...);
  }
  void Add(const std::string& text) {
    Add(text.size());
    hasher_.Update(text.data(), text.size());
  }
  // Structured bindings: a field more would not compile.
  void Add(const RowRange& rows) {
    const auto& [begin, end] = rows;
    AddAll(begin, end);
  }
  void Add(const BlockRows& block_rows) {
    const auto& [block, rows] = block_rows;
    AddAll(block, rows);
  }
  void Add(const Chunk& chunk) {
    const auto& [owner, rows, position, part] = chunk;
    AddAll(owner, rows, position, part);
  }
  void Add(const ExchangeProblem& problem) {
    const auto& [ranks, block_rows, heads, kv_heads, chunks, keys, pairs] = problem;
    AddAll(ranks, block_rows, heads, kv_heads, chunks, keys, pairs);
  }
  void Add(const HeadGroup& group) {
    const auto& [q_begin, q_end, kv_heads] = group;
    AddAll(q_begin, q_end, kv_heads);
  }
  void Add(const SlotSpec& slot) {
    const auto& [payload, home, group, span, width] = slot;
    AddAll(payload, home, group, span, width);
  }
  void Add(const BlockPair& pair) {
    const auto& [q_chunk, kv_chunk, keys, pairs] = pair;
    AddAll(q_chunk, kv_chunk, keys, pairs);
  }
  void Add(const Attend& attend) {
    const auto& [q_slot, kv_slot, q_result, kv_result, q_write, kv_write, arrival, q_rows, kv_rows, pairs] =
        attend;
    AddAll(q_slot, kv_slot, q_result, kv_result, q_write, kv_write, arrival, q_rows, kv_rows, pairs);
  }
  void Add(const Step& step) {
    const auto& [kind, attend, slot, into, rows, peer, message, after] = step;
    AddAll(kind, attend, slot, into, rows, peer, message, after);
  }
  void Add(const RankPlan& rank) {
    const auto& [slots, steps] = rank;
    AddAll(slots, steps);
  }

  Hasher hasher_;
};

}  // namespace

int64_t SlotRows(const ExchangePlan& plan, const SlotSpec& slot) {
  return slot.span == Span::kBlock ? plan.problem.block_rows : plan.super_size;
}

int64_t RowInSlot(const ExchangePlan& plan, const SlotSpec& slot, const BlockRows& rows) {
  if (slot.span == Span::kBlock) return rows.rows.begin;
  const int chunk = ChunkOf(plan.problem, rows);
  ANNULUS_CHECK(chunk >= 0) << plan.name << ": rows [" << rows.rows.begin << ", " << rows.rows.end
                            << ") of block " << rows.block << " lie in no single chunk";
  const size_t c = static_cast<size_t>(chunk);
  return plan.super_rows[c] + rows.rows.begin - plan.problem.chunks[c].rows.begin;
}

bool ArrivesDuring(const RankPlan& rank, const Step& step, int before) {
  if (step.kind != StepKind::kAttend || step.attend.arrival != KeyArrival::kDuring) return false;
  const Step& receive = rank.steps[static_cast<size_t>(before)];
  return receive.kind == StepKind::kReceive && receive.slot == step.attend.kv_slot;
}

int ChunkOf(const ExchangeProblem& problem, const BlockRows& rows) {
  // The last that begins there or before: of chunks that begin at the same row only the last has rows.
  const auto after = std::upper_bound(
      problem.chunks.begin(), problem.chunks.end(), rows, [](const BlockRows& wanted, const Chunk& chunk) {
        return std::tie(wanted.block, wanted.rows.begin) < std::tie(chunk.owner, chunk.rows.begin);
      });
  if (after == problem.chunks.begin()) return -1;
  const auto chunk = after - 1;
  if (chunk->owner != rows.block || !Contains(chunk->rows, rows.rows)) return -1;
  return static_cast<int>(chunk - problem.chunks.begin());
}

uint64_t HashOf(const ExchangePlan& plan) { return PlanHasher().Hash(plan); }

std::vector<int64_t> RowsSent(const ExchangePlan& plan, int cp_rank) {
  const RankPlan& rank = plan.ranks[static_cast<size_t>(cp_rank)];
  std::vector<int64_t> rows(kPayloads);
  for (const Step& step : rank.steps) {
    if (step.kind != StepKind::kSend) continue;
    rows[static_cast<size_t>(rank.slots[static_cast<size_t>(step.slot)].payload)] += step.rows.rows.size();
  }
  return rows;
}

}  // namespace annulus
