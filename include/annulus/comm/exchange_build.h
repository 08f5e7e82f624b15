#pragma once

// Builders of exchange plans. What differs between schemes is who computes which pair of blocks, in which
// order, and by which way operands come and results return; everything else follows (comm/exchange/scheme.h).

#include "annulus/comm/exchange_plan.h"

namespace annulus {

// P ranks. "Travels" is what moves; the other side stays at home.
enum class PlanKind {
  kAllGather,            // all needed KV at once, then computing; O(P) memory
  kKvRing,               // KV travels from neighbour to neighbour (Liu et al. 2023, Ring Attention)
  kBidirectionalKvRing,  // half of each KV block travels each way
  kDirectCast,           // KV goes from its owner straight to each rank, in the order of their need
  kTokenRing,  // queries travel, partial outputs return straight (TokenRing 2024); backward: queries,
               // output gradient, LSE, delta out, dQ back
  kBidirectionalTokenRing,  // half of each query block travels each way
  kBalanced,    // each pair of blocks is computed by the owner of its queries or of its keys, so that
                // the work is even (DistFlashAttn's schedule, for any mask)
  kDoubleRing,  // KV rings inside nodes, and a ring of nodes (LoongTrain)
  kMesh,        // tiles of queries x keys (Mesh-Attention)
  kArena,       // all needed KV into one buffer, on which one step computes; forward it takes keys as they
                // come (KeyArrival::kDuring). O(P) memory; heads are not split
};
inline constexpr int kPlanKinds = 10;
const char* Name(PlanKind kind);  // "kv_ring"

// Direction in which blocks move: toward lower or higher ranks, or whichever moves fewer rows.
enum class RingDirection { kFewestRows, kTowardLower, kTowardHigher };

struct PlanChoice {
  PlanKind kind = PlanKind::kKvRing;
  RingDirection direction = RingDirection::kFewestRows;  // of one-way rings
  // Heads are split over groups of this many neighbouring ranks, which exchange sequence for heads by
  // all-to-all; `kind` exchanges between the groups. = ranks: Ulysses (Jacobs et al. 2023), where `kind`
  // means nothing; between 1 and ranks: 2-D (USP). Any number of heads: parts may differ by one head.
  int head_split = 1;
  int inner = 1;  // kDoubleRing: ranks of a node; kMesh: ranks that share a tile row (the same queries)
  int parts =
      1;  // each block travels and is computed on in this many pieces (twice as many if bidirectional)
  int buffers = 2;                           // slots for each travelling operand: 2 or more
  Width output_width = Width::kAccumulator;  // of partial outputs that travel
  friend bool operator==(const PlanChoice&, const PlanChoice&) = default;
};
// The name of every plan of one rank.
inline constexpr char kNoExchange[] = "no exchange";
// "kv_ring toward lower ranks, heads over 2 ranks"; "ulysses"
std::string NameOf(const PlanChoice& choice, int ranks);

// In how many parts of equal size the problem must cut each layout chunk (Chunk::part).
int ChunkParts(const PlanChoice& choice);

// InvalidArgument, naming field, value and reason, for a choice that cannot be: head_split or inner that does
// not divide what it splits. Only what some rank needs is moved, whatever the mask. Slots for travelling
// blocks do not grow with the number of ranks but for kAllGather, kArena and, by what they gather, head_split
// and kMesh.
absl::StatusOr<ExchangePlan> BuildPlan(const ExchangeProblem& problem, Pass pass, const PlanChoice& choice);

// All choices that can be built for this many ranks and heads, each once; 2-D ones for every divisor.
std::vector<PlanChoice> AllChoices(int ranks, int64_t heads);

}  // namespace annulus
