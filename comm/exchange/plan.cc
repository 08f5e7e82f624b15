#include "annulus/base/hash.h"
#include "annulus/comm/exchange_plan.h"

namespace annulus {
namespace {

void HashProblem(const ExchangeProblem& problem, Hasher* hasher) {
  hasher->UpdateValue(problem.ranks);
  hasher->UpdateValue(problem.block_rows);
  hasher->UpdateValue(problem.chunks.size());
  for (const Chunk& chunk : problem.chunks) {
    hasher->UpdateValue(chunk.owner);
    hasher->UpdateValue(chunk.rows);
  }
  for (const RowRange& rows : problem.keys) hasher->UpdateValue(rows);
  for (const int64_t pairs : problem.pairs) hasher->UpdateValue(pairs);
}

void HashStep(const Step& step, Hasher* hasher) {
  for (const int value : {static_cast<int>(step.kind), step.slot, step.grad_slot,
                          static_cast<int>(step.grad_write), step.block, step.peer, step.message}) {
    hasher->UpdateValue(value);
  }
  hasher->UpdateValue(step.rows);
  hasher->UpdateValue(step.pairs.size());
  for (const BlockPair& pair : step.pairs) {
    hasher->UpdateValue(pair.q_chunk);
    hasher->UpdateValue(pair.kv_chunk);
    hasher->UpdateValue(pair.keys);
    hasher->UpdateValue(pair.pairs);
  }
  hasher->UpdateValue(step.after.size());
  for (const int dependency : step.after) hasher->UpdateValue(dependency);
}

}  // namespace

uint64_t HashOf(const ExchangePlan& plan) {
  Hasher hasher;
  hasher.UpdateValue(plan.name.size());
  hasher.Update(plan.name.data(), plan.name.size());
  hasher.UpdateValue(static_cast<int>(plan.pass));
  HashProblem(plan.problem, &hasher);
  hasher.UpdateValue(plan.ranks.size());
  for (const RankPlan& rank : plan.ranks) {
    hasher.UpdateValue(rank.slots.size());
    for (const SlotSpec& slot : rank.slots) {
      hasher.UpdateValue(static_cast<int>(slot.payload));
      hasher.UpdateValue(static_cast<int>(slot.home));
    }
    hasher.UpdateValue(rank.steps.size());
    for (const Step& step : rank.steps) HashStep(step, &hasher);
  }
  return hasher.Digest();
}

int64_t BytesSent(const ExchangePlan& plan, int cp_rank, int64_t kv_row_bytes, int64_t grad_row_bytes) {
  const RankPlan& rank = plan.ranks[static_cast<size_t>(cp_rank)];
  int64_t bytes = 0;
  for (const Step& step : rank.steps) {
    if (step.kind != StepKind::kSend) continue;
    const bool is_kv = rank.slots[static_cast<size_t>(step.slot)].payload == Payload::kKv;
    bytes += step.rows.size() * (is_kv ? kv_row_bytes : grad_row_bytes);
  }
  return bytes;
}

}  // namespace annulus
