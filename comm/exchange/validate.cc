// A plan is proved in five passes, each of which may rely on those before it:
//   form      every index is in range, every step's slots fit what it does with them (form.h)
//   messages  each has one send and one receive that agree; both ends list those between two ranks alike
//   order     steps of one rank that touch the same rows of a slot, one of them writing, are ordered
//   progress  a run in which a send completes only with its receive reaches the end
//   content   in that run every step finds what it needs, each pair is computed once, each result gets home
//             once (contents.h)
// By `order` every possible run gives each slot the same contents, so the one run of `content` stands for
// all.

#include <algorithm>
#include <map>

#include "annulus/comm/communicator.h"
#include "contents.h"
#include "form.h"
#include "plan_text.h"
#include "row_set.h"

namespace annulus {
namespace {

// A step of a rank.
struct End {
  int cp_rank = -1;
  size_t step = 0;
};

template <typename... Args>
absl::Status WrongStep(const ExchangePlan& plan, const End& at, const Args&... what) {
  return absl::FailedPreconditionError(
      absl::StrCat(plan.name, ": ", StepText(plan, at.cp_rank, at.step), ": ", absl::StrCat(what...)));
}

const Step& StepAt(const ExchangePlan& plan, const End& at) {
  return plan.ranks[static_cast<size_t>(at.cp_rank)].steps[at.step];
}

// Calls fn(end, step) until it returns an error.
template <typename Fn>
absl::Status ForEachStep(const ExchangePlan& plan, const Fn& fn) {
  for (size_t r = 0; r < plan.ranks.size(); ++r) {
    for (size_t s = 0; s < plan.ranks[r].steps.size(); ++s)
      ANNULUS_RETURN_IF_ERROR(fn(End{static_cast<int>(r), s}, plan.ranks[r].steps[s]));
  }
  return absl::OkStatus();
}

// ---- Messages ------------------------------------------------------------------------------------------

struct Message {
  End send, receive;
};

class Messages {
 public:
  explicit Messages(const ExchangePlan& plan) : plan_(plan) {}

  absl::Status Check() {
    ANNULUS_RETURN_IF_ERROR(
        ForEachStep(plan_, [this](const End& at, const Step& step) { return Note(at, step); }));
    for (const auto& [number, message] : messages_) ANNULUS_RETURN_IF_ERROR(CheckEnds(message));
    return CheckSequences();
  }
  const std::map<int, Message>& all() const { return messages_; }

 private:
  absl::Status Note(const End& at, const Step& step) {
    if (!IsTransfer(step.kind)) return absl::OkStatus();
    const bool send = step.kind == StepKind::kSend;
    Message& message = messages_[step.message];
    End& end = send ? message.send : message.receive;
    if (end.cp_rank >= 0)
      return WrongStep(plan_, at, "the message is that of ", StepText(plan_, end.cp_rank, end.step));
    end = at;
    if (send) sent_[{at.cp_rank, step.peer}].push_back(step.message);
    if (!send) received_[{step.peer, at.cp_rank}].push_back(step.message);
    return absl::OkStatus();
  }

  // What both ends must have in common, beside the rows.
  bool SlotsAgree(const Message& message) const {
    const auto spec = [this](const End& end) {
      const RankPlan& rank = plan_.ranks[static_cast<size_t>(end.cp_rank)];
      return rank.slots[static_cast<size_t>(rank.steps[end.step].slot)];
    };
    const SlotSpec from = spec(message.send), to = spec(message.receive);
    return from.payload == to.payload && from.group == to.group && from.width == to.width;
  }

  absl::Status CheckEnds(const Message& message) const {
    if (message.receive.cp_rank < 0) return WrongStep(plan_, message.send, "nobody receives it");
    if (message.send.cp_rank < 0) return WrongStep(plan_, message.receive, "nobody sends it");
    const Step &send = StepAt(plan_, message.send), &receive = StepAt(plan_, message.receive);
    const bool peers = send.peer == message.receive.cp_rank && receive.peer == message.send.cp_rank;
    if (peers && send.rows == receive.rows && SlotsAgree(message)) return absl::OkStatus();
    const std::string other = StepText(plan_, message.receive.cp_rank, message.receive.step);
    if (peers && send.rows == receive.rows)
      return WrongStep(plan_, message.send, "the slots' payload, head group or width differ from those of ",
                       other);
    return WrongStep(plan_, message.send, "does not match ", other);
  }

