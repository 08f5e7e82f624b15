#pragma once

// What a scheme means place by place: visits (pairs of blocks that a place computes) and arrivals (operands
// that come to a place, with the partial results that leave it).
//
//     home --> A0 --> A1 --> A2      rows on a hop: those that this place or a later one on the way needs
//     home --> A3                    handing on from A2 would make places wait for each other in a circle

#include <array>
#include <memory>
#include <vector>

#include "row_set.h"
#include "scheme.h"

namespace annulus {

enum class Side { kQuery, kKv };
inline constexpr std::array<Side, 2> kSides = {Side::kQuery, Side::kKv};

struct Visit {
  int step = 0;
  std::array<int, 2> block = {};  // by side
  int part = 0;
  std::vector<BlockPair> pairs = {};
  std::array<RowSet, 2> needs = {};  // by side, of the block
};

// A block's operand, or a part of it, on a place that is not its home.
struct Arrival {
  Side side = Side::kQuery;
  int place = 0, block = 0, part = 0, lane = 0;
  size_t index = 0;  // of the place's arrivals of this side
  int first_visit = 0, last_visit = 0;  // of the place's visits
  int first_step = 0, last_step = 0;    // their steps
  RowSet needs = {};

  Arrival* source = nullptr;  // hands it on to this place; null: home
  std::vector<Arrival*> sinks = {};
  RowSet rows_in = {};  // what comes: needed here or by sinks
  int message = 0;      // number of the first range of rows_in

  // The partial result for the block, if the pass has one for this side.
  bool has_result = false;
  Arrival* onward = nullptr;         // where it is passed on to be added up; null: all goes home
  Arrival* result_source = nullptr;  // whose `onward` this is
  RowSet result_in = {};             // rows that come from it
  RowSet result_home = {};           // rows that are complete here and go home
  int result_message = 0, home_message = 0;

  // In the step of a message both ends list it.
  int result_step() const { return last_step; }    // of what comes in
  int home_step() const { return last_step + 1; }  // one step later, so that computing hides it
};

struct PlaceVisits {
  std::vector<Visit> visits;  // in order of (step, block)
  // By side, in order of their first visit.
  std::array<std::vector<std::unique_ptr<Arrival>>, 2> arrivals;
  // By side: [block * parts + part], where that is no arrival null.
  std::array<std::vector<Arrival*>, 2> by_unit;
  int parts = 1;

  Arrival* Find(Side side, int block, int part) const;  // null: none
};

// By place. Messages are numbered for the whole group.
std::vector<PlaceVisits> FindVisits(const ExchangeProblem& problem, Pass pass, const Scheme& scheme);

// Rows that the pairs read: for each chunk of keys the hull of what they need, united.
RowSet KeysOf(const std::vector<BlockPair>& pairs);

}  // namespace annulus
