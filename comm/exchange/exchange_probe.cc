#include <algorithm>

#include "annulus/comm/exchange_bench.h"
#include "annulus/device/span_clock.h"

namespace annulus {
namespace {

constexpr int kHome = 0, kFromBefore = 1, kFromNext = 2, kAside = 3;  // slots of each rank

// Blocks of one row; nothing is computed.
ExchangePlan EmptyPlan(int ranks) {
  ExchangePlan plan{.name = "probe", .pass = Pass::kForward, .problem = {}};
  plan.problem.ranks = ranks;
  plan.problem.block_rows = 1;
  plan.groups = {{.q_begin = 0, .q_end = 1, .kv_heads = {0}}};
  const SlotSpec foreign{.payload = Payload::kKv}, home{.payload = Payload::kKv, .home = true};
  for (int r = 0; r < ranks; ++r) {
    plan.problem.chunks.push_back({r, {0, 1}, r});
    plan.ranks.push_back({.slots = {home, foreign, foreign, foreign}, .steps = {}});
  }
  plan.problem.keys.resize(static_cast<size_t>(ranks * ranks));
  plan.problem.pairs.resize(plan.problem.keys.size());
  return plan;
}

// A message, and the steps at its ends that must be complete before.
struct Hop {
  int from = 0, to = 0;
  int from_slot = kHome, to_slot = kFromBefore;
  int block = 0;
  int send_after = -1, receive_after = -1;  // of the sender; of the receiver; -1: none
};
// Of a message's ends: their steps.
struct HopSteps {
  int send = -1, receive = -1;
};

HopSteps AddHop(const Hop& hop, int message, ExchangePlan* plan) {
  const auto add = [&](StepKind kind, int rank, int slot, int peer, int after) {
    std::vector<Step>& steps = plan->ranks[static_cast<size_t>(rank)].steps;
    Step step{.kind = kind, .slot = slot, .rows = {hop.block, {0, 1}}, .peer = peer, .message = message};
    if (after >= 0) step.after = {after};
    steps.push_back(std::move(step));
    return static_cast<int>(steps.size()) - 1;
  };
  return {.send = add(StepKind::kSend, hop.from, hop.from_slot, hop.to, hop.send_after),
          .receive = add(StepKind::kReceive, hop.to, hop.to_slot, hop.from, hop.receive_after)};
}

// The block of rank 0 goes round the ring.
ExchangePlan RelayPlan(int ranks, int hops) {
  ExchangePlan plan = EmptyPlan(ranks);
  std::vector<HopSteps> done;  // by hop
  for (int h = 0; h < hops; ++h) {
    Hop hop{.from = h % ranks, .to = (h + 1) % ranks};
    if (h > 0) hop.from_slot = kFromBefore, hop.send_after = done.back().receive;
    // The receiver's slot is free once it has sent on what came the last time.
    const int last_sent = h + 1 - ranks;
    if (last_sent > 0) hop.receive_after = done[static_cast<size_t>(last_sent)].send;
    done.push_back(AddHop(hop, h, &plan));
  }
  return plan;
}

// `messages` from each rank to each neighbour, and beside them one computing step.
ExchangePlan BusyPlan(int ranks, int messages) {
  ExchangePlan plan = EmptyPlan(ranks);
  for (int r = 0; r < ranks; ++r) {
    plan.ranks[static_cast<size_t>(r)].steps.push_back(
        {.kind = StepKind::kCopy, .slot = kHome, .into = kAside, .rows = {r, {0, 1}}});
  }
  std::vector<int> from_before(static_cast<size_t>(ranks), -1), from_next = from_before;
  int message = 0;
  for (int m = 0; m < messages; ++m) {
    for (int r = 0; r < ranks; ++r) {
      const int next = (r + 1) % ranks, before = (r + ranks - 1) % ranks;
      int& up = from_before[static_cast<size_t>(next)];
      int& down = from_next[static_cast<size_t>(before)];
      up = AddHop({.from = r, .to = next, .block = r, .receive_after = up}, message++, &plan).receive;
      const Hop back{.from = r, .to = before, .to_slot = kFromNext, .block = r, .receive_after = down};
      down = AddHop(back, message++, &plan).receive;
    }
  }
  return plan;
}

struct ProbeSeconds {
  double all = 0;        // from the beginning of an execution to its end
  double computing = 0;  // of its computing step
};

// Runs plans whose rows are `bytes` each.
class Probe {
 public:
  Probe(Context& ctx, Communicator& cp, ExchangeTransport& transport, int64_t bytes, int repeats)
      : ctx_(ctx),
        cp_(cp),
        transport_(transport),
        repeats_(repeats),
        block_(ctx.device, DType::kU8, {1, bytes}) {}

