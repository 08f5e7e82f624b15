#include "visits.h"

#include <algorithm>
#include <tuple>

namespace annulus {
namespace {

size_t Index(Side side) { return static_cast<size_t>(side); }

// Pairs of the problem, by blocks and part; [q_block * ranks + kv_block][part].
class PairTable {
 public:
  PairTable(const ExchangeProblem& problem, const Scheme& scheme)
      : ranks_(problem.ranks),
        pairs_(static_cast<size_t>(ranks_) * static_cast<size_t>(ranks_),
               std::vector<std::vector<BlockPair>>(static_cast<size_t>(scheme.parts))) {
    for (size_t i = 0; i < problem.chunks.size(); ++i) {
      for (size_t j = 0; j < problem.chunks.size(); ++j) {
        if (problem.keys_of(i, j).empty()) continue;
        const Chunk &q = problem.chunks[i], &kv = problem.chunks[j];
        // Blocks that stay at home travel in no parts.
        const int part = q.owner == kv.owner || scheme.parts == 1 ? 0
                         : scheme.part_of_queries                 ? q.part
                                                                  : kv.part;
        ANNULUS_CHECK(part < scheme.parts) << "chunk of part " << part << ", the scheme has " << scheme.parts;
        pairs_[static_cast<size_t>(q.owner * ranks_ + kv.owner)][static_cast<size_t>(part)].push_back(
            {static_cast<int>(i), static_cast<int>(j), problem.keys_of(i, j), problem.pairs_of(i, j)});
      }
    }
  }

  std::vector<BlockPair> Take(int q_block, int kv_block, int part) {
    return std::move(pairs_[static_cast<size_t>(q_block * ranks_ + kv_block)][static_cast<size_t>(part)]);
  }

 private:
  int ranks_;
  std::vector<std::vector<std::vector<BlockPair>>> pairs_;
};

RowSet QueriesOf(const ExchangeProblem& problem, const std::vector<BlockPair>& pairs) {
  RowSet rows;
  for (const BlockPair& pair : pairs) rows.Add(problem.chunks[static_cast<size_t>(pair.q_chunk)].rows);
  return rows;
}

class Finder {
 public:
  Finder(const ExchangeProblem& problem, Pass pass, const Scheme& scheme)
      : problem_(problem), pass_(pass), scheme_(scheme), places_(static_cast<size_t>(problem.ranks)) {}

  std::vector<PlaceVisits> Find() {
    AddForeignVisits();
    AddOwnVisits();
    for (PlaceVisits& place : places_) {
      std::stable_sort(place.visits.begin(), place.visits.end(),
                       [](const Visit& a, const Visit& b) { return a.step < b.step; });
    }
    for (size_t p = 0; p < places_.size(); ++p) AddArrivals(static_cast<int>(p));
    for (const Side side : kSides) {
      for (int block = 0; block < problem_.ranks; ++block) {
        for (int part = 0; part < scheme_.parts; ++part) LinkUnit(side, block, part);
      }
    }
    return std::move(places_);
  }

 private:
  void AddVisit(int place, int step, int q_block, int kv_block, int part, std::vector<BlockPair> pairs) {
    if (pairs.empty()) return;
    Visit visit{.step = step, .block = {q_block, kv_block}, .part = part};
    visit.needs = {QueriesOf(problem_, pairs), KeysOf(pairs)};
    visit.pairs = std::move(pairs);
    places_[static_cast<size_t>(place)].visits.push_back(std::move(visit));
  }

  void AddForeignVisits() {
    for (int q = 0; q < problem_.ranks; ++q) {
      for (int kv = 0; kv < problem_.ranks; ++kv) {
        for (int part = 0; q != kv && part < scheme_.parts; ++part) {
          const Assignment at = scheme_.assign(q, kv, part);
          AddVisit(at.place, at.step, q, kv, part, pairs_.Take(q, kv, part));
        }
      }
    }
  }

  bool HasResult(Side side) const { return side == Side::kQuery || pass_ == Pass::kBackward; }

