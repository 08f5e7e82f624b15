#pragma once

// Exchange plans run with attention replaced by integer sums, so that what a plan computes can be compared
// exactly with a direct computation. With w = ToyWeight, over allowed (q, k) and for each query head:
//   forward    out[q] += w(q, k) * Q[q] * K[k]
//   backward   dq[q] += w(q, k) * (Q[q] + 2) * K[k]      dk[k] += w(q, k) * Q[q] * (K[k] + 1)
// where K is that of the query head's KV head, which gets dk of all its query heads.
//
// A slot has two fields, [rows, heads of the slot]: values, and their negatives, so that halves of different
// messages do not fit together. Slots of Width::kCompute have a narrower dtype.

#include <algorithm>
#include <string>
#include <vector>

#include "annulus/comm/exchange_transport.h"
#include "comm/exchange_cases.h"

namespace annulus::testing {

// Small enough for 32 bits; they differ from one execution of a plan to the next.
inline int64_t ToyQuery(int64_t row, int64_t head, int64_t execution) {
  return ((row + 101 * execution) * 2654435761 + head * 40503) % 31 + 1;
}
inline int64_t ToyKey(int64_t row, int64_t kv_head, int64_t execution) {
  return ((row + 211 * execution) * 40503 + kv_head * 2654435761) % 29 + 1;
}
inline int64_t ToyWeight(int64_t q, int64_t k) { return (q * 31 + k * 17) % 7 + 1; }

// Of the model, in the order in which a slot holds them.
inline std::vector<int64_t> HeadsOf(const ExchangePlan& plan, const SlotSpec& spec) {
  const bool of_keys = spec.payload == Payload::kKv || spec.payload == Payload::kKvGrad;
  const HeadGroup all{.q_begin = 0, .q_end = plan.problem.heads};
  const HeadGroup& group = spec.home ? all : plan.groups[static_cast<size_t>(spec.group)];
  if (of_keys && !spec.home) return group.kv_heads;
  std::vector<int64_t> heads;
  const int64_t end = of_keys ? plan.problem.kv_heads : group.q_end;
  for (int64_t head = of_keys ? 0 : group.q_begin; head < end; ++head) heads.push_back(head);
  return heads;
}

inline std::vector<SlotField> ToyFields(const ExchangePlan& plan, const SlotSpec& spec) {
  const DType dtype = spec.width == Width::kAccumulator ? DType::kI64 : DType::kI32;
  const SlotField field{.dtype = dtype, .row = {static_cast<int64_t>(HeadsOf(plan, spec).size())}};
  return {field, field};
}

inline int64_t ToyRowBytes(const ExchangePlan& plan, const SlotSpec& spec) {
  int64_t bytes = 0;
  for (const SlotField& field : ToyFields(plan, spec)) bytes += field.row.elements() * SizeOf(field.dtype);
  return bytes;
}

// One rank's memory while a plan runs, and its computing.
class ToyRank {
 public:
  ToyRank(const ExchangeCase& exchange_case, const ExchangePlan& plan, int cp_rank, int64_t execution = 0)
      : case_(exchange_case), plan_(plan), cp_rank_(cp_rank), execution_(execution) {
    super_row_.resize(static_cast<size_t>(plan.problem.ranks * plan.problem.block_rows));
    for (size_t c = 0; c < plan.super_rows.size(); ++c) {
      const Chunk& chunk = plan.problem.chunks[c];
      for (int64_t i = chunk.rows.begin; i < chunk.rows.end; ++i)
        super_row_[GlobalRow(chunk.owner, i)] = plan.super_rows[c] + i - chunk.rows.begin;
    }
    for (const SlotSpec& spec : specs()) AddSlot(spec);
  }
  ToyRank(ToyRank&&) = default;

