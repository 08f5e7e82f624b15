// The schemes by formulas: place and step of each pair of blocks, and neighbours.

#include <algorithm>
#include <memory>
#include <numeric>

#include "scheme.h"

namespace annulus {
namespace {

int Mod(int value, int modulus) { return (value % modulus + modulus) % modulus; }

// Toward lower ranks a block of rank b is at step t on rank b - t.
constexpr int kTowardLower = -1, kTowardHigher = 1;
int RingDistance(int block, int place, int direction, int ranks) {
  return Mod((place - block) * direction, ranks);
}

enum class Travels { kQueries, kKv };

// Part p of a block goes round toward directions[p % size]. All pieces of a block pass before the next block.
Scheme Rings(const ExchangeProblem& problem, Travels travels, std::vector<int> directions, int parts) {
  const int ranks = problem.ranks;
  const int ways = static_cast<int>(directions.size());
  const bool queries = travels == Travels::kQueries;
  Scheme scheme;
  scheme.parts = parts * ways;
  scheme.part_of_queries = queries;
  scheme.assign = [=](int q_block, int kv_block, int part) -> Assignment {
    const int place = queries ? kv_block : q_block, block = queries ? q_block : kv_block;
    const int distance = RingDistance(block, place, directions[static_cast<size_t>(part % ways)], ranks);
    return {.place = place, .step = distance * parts + part / ways};
  };
  const auto source = [=](int, int part, int to) -> Source {
    return {.from = Mod(to - directions[static_cast<size_t>(part % ways)], ranks)};
  };
  (queries ? scheme.q_source : scheme.kv_source) = source;
  if (!queries) scheme.kv_return = ReturnWay::kOnward;
  return scheme;
}

// Every rank computes for its own queries; KV comes straight from its owner, each step from another one.
Scheme DirectKv(const ExchangeProblem& problem, int parts) {
  const int ranks = problem.ranks;
  Scheme scheme;
  scheme.parts = parts;
  scheme.assign = [=](int q_block, int kv_block, int part) -> Assignment {
    return {.place = q_block, .step = RingDistance(kv_block, q_block, kTowardLower, ranks) * parts + part};
  };
  return scheme;
}

// Node n, GPU g is rank n * inner + g. A block goes round its node; the rank of the same g of the next node
// gets it from the one before and hands it round there.
Scheme DoubleRing(const ExchangeProblem& problem, int inner) {
  const int nodes = problem.ranks / inner;
  struct Distance {
    int outer, inner;
  };
  const auto distance = [=](int block, int place) -> Distance {
    return {Mod(block / inner - place / inner, nodes), Mod(block % inner - place % inner, inner)};
  };
  Scheme scheme;
  scheme.assign = [=](int q_block, int kv_block, int) -> Assignment {
    const Distance d = distance(kv_block, q_block);
    return {.place = q_block, .step = d.outer * inner + d.inner};
  };
  scheme.kv_source = [=](int block, int, int to) -> Source {
    const int node = to / inner, gpu = to % inner;
    if (distance(block, to).inner > 0) return {.from = node * inner + Mod(gpu + 1, inner), .lane = 0};
    return {.from = Mod(node + 1, nodes) * inner + gpu, .lane = 1};
  };
  scheme.kv_return = ReturnWay::kOnward;
  return scheme;
}

// Rank x * inner + y computes the query blocks of ranks x * inner .. against the KV blocks of all ranks that
// are y modulo inner, beginning with its own.
Scheme Mesh(const ExchangeProblem& problem, int inner) {
  const int rows = problem.ranks / inner;
  Scheme scheme;
  scheme.assign = [=](int q_block, int kv_block, int) -> Assignment {
    const int x = q_block / inner, y = kv_block % inner;
    return {.place = x * inner + y,
            .step = Mod(q_block % inner - y, inner) * rows + Mod(kv_block / inner - x, rows)};
  };
  return scheme;
}

// Work of each pair of blocks, [ranks * ranks].
std::vector<int64_t> WorkOfBlocks(const ExchangeProblem& problem) {
  const size_t ranks = static_cast<size_t>(problem.ranks);
  std::vector<int64_t> work(ranks * ranks);
  for (size_t i = 0; i < problem.chunks.size(); ++i) {
    for (size_t j = 0; j < problem.chunks.size(); ++j) {
      const auto q = static_cast<size_t>(problem.chunks[i].owner);
      const auto kv = static_cast<size_t>(problem.chunks[j].owner);
      work[q * ranks + kv] += problem.pairs_of(i, j);
    }
  }
  return work;
}

// [q_block * ranks + kv_block]: which of the two owners computes. Largest pairs first, each to the owner with
// less work so far, then single pairs change sides as long as that lowers the larger of the two loads. Equal
// loads: the queries' owner, because KV is what is cheaper to move with grouped heads.
std::vector<int> BalancedOwners(const ExchangeProblem& problem) {
  const int ranks = problem.ranks;
  const std::vector<int64_t> work = WorkOfBlocks(problem);
  const auto index = [=](int q, int kv) { return static_cast<size_t>(q * ranks + kv); };
  std::vector<int> owners(work.size());
  std::vector<int64_t> load(static_cast<size_t>(ranks));
  std::vector<std::pair<int, int>> blocks;
  for (int q = 0; q < ranks; ++q) {
    load[static_cast<size_t>(q)] += work[index(q, q)];
    for (int kv = 0; kv < ranks; ++kv) {
      owners[index(q, kv)] = q;
      if (q != kv && work[index(q, kv)] > 0) blocks.emplace_back(q, kv);
    }
  }
  // Near pairs first among equals, so that the far ones of busy ranks are what moves.
  std::stable_sort(blocks.begin(), blocks.end(), [&](const auto& a, const auto& b) {
    const int64_t work_a = work[index(a.first, a.second)], work_b = work[index(b.first, b.second)];
    if (work_a != work_b) return work_a > work_b;
    return std::abs(a.first - a.second) < std::abs(b.first - b.second);
  });
  for (const auto& [q, kv] : blocks) {
    const bool to_kv = load[static_cast<size_t>(kv)] < load[static_cast<size_t>(q)];
    owners[index(q, kv)] = to_kv ? kv : q;
    load[static_cast<size_t>(to_kv ? kv : q)] += work[index(q, kv)];
  }
  for (bool improved = true; improved;) {
    improved = false;
    for (const auto& [q, kv] : blocks) {
      const int from = owners[index(q, kv)], to = from == q ? kv : q;
      int64_t &here = load[static_cast<size_t>(from)], &there = load[static_cast<size_t>(to)];
      if (there + work[index(q, kv)] >= here) continue;
      here -= work[index(q, kv)];
      there += work[index(q, kv)];
      owners[index(q, kv)] = to;
      improved = true;
    }
  }
  return owners;
}

Scheme Balanced(const ExchangeProblem& problem) {
  const int ranks = problem.ranks;
  Scheme scheme;
  scheme.assign = [ranks, owners = BalancedOwners(problem)](int q_block, int kv_block, int) -> Assignment {
    const int place = owners[static_cast<size_t>(q_block * ranks + kv_block)];
    const int other = place == q_block ? kv_block : q_block;
    return {.place = place, .step = RingDistance(other, place, kTowardLower, ranks)};
  };
  return scheme;
}

Scheme WithoutOptions(const ExchangeProblem& problem, const PlanChoice& choice) {
  const int one_way = choice.direction == RingDirection::kTowardHigher ? kTowardHigher : kTowardLower;
  switch (choice.kind) {
    case PlanKind::kKvRing:
      return Rings(problem, Travels::kKv, {one_way}, choice.parts);
    case PlanKind::kBidirectionalKvRing:
      return Rings(problem, Travels::kKv, {kTowardLower, kTowardHigher}, choice.parts);
    case PlanKind::kTokenRing:
      return Rings(problem, Travels::kQueries, {one_way}, choice.parts);
    case PlanKind::kBidirectionalTokenRing:
      return Rings(problem, Travels::kQueries, {kTowardLower, kTowardHigher}, choice.parts);
    case PlanKind::kAllGather:
    case PlanKind::kArena:  // of one rank: nothing moves
    case PlanKind::kDirectCast:
      return DirectKv(problem, choice.parts);
    case PlanKind::kBalanced:
      return Balanced(problem);
    case PlanKind::kDoubleRing:
      return DoubleRing(problem, choice.inner);
    case PlanKind::kMesh:
      return Mesh(problem, choice.inner);
  }
  ANNULUS_CHECK(false) << "plan kind " << static_cast<int>(choice.kind);
  return {};
}

}  // namespace

Scheme SchemeFor(const ExchangeProblem& problem, const PlanChoice& choice) {
  Scheme scheme = WithoutOptions(problem, choice);
  scheme.name = NameOf(choice, problem.ranks);
  scheme.buffers = choice.kind == PlanKind::kAllGather ? problem.ranks * choice.parts + 1 : choice.buffers;
  scheme.output_width = choice.output_width;
  return scheme;
}

}  // namespace annulus