  // Where results come home, pairs of equal chunks are left for the end: they are computed while the last
  // results travel, the others while the first operands do.
  void AddOwnVisits() {
    bool returns = false;
    for (size_t p = 0; p < places_.size(); ++p) {
      for (const Visit& visit : places_[p].visits) {
        for (const Side side : kSides) {
          returns = returns || (HasResult(side) && visit.block[Index(side)] != static_cast<int>(p));
        }
      }
    }
    for (int p = 0; p < problem_.ranks; ++p) {
      std::vector<BlockPair> first = pairs_.Take(p, p, 0), last;
      int last_step = 0;
      for (const Visit& visit : places_[static_cast<size_t>(p)].visits)
        last_step = std::max(last_step, visit.step);
      if (returns && last_step > 0) {
        const auto middle = std::stable_partition(
            first.begin(), first.end(), [](const BlockPair& pair) { return pair.q_chunk != pair.kv_chunk; });
        if (middle != first.begin()) {
          last.assign(middle, first.end());
          first.erase(middle, first.end());
        }
      }
      AddVisit(p, 0, p, p, 0, std::move(first));
      AddVisit(p, last_step + 1, p, p, 0, std::move(last));
    }
  }

  Source SourceOf(Side side, int block, int part, int to) const {
    const auto& source = side == Side::kQuery ? scheme_.q_source : scheme_.kv_source;
    return source ? source(block, part, to) : Source{.from = block};
  }

  void AddArrivals(int p) {
    PlaceVisits& place = places_[static_cast<size_t>(p)];
    place.parts = scheme_.parts;
    for (auto& units : place.by_unit)
      units.resize(static_cast<size_t>(problem_.ranks) * static_cast<size_t>(scheme_.parts));
    for (size_t v = 0; v < place.visits.size(); ++v) {
      const Visit& visit = place.visits[v];
      for (const Side side : kSides) {
        const int block = visit.block[Index(side)];
        if (block == p) continue;
        Arrival* arrival = place.Find(side, block, visit.part);
        if (arrival == nullptr) {
          auto& arrivals = place.arrivals[Index(side)];
          arrival = arrivals.emplace_back(std::make_unique<Arrival>()).get();
          *arrival = {.side = side, .place = p, .block = block, .part = visit.part};
          arrival->index = arrivals.size() - 1;
          place.by_unit[Index(side)][static_cast<size_t>(block * place.parts + visit.part)] = arrival;
          arrival->lane = SourceOf(side, block, visit.part, p).lane;
          arrival->first_visit = static_cast<int>(v);
          arrival->first_step = visit.step;
          arrival->has_result = HasResult(side);
        }
        arrival->last_visit = static_cast<int>(v);
        arrival->last_step = visit.step;
        arrival->needs.Add(visit.needs[Index(side)]);
      }
    }
  }

  // The arrival of the same kind that takes the memory of this one; null: none does.
  const Arrival* NextInMemory(const Arrival& arrival) const {
    int behind = 0;
    const auto& all = places_[static_cast<size_t>(arrival.place)].arrivals[Index(arrival.side)];
    for (size_t i = arrival.index + 1; i < all.size(); ++i) {
      const bool alike = all[i]->lane == arrival.lane && all[i]->part == arrival.part;
      if (alike && ++behind == scheme_.buffers) return all[i].get();
    }
    return nullptr;
  }
  // Every wait for memory must end with an event of an earlier step; then no places wait in a circle, even if
  // a send completes only at its receiver.
  bool MayPass(const Arrival& from, int step) const {
    const Arrival* next = NextInMemory(from);
    return next == nullptr || step < next->first_step;
  }

  Arrival* FindSource(const Arrival& arrival) const {
    int from = SourceOf(arrival.side, arrival.block, arrival.part, arrival.place).from;
    for (int hops = 0; from != arrival.block; ++hops) {
      ANNULUS_CHECK(hops < problem_.ranks) << scheme_.name << ": sources of block " << arrival.block;
      Arrival* other = places_[static_cast<size_t>(from)].Find(arrival.side, arrival.block, arrival.part);
      if (other != nullptr && other->first_step < arrival.first_step) {
        return MayPass(*other, arrival.first_step) ? other : nullptr;
      }
      from = SourceOf(arrival.side, arrival.block, arrival.part, from).from;
    }
    return nullptr;
  }

