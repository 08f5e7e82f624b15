#pragma once

// The order in which a rank hands the steps of a plan to lanes that work strictly in order (streams, NCCL
// communicators). A plan's `after` alone does not keep such lanes from deadlock: two ranks that list messages
// with third ranks differently may each hold up the other's.
//
// Levels. Every step of every rank gets the length of the longest chain of steps that must precede it, over
// `after`, over the order of a rank's computing steps, and with the two ends of a message taken as one. Each
// lane runs its steps by level, and all transfers of a level on a lane as one group that starts together (a
// round). A round of level l waits only for steps below l and for its partners to reach their rounds of level
// l, so by induction on l none waits for ever - not even if lanes block each other in the order in which the
// host enqueued them, as streams that share a hardware queue do.
//
// Levels are as early as possible: a block is listed beside the computing that precedes the freeing of its
// slot, never beside the computing that needs it. Messages that must not wait for each other have lanes of
// their own:
// - Results, because they wait for computing of this and of the peer: on the lane of operands a rank that is
//   late would also hold up the blocks that others need for computing.
// - The two ways round the ring, because the halves of a bidirectional plan free their slots one computing
//   step after the other, so their rounds have different levels, and yet use links that lie beside each
//   other.

#include <vector>

#include "annulus/comm/exchange_plan.h"

namespace annulus {

// Of one level in this order. Lower, higher: the shorter way round the ring from sender to receiver.
enum class ExchangeLane { kOperandsLower, kOperandsHigher, kResultsLower, kResultsHigher, kCompute };
inline constexpr size_t kTransferLanes = 4;  // all but kCompute, which is the last
const char* Name(ExchangeLane lane);         // "operands toward lower ranks"

ExchangeLane LaneOf(const ExchangePlan& plan, int cp_rank, const Step& step);

// What a lane runs at once.
struct Launch {
  int level = 0;
  ExchangeLane lane = ExchangeLane::kCompute;
  // One computing step, or all transfers of the lane and level in order of (peer, index): the messages
  // between two ranks come in one order at both ends.
  std::vector<int> steps = {};
};

// [rank], in the order in which the host enqueues them: by (level, lane). The plan is valid.
std::vector<std::vector<Launch>> LaunchesOf(const ExchangePlan& plan);

}  // namespace annulus
