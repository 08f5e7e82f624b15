#include <algorithm>

#include "annulus/comm/exchange_build.h"
#include "scheme.h"

namespace annulus {
namespace {

// What a kind means by the fields of a choice that not all kinds read.
struct KindTraits {
  const char* name;
  bool one_way;  // reads direction
  int ways;      // in which a block's parts go round
  bool reads_parts;
  bool reads_inner;
  bool moves_queries;  // so outputs travel
  bool splits_heads = true;
};
constexpr KindTraits kTraits[kPlanKinds] = {
    {"all_gather", false, 1, true, false, false},
    {"kv_ring", true, 1, true, false, false},
    {"bidirectional_kv_ring", false, 2, true, false, false},
    {"direct_cast", false, 1, true, false, false},
    {"token_ring", true, 1, true, false, true},
    {"bidirectional_token_ring", false, 2, true, false, true},
    {"balanced", false, 1, false, false, true},
    {"double_ring", false, 1, false, true, false},
    {"mesh", false, 1, false, true, true},
    {"arena", false, 1, true, false, false, false},
};
const KindTraits& TraitsOf(PlanKind kind) { return kTraits[static_cast<size_t>(kind)]; }

std::string HeadsText(const PlanChoice& choice) {
  return choice.head_split > 1 ? absl::StrCat(", heads over ", choice.head_split, " ranks") : "";
}

ExchangePlan BuildUnsplit(const ExchangeProblem& problem, Pass pass, PlanChoice choice) {
  if (TraitsOf(choice.kind).one_way && choice.direction == RingDirection::kFewestRows) {
    PlanChoice lower = choice;
    lower.direction = RingDirection::kTowardLower;
    choice.direction = RingDirection::kTowardHigher;
    if (RowsMoved(problem, pass, SchemeFor(problem, choice)) >=
        RowsMoved(problem, pass, SchemeFor(problem, lower))) {
      choice = lower;
    }
  }
  if (choice.kind == PlanKind::kArena && problem.ranks > 1) return BuildArena(problem, pass, choice);
  return CompileScheme(problem, pass, SchemeFor(problem, choice));
}

absl::Status CheckChoice(const ExchangeProblem& problem, const PlanChoice& choice) {
  const KindTraits& traits = TraitsOf(choice.kind);
  if (choice.head_split < 1 || problem.ranks % choice.head_split != 0) {
    return Invalid("head_split=", choice.head_split, ": expected a divisor of the ", problem.ranks,
                   " ranks: groups of neighbouring ranks share out the heads");
  }
  const int places = problem.ranks / choice.head_split;
  if (!traits.splits_heads && choice.head_split > 1) {
    return Invalid("head_split=", choice.head_split, ": expected 1 for an ", traits.name,
                   ", which has all heads");
  }
  if (traits.reads_inner && (choice.inner < 1 || places % choice.inner != 0)) {
    return Invalid("inner=", choice.inner, ": expected a divisor of the ", places, " places that a ",
                   traits.name, " connects");
  }
  if (choice.buffers < 2) return Invalid("buffers=", choice.buffers, ": expected at least 2");
  if (choice.parts < 1) return Invalid("parts=", choice.parts, ": expected at least 1");
  const int parts = ChunkParts(choice);
  for (const Chunk& chunk : problem.chunks) {
    if (chunk.part < parts) continue;
    return Invalid("the problem cuts chunks in at least ", chunk.part + 1, " parts: expected ", parts,
                   " for ", NameOf(choice, problem.ranks));
  }
  return absl::OkStatus();
}

}  // namespace

const char* Name(PlanKind kind) { return TraitsOf(kind).name; }

std::string NameOf(const PlanChoice& choice, int ranks) {
  if (ranks == 1) return kNoExchange;
  if (choice.head_split == ranks && ranks > 1) return "ulysses";
  const KindTraits& traits = TraitsOf(choice.kind);
  std::string name = traits.name;
  if (traits.one_way && choice.direction == RingDirection::kTowardLower) name += " toward lower ranks";
  if (traits.one_way && choice.direction == RingDirection::kTowardHigher) name += " toward higher ranks";
  if (traits.reads_inner)
    name += absl::StrCat(" of ", ranks / choice.head_split / choice.inner, " x ", choice.inner);
  if (choice.parts > 1 && traits.reads_parts) name += absl::StrCat(", ", choice.parts, " parts");
  if (choice.buffers > 2) name += absl::StrCat(", ", choice.buffers, " buffers");
  if (traits.moves_queries && choice.output_width == Width::kCompute) name += ", rounded outputs";
  return name + HeadsText(choice);
}

int ChunkParts(const PlanChoice& choice) {
  const KindTraits& traits = TraitsOf(choice.kind);
  return (traits.reads_parts ? choice.parts : 1) * traits.ways;
}

absl::StatusOr<ExchangePlan> BuildPlan(const ExchangeProblem& problem, Pass pass, const PlanChoice& choice) {
  ANNULUS_RETURN_IF_ERROR(CheckChoice(problem, choice));
  if (choice.head_split == 1) return BuildUnsplit(problem, pass, choice);
  ExchangePlan plan = SplitHeads(problem, pass, choice.head_split, [&](const ExchangeProblem& between) {
    PlanChoice unsplit = choice;
    unsplit.head_split = 1;
    return BuildUnsplit(between, pass, unsplit);
  });
  // The plan between places knows which way round it goes.
  plan.name = choice.head_split == problem.ranks ? NameOf(choice, problem.ranks)
                                                 : absl::StrCat(plan.name, HeadsText(choice));
  return plan;
}

std::vector<PlanChoice> AllChoices(int ranks, int64_t heads) {
  if (ranks == 1) return {{}};  // all are the same: nothing is exchanged
  std::vector<PlanChoice> choices;
  for (int split = 1; split <= ranks; ++split) {
    if (ranks % split != 0 || split > heads) continue;
    const int places = ranks / split;
    if (places == 1 && split > 1) {
      choices.push_back({.kind = PlanKind::kKvRing, .head_split = split});
      continue;
    }
    for (int k = 0; k < kPlanKinds; ++k) {
      const PlanKind kind = static_cast<PlanKind>(k);
      if (split > 1 && !TraitsOf(kind).splits_heads) continue;
      if (!TraitsOf(kind).reads_inner) {
        choices.push_back({.kind = kind, .head_split = split});
        continue;
      }
      for (int inner = 2; inner < places; ++inner) {
        if (places % inner == 0) choices.push_back({.kind = kind, .head_split = split, .inner = inner});
      }
    }
  }
  return choices;
}

}  // namespace annulus
