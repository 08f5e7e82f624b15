#pragma once

// Which blocks travel to which ranks, and along which chains.
//
// Distances. A block is at distance t from home on the t-th rank in the ring's direction. Rank r attends to
// its own block (distance 0), then to the blocks that it needs by increasing distance: its visits. Visit n
// uses ring slot n % 2, so the KV of visit n + 1 arrives while visit n is computed.
//
// Chains. A block passes along the ranks that need it. Where rank R may not pass it on to distance u, because
// R needs the slot again for a visit at distance t <= u, the chain ends and home itself sends to u: another
// chain. Thus every wait for a slot ends with an event at a smaller distance, and no set of ranks can wait in
// a circle, even if a send completes only at its receiver; memory stays two slots whatever the mask. Where
// every rank needs every block there is one chain.
//
//     home --> R0 --> R1 --> R2          rows on a hop: those that this or a later rank of the chain needs
//     home --> R3 --> R4                 (a second chain)

#include <vector>

#include "annulus/comm/exchange_plan.h"
#include "row_set.h"

namespace annulus {

// A foreign block on a rank that needs it.
struct Visit {
  int cp_rank = 0, block = 0, distance = 0;
  std::vector<BlockPair> pairs = {};
  RowSet needs = {};
  Visit* previous = nullptr;                               // on the chain; null: home
  Visit* next = nullptr;                                   // on the chain; null: none
  RowSet kv_in = {};                                       // rows that arrive
  RowSet grad_in = {};                                     // gradient rows that arrive from `previous`
  RowSet grad_home = {};                                   // gradient rows that are complete here and go home
  int kv_message = 0, grad_message = 0, home_message = 0;  // ids of the first range's message
};

// Visits point at each other, so a ring is moved, not copied.
struct Ring {
  Ring() = default;
  Ring(Ring&&) = default;
  Ring& operator=(Ring&&) = default;

  std::vector<std::vector<Visit>> visits;         // [rank][n], by distance
  std::vector<std::vector<Visit*>> routes;        // [block], by distance
  std::vector<std::vector<BlockPair>> own_pairs;  // [rank]
};

// From a rank to the next one that a block comes to.
enum class RingStep { kLower = -1, kHigher = 1 };

// All visits, linked, with their rows and message numbers; gradients have none in forward.
Ring FindRing(const ExchangeProblem& problem, Pass pass, RingStep step);

// For each chunk of keys the hull of what `pairs` need, united.
RowSet NeedsOf(const std::vector<BlockPair>& pairs);

}  // namespace annulus