  // All of this rank's slots, in memory of its own, but for those that Bind moved. What is not home holds
  // garbage.
  const std::vector<SlotMemory>& slots() const { return slots_; }
  SlotSource source() const {
    return {.home = [this](Payload payload) { return slots_[HomeOf(payload)]; },
            .fields = [this](const SlotSpec& spec) { return ToyFields(plan_, spec); }};
  }
  // Slots move, with what they hold, to other memory of the same form.
  void Bind(const std::vector<SlotMemory>& slots) {
    for (size_t s = 0; s < slots_.size(); ++s) {
      for (size_t f = 0; f < kFields; ++f) {
        const TensorRef from = slots_[s].fields[f], to = slots[s].fields[f];
        if (from.raw() == to.raw()) continue;
        std::copy_n(static_cast<const char*>(from.raw()), from.bytes(), static_cast<char*>(to.raw()));
        slots_[s].fields[f] = to;
      }
    }
  }
  void Compute(const Step& step) {
    if (step.kind == StepKind::kAttend) Attend(step.attend);
    if (step.kind == StepKind::kCopy) Transport(step, /*add=*/false);
    if (step.kind == StepKind::kReduce) Transport(step, /*add=*/true);
  }

  // What a transport does for a send of `peer` and its receive here.
  void Receive(const Step& receive, const ToyRank& peer, const Step& send) {
    if (spec(receive.slot).width != peer.spec(send.slot).width) wrong_ = " receives another dtype";
    for (int64_t i = 0; i < receive.rows.rows.size(); ++i) {
      const int64_t from = peer.Place(send.slot, send.rows.block, send.rows.rows.begin + i);
      const int64_t to = Place(receive.slot, receive.rows.block, receive.rows.rows.begin + i);
      const size_t heads = std::min(peer.HeadsIn(send.slot).size(), HeadsIn(receive.slot).size());
      for (int64_t h = 0; h < static_cast<int64_t>(heads); ++h) {
        for (size_t field = 0; field < kFields; ++field)
          Set(receive.slot, field, to, h, peer.Get(send.slot, field, from, h));
      }
    }
  }

  // Empty if the home results are those of the direct computation.
  std::string Compare() const {
    if (!wrong_.empty()) return absl::StrCat("rank ", cp_rank_, wrong_);
    const bool forward = plan_.pass == Pass::kForward;
    for (const Payload payload : {Payload::kOutput, Payload::kQueryGrad, Payload::kKvGrad}) {
      if (forward != (payload == Payload::kOutput)) continue;
      const size_t home = HomeOf(payload);
      if (home == specs().size()) return absl::StrCat("rank ", cp_rank_, " has no home for a result");
      const int64_t heads = payload == Payload::kKvGrad ? plan_.problem.kv_heads : plan_.problem.heads;
      for (int64_t i = 0; i < plan_.problem.block_rows; ++i) {
        for (int64_t head = 0; head < heads; ++head) {
          const int64_t expected = Expected(payload, cp_rank_ * plan_.problem.block_rows + i, head);
          const int slot = static_cast<int>(home);
          if (Get(slot, 0, i, head) == expected && Get(slot, 1, i, head) == -expected) continue;
          return absl::StrCat("rank ", cp_rank_, ": row ", i, " head ", head, " of home slot ", home, " is ",
                              Get(slot, 0, i, head), ": expected ", expected);
        }
      }
    }
    return "";
  }

 private:
  static constexpr size_t kFields = 2;
  static constexpr int64_t kGarbage = 0x5a5a5a5a;

  const std::vector<SlotSpec>& specs() const { return plan_.ranks[static_cast<size_t>(cp_rank_)].slots; }
  const SlotSpec& spec(int slot) const { return specs()[static_cast<size_t>(slot)]; }
  size_t HomeOf(Payload payload) const {
    size_t s = 0;
    while (s < specs().size() && !(specs()[s].home && specs()[s].payload == payload)) ++s;
    return s;
  }