  int Take(const RowSet& rows) {
    const int first = messages_;
    messages_ += static_cast<int>(rows.ranges().size());
    return first;
  }

  void LinkUnit(Side side, int block, int part) {
    std::vector<Arrival*> unit;
    for (const PlaceVisits& place : places_) {
      if (Arrival* arrival = place.Find(side, block, part); arrival != nullptr) unit.push_back(arrival);
    }
    std::sort(unit.begin(), unit.end(), [](const Arrival* a, const Arrival* b) {
      return std::tie(a->first_step, a->place) < std::tie(b->first_step, b->place);
    });
    for (Arrival* arrival : unit) {
      arrival->source = FindSource(*arrival);
      if (arrival->source != nullptr) arrival->source->sinks.push_back(arrival);
    }
    for (auto arrival = unit.rbegin(); arrival != unit.rend(); ++arrival) {
      (*arrival)->rows_in = (*arrival)->needs;
      for (const Arrival* sink : (*arrival)->sinks) (*arrival)->rows_in.Add(sink->rows_in);
    }
    for (Arrival* arrival : unit) arrival->message = Take(arrival->rows_in);
    if (HasResult(side)) LinkResults(unit);
  }

  void LinkResults(const std::vector<Arrival*>& unit) {
    const ReturnWay way = unit.empty() || unit[0]->side == Side::kKv ? scheme_.kv_return : scheme_.q_return;
    for (size_t k = 0; way == ReturnWay::kOnward && k + 1 < unit.size(); ++k) {
      const bool later = unit[k]->last_step < unit[k + 1]->first_step;
      if (!later || !MayPass(*unit[k], unit[k + 1]->result_step())) continue;
      unit[k]->onward = unit[k + 1];
      unit[k + 1]->result_source = unit[k];
    }
    std::vector<RowSet> later_needs(unit.size() + 1);  // of the arrivals that the partial result still passes
    for (size_t k = unit.size(); k-- > 0;) {
      if (unit[k]->onward == nullptr) continue;
      later_needs[k] = later_needs[k + 1];
      later_needs[k].Add(unit[k]->onward->needs);
    }
    for (size_t k = 0; k < unit.size(); ++k) {
      Arrival& arrival = *unit[k];
      RowSet sum = arrival.result_in;
      sum.Add(arrival.needs);
      if (arrival.onward != nullptr) arrival.onward->result_in = sum.Intersect(later_needs[k]);
      arrival.result_home = sum.Subtract(later_needs[k]);
      arrival.result_message = Take(arrival.result_in);
      arrival.home_message = Take(arrival.result_home);
    }
  }

  const ExchangeProblem& problem_;
  const Pass pass_;
  const Scheme& scheme_;
  PairTable pairs_{problem_, scheme_};
  std::vector<PlaceVisits> places_;
  int messages_ = 0;
};

}  // namespace

Arrival* PlaceVisits::Find(Side side, int block, int part) const {
  return by_unit[Index(side)][static_cast<size_t>(block * parts + part)];
}

std::vector<PlaceVisits> FindVisits(const ExchangeProblem& problem, Pass pass, const Scheme& scheme) {
  return Finder(problem, pass, scheme).Find();
}

int64_t RowsMoved(const ExchangeProblem& problem, Pass pass, const Scheme& scheme) {
  int64_t rows = 0;
  for (const PlaceVisits& place : FindVisits(problem, pass, scheme)) {
    for (const auto& arrivals : place.arrivals) {
      for (const auto& arrival : arrivals) {
        for (const RowSet* moved : {&arrival->rows_in, &arrival->result_in, &arrival->result_home}) {
          for (const RowRange& range : moved->ranges()) rows += range.size();
        }
      }
    }
  }
  return rows;
}

RowSet KeysOf(const std::vector<BlockPair>& pairs) {
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
  RowSet rows;
  for (const auto& [chunk, range] : hulls) rows.Add(range);
  return rows;
}

}  // namespace annulus