  // Of the slowest rank, the least of some repeats: what disturbs only adds.
  absl::StatusOr<ProbeSeconds> Least(
      const ExchangePlan& plan,
      const std::function<absl::Status()>& compute = [] { return absl::OkStatus(); }) {
    ArenaScope scope(ctx_.scratch);
    SpanClock all(ctx_.device), computing(ctx_.device);
    ANNULUS_ASSIGN_OR_RETURN(const ExchangeBinding binding, Bind(plan, compute, &computing));
    std::vector<ProbeSeconds> slowest;
    for (int i = -1; i < repeats_; ++i) {  // the first makes memory and streams
      ANNULUS_RETURN_IF_ERROR(cp_.Barrier());
      ExchangeStats stats;
      all.Begin(ctx_.stream());
      const absl::Status status = transport_.Execute(ctx_, plan, binding, &stats);
      all.End(ctx_.stream());
      ANNULUS_RETURN_IF_ERROR(cp_.AgreeOk(status));
      ctx_.lane.Synchronize();
      double seconds[2] = {all.Take().seconds, computing.Take().seconds};
      ANNULUS_RETURN_IF_ERROR(cp_.AllReduce(TensorRef(seconds, DType::kF64, Device{}, {2}), ReduceOp::kMax));
      if (i >= 0) slowest.push_back({.all = seconds[0], .computing = seconds[1]});
    }
    ProbeSeconds least = slowest.front();
    for (const ProbeSeconds& each : slowest) {
      least = {.all = std::min(least.all, each.all), .computing = std::min(least.computing, each.computing)};
    }
    return least;
  }

 private:
  absl::StatusOr<ExchangeBinding> Bind(const ExchangePlan& plan, const std::function<absl::Status()>& compute,
                                       SpanClock* computing) {
    const SlotField field{.dtype = DType::kU8, .row = {block_.ref().bytes()}};
    ExchangeBinding binding;
    ANNULUS_ASSIGN_OR_RETURN(
        binding.slots, transport_.Slots(ctx_, plan,
                                        {.home = [&](Payload) { return SlotMemory{{block_.ref()}}; },
                                         .fields = [&](const SlotSpec&) { return std::vector{field}; }}));
    binding.compute = [this, &compute, computing](const Step&) {
      computing->Begin(ctx_.stream());
      const absl::Status status = compute();
      computing->End(ctx_.stream());
      return status;
    };
    return binding;
  }

  Context& ctx_;
  Communicator& cp_;
  ExchangeTransport& transport_;
  int repeats_;
  Tensor block_;
};

absl::Status CheckProbe(const Communicator& cp, int repeats) {
  if (cp.size() < 2) return Invalid("ranks=", cp.size(), ": expected at least 2 to exchange between");
  if (repeats < 1) return Invalid("repeats=", repeats, ": expected at least 1");
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<double> MeasureMessageSeconds(Context& ctx, Communicator cp, ExchangeTransport& transport,
                                             int repeats) {
  constexpr int kRounds = 16;
  ANNULUS_RETURN_IF_ERROR(CheckProbe(cp, repeats));
  const int hops = kRounds * cp.size();
  Probe probe(ctx, cp, transport, /*bytes=*/16, repeats);
  ANNULUS_ASSIGN_OR_RETURN(const ProbeSeconds seconds, probe.Least(RelayPlan(cp.size(), hops)));
  return seconds.all / hops;
}

absl::StatusOr<double> MeasureSlowdown(Context& ctx, Communicator cp, ExchangeTransport& transport,
                                       int64_t bytes, const std::function<absl::Status()>& compute,
                                       int repeats) {
  constexpr int kSample = 8;
  ANNULUS_RETURN_IF_ERROR(CheckProbe(cp, repeats));
  Probe probe(ctx, cp, transport, bytes, repeats);
  ANNULUS_ASSIGN_OR_RETURN(const ProbeSeconds alone, probe.Least(BusyPlan(cp.size(), 0), compute));
  ANNULUS_ASSIGN_OR_RETURN(const ProbeSeconds sample, probe.Least(BusyPlan(cp.size(), kSample)));
  // Messages for as long as the computing takes, were it half as fast.
  const double messages = std::clamp(2 * kSample * alone.computing / sample.all, 1.0, 1000.0);
  ANNULUS_ASSIGN_OR_RETURN(const ProbeSeconds busy,
                           probe.Least(BusyPlan(cp.size(), static_cast<int>(messages)), compute));
  return std::max(1.0, busy.computing / alone.computing);
}

}  // namespace annulus