  void AddSlot(const SlotSpec& spec) {
    const int slot = static_cast<int>(slots_.size());
    heads_.push_back(HeadsOf(plan_, spec));
    const std::vector<int64_t>& heads = heads_.back();
    const int64_t rows = spec.span == Span::kBlock ? plan_.problem.block_rows : plan_.super_size;
    slots_.emplace_back();
    for (const SlotField& field : ToyFields(plan_, spec)) {
      const int64_t elements = rows * field.row.elements();
      memory_.emplace_back(static_cast<size_t>(std::max<int64_t>(1, elements)));
      slots_.back().fields.emplace_back(memory_.back().data(), field.dtype, Device{},
                                        Shape{rows, field.row.elements()});
    }
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t global = cp_rank_ * plan_.problem.block_rows + row;
      for (size_t h = 0; h < heads.size(); ++h) {
        int64_t value = 0;
        if (spec.payload == Payload::kQuery) value = ToyQuery(global, heads[h], execution_);
        if (spec.payload == Payload::kKv) value = ToyKey(global, heads[h], execution_);
        Set(slot, 0, row, static_cast<int64_t>(h), spec.home ? value : kGarbage);
        Set(slot, 1, row, static_cast<int64_t>(h), spec.home ? -value : kGarbage);
      }
    }
  }

  size_t GlobalRow(int block, int64_t row) const {
    return static_cast<size_t>(block * plan_.problem.block_rows + row);
  }
  // Where in a slot a row of a block lies.
  int64_t Place(int slot, int block, int64_t row) const {
    return spec(slot).span == Span::kBlock ? row : super_row_[GlobalRow(block, row)];
  }
  const std::vector<int64_t>& HeadsIn(int slot) const { return heads_[static_cast<size_t>(slot)]; }

  int64_t Get(int slot, size_t field, int64_t row, int64_t head) const {
    const TensorRef& ref = slots_[static_cast<size_t>(slot)].fields[field];
    const int64_t at = row * ref.dim(1) + head;
    return ref.dtype() == DType::kI64 ? ref.data<int64_t>()[at] : ref.data<int32_t>()[at];
  }
  void Set(int slot, size_t field, int64_t row, int64_t head, int64_t value) {
    const TensorRef& ref = slots_[static_cast<size_t>(slot)].fields[field];
    const int64_t at = row * ref.dim(1) + head;
    if (ref.dtype() == DType::kI64) {
      ref.data<int64_t>()[at] = value;
    } else {
      ref.data<int32_t>()[at] = static_cast<int32_t>(value);
    }
  }
  void Add(int slot, int64_t row, int64_t head, int64_t value) {
    Set(slot, 0, row, head, Get(slot, 0, row, head) + value);
    Set(slot, 1, row, head, Get(slot, 1, row, head) - value);
  }
  int64_t Operand(int slot, int64_t row, int64_t head) {
    const int64_t value = Get(slot, 0, row, head);
    if (value != -Get(slot, 1, row, head)) wrong_ = " read a torn row";
    return value;
  }

  void Prepare(int slot, ResultWrite write, const std::vector<BlockRows>& all) {
    if (slot < 0) return;
    if (write == ResultWrite::kAccumulate) {
      if (spec(slot).width == Width::kCompute) wrong_ = " accumulates in a compute dtype";
      return;
    }
    const int64_t heads = static_cast<int64_t>(HeadsIn(slot).size());
    for (const BlockRows& rows : all) {
      for (int64_t row = rows.rows.begin; row < rows.rows.end; ++row) {
        for (size_t field = 0; field < kFields; ++field) {
          for (int64_t h = 0; h < heads; ++h) Set(slot, field, Place(slot, rows.block, row), h, 0);
        }
      }
    }
  }

