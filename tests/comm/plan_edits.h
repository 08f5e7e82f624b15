#pragma once

// Changes of plans: steps taken out and put in, with the dependencies of the others kept; and any single
// field.

#include <string>
#include <type_traits>
#include <vector>

#include "annulus/comm/exchange_plan.h"

namespace annulus::testing {

// A place in a plan.
struct At {
  size_t rank, step;
};

inline void RemoveStep(ExchangePlan* plan, const At& at) {
  std::vector<Step>& steps = plan->ranks[at.rank].steps;
  steps.erase(steps.begin() + static_cast<std::ptrdiff_t>(at.step));
  for (Step& step : steps) {
    std::erase(step.after, static_cast<int>(at.step));
    for (int& before : step.after) before -= before > static_cast<int>(at.step) ? 1 : 0;
  }
}

// Puts `step` before the step at `at`.
inline void InsertStep(ExchangePlan* plan, const At& at, const Step& step) {
  std::vector<Step>& steps = plan->ranks[at.rank].steps;
  for (Step& other : steps) {
    for (int& before : other.after) before += before >= static_cast<int>(at.step) ? 1 : 0;
  }
  steps.insert(steps.begin() + static_cast<std::ptrdiff_t>(at.step), step);
}

// Numbers all fields of a plan, however deep, and changes one of them: a number by `delta`, an enum or bool
// to another of its values, a list by an element less (delta < 0) or its first element once more at the end.
class FieldEdit {
 public:
  // Changes field `target` of the plan; -1 changes none. Returns the number of fields. `what` tells the
  // change; empty if there is none, as of an empty list.
  static int64_t Apply(ExchangePlan* plan, int64_t target, int64_t delta, std::string* what = nullptr) {
    FieldEdit edit(target, delta);
    edit.Visit(*plan);
    if (what != nullptr) *what = edit.what_;
    return edit.next_;
  }

 private:
  FieldEdit(int64_t target, int64_t delta) : target_(target), delta_(delta) {}

  bool Hit(const char* name) {
    if (next_++ != target_) return false;
    what_ = absl::StrCat(name, delta_ < 0 ? " " : " +", delta_);
    return true;
  }
  template <typename T>
  void Field(const char* name, T& value) {
    if constexpr (std::is_same_v<T, bool>) {
      if (Hit(name)) value = !value;
    } else if constexpr (std::is_integral_v<T>) {
      if (Hit(name)) value += static_cast<T>(delta_);
    } else {
      Visit(value);
    }
  }
  template <typename T>
  void Enum(const char* name, T& value, int values) {
    if (!Hit(name)) return;
    const int step = 1 + static_cast<int>(delta_ + values) % (values - 1);
    value = static_cast<T>((static_cast<int>(value) + step) % values);
  }
  template <typename T>
  void List(const char* name, std::vector<T>& values) {
    if (Hit(name)) {
      if (values.empty()) {
        what_.clear();
      } else if (delta_ < 0) {
        values.pop_back();
      } else {
        values.push_back(T(values.front()));
      }
    }
    for (T& value : values) Field(name, value);
  }

  // Structured bindings: a field more would not compile.
  void Visit(RowRange& rows) {
    auto& [begin, end] = rows;
    Field("begin", begin), Field("end", end);
  }
  void Visit(BlockRows& block_rows) {
    auto& [block, rows] = block_rows;
    Field("block", block), Field("rows", rows);
  }
  void Visit(Chunk& chunk) {
    auto& [owner, rows, position, part] = chunk;
    Field("chunk owner", owner), Field("chunk rows", rows), Field("chunk position", position);
    Field("chunk part", part);
  }
  void Visit(ExchangeProblem& problem) {
    auto& [ranks, block_rows, heads, kv_heads, chunks, keys, pairs] = problem;
    Field("ranks", ranks), Field("block_rows", block_rows), Field("heads", heads);
    Field("kv_heads", kv_heads), List("chunks", chunks), List("keys", keys), List("pairs", pairs);
  }
  void Visit(HeadGroup& group) {
    auto& [q_begin, q_end, kv_heads] = group;
    Field("q_begin", q_begin), Field("q_end", q_end), List("group kv_heads", kv_heads);
  }
  void Visit(SlotSpec& slot) {
    auto& [payload, home, group, span, width] = slot;
    Enum("payload", payload, kPayloads), Field("home", home), Field("group", group), Enum("span", span, 2);
    Enum("width", width, 2);
  }
  void Visit(BlockPair& pair) {
    auto& [q_chunk, kv_chunk, keys, pairs] = pair;
    Field("q_chunk", q_chunk), Field("kv_chunk", kv_chunk), Field("pair keys", keys), Field("pairs", pairs);
  }
  void Visit(Attend& attend) {
    auto& [q_slot, kv_slot, q_result, kv_result, q_write, kv_write, arrival, q_rows, kv_rows, pairs] = attend;
    Field("q_slot", q_slot), Field("kv_slot", kv_slot), Field("q_result", q_result);
    Field("kv_result", kv_result), Enum("q_write", q_write, 2), Enum("kv_write", kv_write, 2);
    Enum("arrival", arrival, 2);
    List("q_rows", q_rows), List("kv_rows", kv_rows), List("pairs", pairs);
  }
  void Visit(Step& step) {
    auto& [kind, attend, slot, into, rows, peer, message, after] = step;
    Enum("kind", kind, 5), Field("attend", attend), Field("slot", slot), Field("into", into);
    Field("step rows", rows), Field("peer", peer), Field("message", message), List("after", after);
  }
  void Visit(RankPlan& rank) {
    auto& [slots, steps] = rank;
    List("slots", slots), List("steps", steps);
  }
  void Visit(ExchangePlan& plan) {
    auto& [name, pass, problem, groups, super_rows, super_size, ranks] = plan;
    if (Hit("name")) name += "'";
    Enum("pass", pass, 2), Field("problem", problem), List("groups", groups), List("super_rows", super_rows);
    Field("super_size", super_size), List("ranks", ranks);
  }

  const int64_t target_, delta_;
  int64_t next_ = 0;
  std::string what_;
};

}  // namespace annulus::testing
