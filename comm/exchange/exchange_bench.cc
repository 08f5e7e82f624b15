#include "annulus/comm/exchange_bench.h"

#include <algorithm>

#include "annulus/device/stream_timer.h"
#include "exchange_timing.h"

namespace annulus {
namespace {

// Adds a message of `rows` from each rank to the one `hop` further, into slot `slot` of the receiver once the
// message before it there has come.
struct Messages {
  RowRange rows;
  int hop = 1, slot = 1;
  std::vector<int> after = {};  // by rank: the step that received the message before; -1: none
};
void AddMessages(Messages* messages, ExchangePlan* plan) {
  const int ranks = plan->problem.ranks;
  if (messages->after.empty()) messages->after.resize(static_cast<size_t>(ranks), -1);
  const int first =
      static_cast<int>(plan->ranks[0].steps.size()) / 2 * ranks;  // a send and a receive a message
  for (int r = 0; r < ranks; ++r) {
    const int to = (r + messages->hop + ranks) % ranks;
    Step send{.kind = StepKind::kSend,
              .slot = 0,
              .block = r,
              .rows = messages->rows,
              .peer = to,
              .message = first + r};
    Step receive = send;
    receive.kind = StepKind::kReceive;
    receive.slot = messages->slot;
    receive.peer = r;
    int& after = messages->after[static_cast<size_t>(to)];
    if (after >= 0) receive.after = {after};
    plan->ranks[static_cast<size_t>(r)].steps.push_back(std::move(send));
    after = static_cast<int>(plan->ranks[static_cast<size_t>(to)].steps.size());
    plan->ranks[static_cast<size_t>(to)].steps.push_back(std::move(receive));
  }
}

enum class Ways { kOne, kBoth };

// Blocks of two rows that neighbours exchange kTimedMessages times; nothing is computed.
ExchangePlan NeighbourPlan(int ranks, Ways ways) {
  ExchangePlan plan{.name = ways == Ways::kOne ? "to the next rank" : "to both neighbours",
                    .pass = Pass::kForward,
                    .problem = {.ranks = ranks, .block_rows = 2, .chunks = {}, .keys = {}, .pairs = {}}};
  for (int r = 0; r < ranks; ++r) {
    plan.problem.chunks.push_back({r, {0, 2}});
    RankPlan& rank = plan.ranks.emplace_back();
    rank.slots.assign(1 + kTimedBuffers, {Payload::kKv, false});
    rank.slots[0].home = true;
  }
  plan.problem.keys.resize(plan.problem.chunks.size() * plan.problem.chunks.size());
  plan.problem.pairs.resize(plan.problem.keys.size());
  std::vector<Messages> lanes;
  for (int slot = 1; slot <= kTimedBuffers; ++slot) {
    if (ways == Ways::kOne) {
      lanes.push_back({.rows = {0, 2}, .hop = 1, .slot = slot});
    } else {
      lanes.push_back({.rows = {0, 1}, .hop = 1, .slot = slot});
      lanes.push_back({.rows = {1, 2}, .hop = -1, .slot = slot});
    }
  }
  for (int i = 0; i < kTimedMessages / kTimedBuffers; ++i) {
    for (Messages& lane : lanes) AddMessages(&lane, &plan);
  }
  return plan;
}

// Of one execution of the plan.
absl::StatusOr<double> PlanSeconds(Context& ctx, Communicator& cp, ExchangeTransport& transport,
                                   const ExchangePlan& plan, TensorRef block, int repeats) {
  ArenaScope scope(ctx.scratch);
  ExchangeBinding binding;
  ANNULUS_ASSIGN_OR_RETURN(binding.slots, transport.Slots(ctx, plan, block, TensorRef()));
  binding.attend = [](const Step&) { return absl::OkStatus(); };
  ExchangeStats stats;
  return MedianSeconds(ctx, cp, repeats, [&] { return transport.Execute(ctx, plan, binding, &stats); });
}

}  // namespace

absl::StatusOr<double> MedianSeconds(Context& ctx, Communicator& cp, int repeats,
                                     const std::function<absl::Status()>& fn) {
  constexpr int kWarmUps = 3;  // memory and streams are made
  StreamTimer timer(ctx);
  std::vector<double> seconds;
  for (int i = 0; i < kWarmUps + repeats; ++i) {
    ANNULUS_RETURN_IF_ERROR(cp.Barrier());
    timer.Begin();
    ANNULUS_RETURN_IF_ERROR(fn());
    const double took = timer.Seconds();
    if (i >= kWarmUps) seconds.push_back(took);
  }
  std::nth_element(seconds.begin(), seconds.begin() + repeats / 2, seconds.end());
  return cp.AllReduceValue(seconds[static_cast<size_t>(repeats / 2)], ReduceOp::kMax);
}

absl::Status CheckRate(const Communicator& cp, int64_t bytes, int repeats) {
  if (cp.size() < 2) return Invalid("ranks=", cp.size(), ": expected at least 2 to exchange between");
  if (bytes < 2 || repeats < 1) {
    return Invalid("bytes=", bytes, ", repeats=", repeats, ": expected at least 2 bytes and 1 repeat");
  }
  return absl::OkStatus();
}

absl::StatusOr<ExchangeRate> MeasureExchange(Context& ctx, Communicator cp, ExchangeTransport& transport,
                                             int64_t bytes, int repeats) {
  ANNULUS_RETURN_IF_ERROR(CheckRate(cp, bytes, repeats));
  const Tensor block(ctx.device, DType::kU8, {2, bytes / 2});
  const double sent = kTimedMessages * static_cast<double>(block.ref().bytes());
  ANNULUS_ASSIGN_OR_RETURN(
      const double one_way,
      PlanSeconds(ctx, cp, transport, NeighbourPlan(cp.size(), Ways::kOne), block.ref(), repeats));
  ANNULUS_ASSIGN_OR_RETURN(
      const double both_ways,
      PlanSeconds(ctx, cp, transport, NeighbourPlan(cp.size(), Ways::kBoth), block.ref(), repeats));
  return ExchangeRate{.one_way_gb_per_second = sent / one_way / 1e9,
                      .both_ways_gb_per_second = sent / both_ways / 1e9};
}

}  // namespace annulus