  void Attend(const annulus::Attend& attend) {
    Prepare(attend.q_result, attend.q_write, attend.q_rows);
    if (plan_.pass == Pass::kBackward) Prepare(attend.kv_result, attend.kv_write, attend.kv_rows);
    for (const BlockPair& pair : attend.pairs) {
      const Chunk& queries = plan_.problem.chunks[static_cast<size_t>(pair.q_chunk)];
      const int kv_block = plan_.problem.chunks[static_cast<size_t>(pair.kv_chunk)].owner;
      for (int64_t i = queries.rows.begin; i < queries.rows.end; ++i) {
        for (int64_t j = pair.keys.begin; j < pair.keys.end; ++j)
          AddPair(attend, queries.owner, i, kv_block, j);
      }
    }
  }
  void AddPair(const annulus::Attend& attend, int q_block, int64_t i, int kv_block, int64_t j) {
    const int64_t n = plan_.problem.block_rows;
    if (!case_.Allowed(q_block * n + i, kv_block * n + j)) return;
    const int64_t weight = ToyWeight(q_block * n + i, kv_block * n + j);
    const int64_t q_row = Place(attend.q_slot, q_block, i), kv_row = Place(attend.kv_slot, kv_block, j);
    const int64_t q_heads = static_cast<int64_t>(HeadsIn(attend.q_slot).size());
    const int64_t kv_heads = static_cast<int64_t>(HeadsIn(attend.kv_slot).size());
    for (int64_t h = 0; h < q_heads; ++h) {
      const int64_t kv_head = h * kv_heads / q_heads;
      const int64_t q = Operand(attend.q_slot, q_row, h), k = Operand(attend.kv_slot, kv_row, kv_head);
      const int64_t result_row = Place(attend.q_result, q_block, i);
      if (plan_.pass == Pass::kForward) {
        Add(attend.q_result, result_row, h, weight * q * k);
      } else {
        Add(attend.q_result, result_row, h, weight * (q + 2) * k);
        Add(attend.kv_result, Place(attend.kv_result, kv_block, j), kv_head, weight * q * (k + 1));
      }
    }
  }

  // kCopy, kReduce: of the heads that both have.
  void Transport(const Step& step, bool add) {
    if (add && spec(step.into).width == Width::kCompute) wrong_ = " adds up in a compute dtype";
    const std::vector<int64_t>&from = HeadsIn(step.slot), &to = HeadsIn(step.into);
    for (int64_t row = step.rows.rows.begin; row < step.rows.rows.end; ++row) {
      const int64_t from_row = Place(step.slot, step.rows.block, row);
      const int64_t to_row = Place(step.into, step.rows.block, row);
      for (size_t a = 0; a < from.size(); ++a) {
        for (size_t b = 0; b < to.size(); ++b) {
          if (from[a] != to[b]) continue;
          for (size_t field = 0; field < kFields; ++field) {
            const int64_t value = Get(step.slot, field, from_row, static_cast<int64_t>(a));
            const int64_t before = add ? Get(step.into, field, to_row, static_cast<int64_t>(b)) : 0;
            Set(step.into, field, to_row, static_cast<int64_t>(b), before + value);
          }
        }
      }
    }
  }

  int64_t Expected(Payload payload, int64_t own, int64_t head) const {
    const ExchangeProblem& problem = plan_.problem;
    const int64_t share = problem.heads / problem.kv_heads;
    int64_t sum = 0;
    for (int64_t other = 0; other < case_.rows(); ++other) {
      const bool of_keys = payload == Payload::kKvGrad;
      if (of_keys ? !case_.Allowed(other, own) : !case_.Allowed(own, other)) continue;
      const int64_t weight = of_keys ? ToyWeight(other, own) : ToyWeight(own, other);
      if (of_keys) {
        for (int64_t h = head * share; h < (head + 1) * share; ++h)
          sum += weight * ToyQuery(other, h, execution_) * (ToyKey(own, head, execution_) + 1);
        continue;
      }
      const int64_t plus = payload == Payload::kQueryGrad ? 2 : 0;
      sum += weight * (ToyQuery(own, head, execution_) + plus) * ToyKey(other, head / share, execution_);
    }
    return sum;
  }

  const ExchangeCase& case_;
  const ExchangePlan& plan_;
  const int cp_rank_;
  const int64_t execution_;
  std::vector<int64_t> super_row_;            // by global row: its place in slots of Span::kSuper
  std::vector<std::vector<int64_t>> heads_;   // by slot
  std::vector<std::vector<int64_t>> memory_;  // two for each slot
  std::vector<SlotMemory> slots_;
  std::string wrong_;
};

}  // namespace annulus::testing
