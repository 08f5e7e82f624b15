#pragma once

// A scheme: who computes which pair of blocks, when, and by which way operands come and results return.
// CompileScheme makes a plan of it.
//
// Steps are a common clock: in step t every place may compute its visits of step t while what it needs for
// later steps is on its way. An operand may be handed on from one visited place to another that visits it in
// a later step; where that could make places wait for each other in a circle (the slot is needed again too
// soon), its home sends it instead.

#include <functional>
#include <string>
#include <vector>

#include "annulus/base/check.h"
#include "annulus/comm/exchange_build.h"

namespace annulus {

// Who computes a pair of blocks, and in which step. Step 0 is for pairs of a place's own blocks.
struct Assignment {
  int place = 0;
  int step = 0;
};

// Where a place gets a block's operand from: another place that has it earlier, or its home (the block).
// Arrivals of one lane at one place use its buffers in turn.
struct Source {
  int from = 0;
  int lane = 0;
};

enum class ReturnWay {
  kHome,    // a partial result goes straight to its home, which adds it up
  kOnward,  // it goes to the next place that visits the block, which adds its own part; the last sends it
            // home
};

struct Scheme {
  std::string name;
  int parts = 1;  // units that travel: each of that many parts of a block (Chunk::part % parts)
  bool part_of_queries = false;  // the parts are those of query blocks, else of KV blocks
  std::function<Assignment(int q_block, int kv_block, int part)> assign;
  std::function<Source(int block, int part, int to)> q_source, kv_source;  // undefined: home
  ReturnWay q_return = ReturnWay::kHome, kv_return = ReturnWay::kHome;
  int buffers = 2;
  Width output_width = Width::kAccumulator;
};

// `scheme` for a choice; head_split is not looked at. The choice fits the problem's ranks.
Scheme SchemeFor(const ExchangeProblem& problem, const PlanChoice& choice);

// One head group with all heads.
ExchangePlan CompileScheme(const ExchangeProblem& problem, Pass pass, const Scheme& scheme);

// By all places together, by that plan.
int64_t RowsMoved(const ExchangeProblem& problem, Pass pass, const Scheme& scheme);

// PlanKind::kArena, for several ranks.
ExchangePlan BuildArena(const ExchangeProblem& problem, Pass pass, const PlanChoice& choice);

// A plan for `problem` where each `split` neighbouring ranks hold one super-block, each for a part of the
// heads, and `between` (for the super-blocks' problem) is the exchange between places.
ExchangePlan SplitHeads(const ExchangeProblem& problem, Pass pass, int split,
                        const std::function<ExchangePlan(const ExchangeProblem&)>& between);

}  // namespace annulus
