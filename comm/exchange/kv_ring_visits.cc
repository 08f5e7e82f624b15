#include "kv_ring_visits.h"

#include <algorithm>

namespace annulus {
namespace {

// Indices [first, last) of a rank's chunks.
std::pair<size_t, size_t> ChunksOf(const ExchangeProblem& problem, int cp_rank) {
  const std::vector<Chunk>& chunks = problem.chunks;
  const auto first = std::partition_point(chunks.begin(), chunks.end(),
                                          [&](const Chunk& chunk) { return chunk.owner < cp_rank; });
  const auto last =
      std::partition_point(first, chunks.end(), [&](const Chunk& chunk) { return chunk.owner == cp_rank; });
  return {first - chunks.begin(), last - chunks.begin()};
}

std::vector<BlockPair> PairsOf(const ExchangeProblem& problem, int q_rank, int kv_rank) {
  const auto [q_first, q_last] = ChunksOf(problem, q_rank);
  const auto [kv_first, kv_last] = ChunksOf(problem, kv_rank);
  std::vector<BlockPair> pairs;
  for (size_t i = q_first; i < q_last; ++i) {
    for (size_t j = kv_first; j < kv_last; ++j) {
      if (problem.keys_of(i, j).empty()) continue;
      pairs.push_back(
          {static_cast<int>(i), static_cast<int>(j), problem.keys_of(i, j), problem.pairs_of(i, j)});
    }
  }
  return pairs;
}

void FindVisits(const ExchangeProblem& problem, int step, Ring* ring) {
  const int ranks = problem.ranks;
  ring->visits.resize(static_cast<size_t>(ranks));
  ring->routes.resize(static_cast<size_t>(ranks));
  for (int r = 0; r < ranks; ++r) {
    ring->own_pairs.push_back(PairsOf(problem, r, r));
    for (int distance = 1; distance < ranks; ++distance) {
      Visit visit{
          .cp_rank = r, .block = (r - step * distance + distance * ranks) % ranks, .distance = distance};
      visit.pairs = PairsOf(problem, r, visit.block);
      if (visit.pairs.empty()) continue;
      visit.needs = NeedsOf(visit.pairs);
      ring->visits[static_cast<size_t>(r)].push_back(std::move(visit));
    }
  }
  for (auto& visits : ring->visits) {
    for (Visit& visit : visits) ring->routes[static_cast<size_t>(visit.block)].push_back(&visit);
  }
  for (auto& route : ring->routes) {
    std::sort(route.begin(), route.end(),
              [](const Visit* a, const Visit* b) { return a->distance < b->distance; });
  }
}

// Whether the rank of `visit` may pass its block on to `next` without its slot being waited for by a visit
// that is not farther than `next`.
bool MayPass(const Ring& ring, const Visit& visit, const Visit& next) {
  const std::vector<Visit>& visits = ring.visits[static_cast<size_t>(visit.cp_rank)];
  const size_t reuse = static_cast<size_t>(&visit - visits.data()) + 2;
  return reuse >= visits.size() || next.distance < visits[reuse].distance;
}

void LinkChains(Pass pass, Ring* ring) {
  int message = 0;
  const auto take = [&](const RowSet& rows) {
    message += static_cast<int>(rows.ranges().size());
    return message - static_cast<int>(rows.ranges().size());
  };
  for (auto& route : ring->routes) {
    for (size_t k = 0; k + 1 < route.size(); ++k) {
      if (!MayPass(*ring, *route[k], *route[k + 1])) continue;
      route[k]->next = route[k + 1];
      route[k + 1]->previous = route[k];
    }
    for (auto visit = route.rbegin(); visit != route.rend(); ++visit) {
      (*visit)->kv_in = (*visit)->needs;
      if ((*visit)->next != nullptr) (*visit)->kv_in.Add((*visit)->next->kv_in);
    }
    for (Visit* visit : route) {
      RowSet sum = visit->grad_in;
      sum.Add(visit->needs);
      const RowSet later = visit->next == nullptr ? RowSet() : visit->next->kv_in;
      if (visit->next != nullptr) visit->next->grad_in = sum.Intersect(later);
      visit->grad_home = sum.Subtract(later);
      visit->kv_message = take(visit->kv_in);
      if (pass == Pass::kForward) continue;
      visit->grad_message = take(visit->grad_in);
      visit->home_message = take(visit->grad_home);
    }
  }
}

}  // namespace

RowSet NeedsOf(const std::vector<BlockPair>& pairs) {
  std::vector<std::pair<int, RowRange>> hulls;  // of a kv_chunk
  for (const BlockPair& pair : pairs) {
    auto hull =
        std::find_if(hulls.begin(), hulls.end(), [&](const auto& h) { return h.first == pair.kv_chunk; });
    if (hull == hulls.end()) {
      hulls.emplace_back(pair.kv_chunk, pair.keys);
    } else {
      hull->second = {std::min(hull->second.begin, pair.keys.begin),
                      std::max(hull->second.end, pair.keys.end)};
    }
  }
  RowSet needs;
  for (const auto& [chunk, rows] : hulls) needs.Add(rows);
  return needs;
}

Ring FindRing(const ExchangeProblem& problem, Pass pass, RingStep step) {
  Ring ring;
  FindVisits(problem, static_cast<int>(step), &ring);
  LinkChains(pass, &ring);
  return ring;
}

}  // namespace annulus