  // Transports without tags match messages of two ranks by their order.
  absl::Status CheckSequences() {
    for (const auto& [pair, messages] : sent_) {
      const std::string between =
          absl::StrCat(plan_.name, ": rank ", pair.first, " sends to rank ", pair.second);
      if (messages != received_[pair])
        return absl::FailedPreconditionError(between + " in another order than that of its receives");
      if (messages.size() > Communicator::kMaxTag) {
        return absl::FailedPreconditionError(absl::StrCat(between, " ", messages.size(),
                                                          " messages: expected at most ",
                                                          static_cast<int>(Communicator::kMaxTag)));
      }
    }
    return absl::OkStatus();
  }

  const ExchangePlan& plan_;
  std::map<int, Message> messages_;
  std::map<std::pair<int, int>, std::vector<int>> sent_, received_;  // (from, to): in order of the list
};

// ---- Order ---------------------------------------------------------------------------------------------

// Of the steps of one rank.
class RankOrder {
 public:
  RankOrder(const ExchangePlan& plan, int cp_rank)
      : plan_(plan), me_(cp_rank), rank_(plan.ranks[static_cast<size_t>(cp_rank)]) {}

  absl::Status Check() {
    FindAncestors();
    of_slot_.resize(rank_.slots.size());
    for (size_t s = 0; s < rank_.steps.size(); ++s) AddAccesses(s);
    for (size_t slot = 0; slot < of_slot_.size(); ++slot) ANNULUS_RETURN_IF_ERROR(CheckSlot(slot));
    return absl::OkStatus();
  }

 private:
  // Rows of a slot, by their place in it, that a step touches. Operands that an Attend reads are those of its
  // pairs; results are all rows that it names.
  struct Access {
    size_t step = 0;
    RowRange rows;
    bool write = false;
  };

  bool IsAncestor(size_t ancestor, size_t step) const {
    return (ancestors_[step * words_ + ancestor / 64] >> (ancestor % 64) & 1) != 0;
  }

  // For each step those that are surely complete when it starts.
  void FindAncestors() {
    words_ = (rank_.steps.size() + 63) / 64;
    ancestors_.resize(words_ * rank_.steps.size());
    int last_compute = -1;
    for (size_t s = 0; s < rank_.steps.size(); ++s) {
      uint64_t* mine = ancestors_.data() + s * words_;
      const auto inherit = [&](int from) {
        const size_t f = static_cast<size_t>(from);
        for (size_t word = 0; word <= f / 64; ++word) mine[word] |= ancestors_[f * words_ + word];
        mine[f / 64] |= uint64_t{1} << (f % 64);
      };
      for (const int before : rank_.steps[s].after) inherit(before);
      if (!IsCompute(rank_.steps[s].kind)) continue;
      if (last_compute >= 0) inherit(last_compute);
      last_compute = static_cast<int>(s);
    }
  }

  void Touch(size_t step, int slot, const BlockRows& rows, bool write) {
    const size_t at = static_cast<size_t>(slot);
    const int64_t begin = RowInSlot(plan_, rank_.slots[at], rows);
    of_slot_[at].push_back({.step = step, .rows = {begin, begin + rows.rows.size()}, .write = write});
  }

  void AddAccesses(size_t s) {
    const Step& step = rank_.steps[s];
    if (step.kind != StepKind::kAttend) {
      Touch(s, step.slot, step.rows, step.kind == StepKind::kReceive);
      if (IsCompute(step.kind)) Touch(s, step.into, step.rows, true);
      return;
    }
    const Attend& attend = step.attend;
    int queries_of = -1;                                         // pairs often share their queries
    std::vector<RowRange> keys_of(plan_.problem.chunks.size());  // and keys
    for (const BlockPair& pair : attend.pairs) {
      const Chunk& queries = plan_.problem.chunks[static_cast<size_t>(pair.q_chunk)];
      if (pair.q_chunk != queries_of) Touch(s, attend.q_slot, {queries.owner, queries.rows}, false);
      queries_of = pair.q_chunk;
      const size_t keys = static_cast<size_t>(pair.kv_chunk);
      if (keys_of[keys] == pair.keys) continue;
      keys_of[keys] = pair.keys;
      Touch(s, attend.kv_slot, {plan_.problem.chunks[keys].owner, pair.keys}, false);
    }
    for (const BlockRows& rows : attend.q_rows) Touch(s, attend.q_result, rows, true);
    if (plan_.pass == Pass::kForward) return;
    for (const BlockRows& rows : attend.kv_rows) Touch(s, attend.kv_result, rows, true);
  }

  absl::Status CheckSlot(size_t slot) const {
    const std::vector<Access>& accesses = of_slot_[slot];
    if (std::none_of(accesses.begin(), accesses.end(), [](const Access& a) { return a.write; }))
      return absl::OkStatus();
    std::vector<Access> live;  // what a later access may conflict with
    for (const Access& access : accesses) {
      for (const Access& before : live) {
        if (before.step == access.step || !(before.write || access.write) ||
            !Overlap(before.rows, access.rows))
          continue;
        if (IsAncestor(before.step, access.step)) continue;  // steps wait for earlier ones only
        return WrongStep(plan_, {me_, access.step}, "may run together with ",
                         StepText(plan_, me_, before.step), ", which touches the same rows of slot ", slot);
      }
      // What comes after a write comes after all that the write comes after.
      if (access.write) {
        std::erase_if(live, [&](const Access& before) {
          return before.step != access.step && Contains(access.rows, before.rows);
        });
      }
      live.push_back(access);
    }
    return absl::OkStatus();
  }

  const ExchangePlan& plan_;
  const int me_;
  const RankPlan& rank_;
  size_t words_ = 0;                 // of a set of steps
  std::vector<uint64_t> ancestors_;  // [step * words]
  std::vector<std::vector<Access>> of_slot_;
};

// ---- Progress and content ------------------------------------------------------------------------------

// Runs the plan, both ends of a message as one event, as soon as all that they wait for is done: what then
// never runs waits for itself.
class Run {
 public:
  Run(const ExchangePlan& plan, const std::map<int, Message>& messages) : plan_(plan), contents_(plan) {
    for (const RankPlan& rank : plan.ranks) event_of_.emplace_back(rank.steps.size());
    for (const auto& [number, message] : messages) AddEvent(message);
    for (size_t r = 0; r < plan.ranks.size(); ++r) {
      for (size_t s = 0; s < plan.ranks[r].steps.size(); ++s) {
        const End at{static_cast<int>(r), s};
        if (IsCompute(plan.ranks[r].steps[s].kind)) AddEvent({at, at});
      }
    }
    for (size_t r = 0; r < plan.ranks.size(); ++r) Connect(r);
  }

  absl::Status ToTheEnd() {
    std::vector<size_t> ready;
    for (size_t e = 0; e < events_.size(); ++e) {
      if (waits_for_[e] == 0) ready.push_back(e);
    }
    for (size_t i = 0; i < ready.size(); ++i) {
      ANNULUS_RETURN_IF_ERROR(Complete(events_[ready[i]]));
      for (const size_t next : next_[ready[i]]) {
        if (--waits_for_[next] == 0) ready.push_back(next);
      }
    }
    if (ready.size() < events_.size()) {
      return ForEachStep(plan_, [this](const End& at, const Step&) {
        const bool stuck = waits_for_[event_of_[static_cast<size_t>(at.cp_rank)][at.step]] > 0;
        return stuck ? WrongStep(plan_, at, "is never reached: ranks wait for each other") : absl::OkStatus();
      });
    }
    return contents_.CheckResult();
  }

 private:
  // A computing step is an event of which both ends are that step.
  void AddEvent(const Message& event) {
    for (const End& end : {event.send, event.receive})
      event_of_[static_cast<size_t>(end.cp_rank)][end.step] = events_.size();
    events_.push_back(event);
    next_.emplace_back();
    waits_for_.push_back(0);
  }

  void Connect(size_t r) {
    const std::vector<Step>& steps = plan_.ranks[r].steps;
    int last_compute = -1;
    for (size_t s = 0; s < steps.size(); ++s) {
      const auto wait = [&](int before) {
        next_[event_of_[r][static_cast<size_t>(before)]].push_back(event_of_[r][s]);
        ++waits_for_[event_of_[r][s]];
      };
      for (const int before : steps[s].after) wait(before);
      if (!IsCompute(steps[s].kind)) continue;
      if (last_compute >= 0) wait(last_compute);
      last_compute = static_cast<int>(s);
    }
  }

  absl::Status Complete(const Message& event) {
    const End &from = event.send, &to = event.receive;
    if (IsCompute(StepAt(plan_, from).kind)) return contents_.Compute(from.cp_rank, from.step);
    return contents_.Move(from.cp_rank, from.step, to.cp_rank, to.step);
  }

  const ExchangePlan& plan_;
  PlanContents contents_;
  std::vector<Message> events_;
  std::vector<std::vector<size_t>> next_;      // by event
  std::vector<int> waits_for_;                 // by event
  std::vector<std::vector<size_t>> event_of_;  // [rank][step]
};

}  // namespace

absl::Status Validate(const ExchangePlan& plan) {
  ANNULUS_RETURN_IF_ERROR(CheckForm(plan));
  Messages messages(plan);
  ANNULUS_RETURN_IF_ERROR(messages.Check());
  for (size_t r = 0; r < plan.ranks.size(); ++r)
    ANNULUS_RETURN_IF_ERROR(RankOrder(plan, static_cast<int>(r)).Check());
  return Run(plan, messages.all()).ToTheEnd();
}

}  // namespace annulus
