#pragma once

// A plan written by hand, run on every byte pattern that it may not touch.

#include <gtest/gtest.h>

#include <algorithm>

#include "annulus/comm/exchange_transport.h"

namespace annulus::testing {

// Fields of several dtypes and shapes; copies from all heads to one group's and between spans; messages from
// slots of one span to slots of the other. Every byte that does not move stays what it was.
//
// Rank r computes head r. Each rank packs the head of the rank before for it and sends that; what it gets
// goes into rows of its super-block, and from there, by the rank after, to a slot of one block.
class MixedFields {
 public:
  explicit MixedFields(Communicator comm) : comm_(std::move(comm)), ranks_(comm_.size()) { MakePlan(); }

  void Run(ExchangeTransport& transport) {
    ASSERT_GE(ranks_, 2);
    Context ctx{Device{}};
    const ArenaScope scope(ctx.scratch);
    const SlotMemory home{.fields = Filled(ctx, spec(kHome))};
    ExchangeBinding binding;
    const SlotSource source{.home = [&](Payload) { return home; },
                            .fields = [&](const SlotSpec& slot) { return Fields(slot); }};
    binding.slots = transport.Slots(ctx, plan_, source).value();
    for (size_t s = 1; s < binding.slots.size(); ++s) Blank(binding.slots[s]);
    binding.compute = [&](const Step& step) {
      for (size_t f = 0; f < 3; ++f) CopyHead(step, f, binding.slots);
      return absl::OkStatus();
    };
    ExchangeStats stats;
    ASSERT_TRUE(transport.Execute(ctx, plan_, binding, &stats).ok());
    const int from = (comm_.rank() + 1) % ranks_;  // who packed for this rank
    Expect(binding.slots[kSuper], comm_.rank(), {{comm_.rank(), {0, 4}}, {from, {0, 4}}}, Span::kSuper);
    const int before = (comm_.rank() + ranks_ - 1) % ranks_;
    Expect(binding.slots[kBlock], before, {{comm_.rank(), {1, 2}}}, Span::kBlock);
    EXPECT_EQ(stats.bytes_sent, (4 + 1) * (8 + 3 + 16));
  }

 private:
  enum Slot { kHome, kPacked, kSuper, kBlock };
  static constexpr int64_t kRows = 4;

  const SlotSpec& spec(int slot) const {
    return plan_.ranks[static_cast<size_t>(comm_.rank())].slots[static_cast<size_t>(slot)];
  }
  int64_t HeadsOfSlot(const SlotSpec& slot) const { return slot.home ? ranks_ : 1; }
  std::vector<SlotField> Fields(const SlotSpec& slot) const {
    const int64_t heads = HeadsOfSlot(slot);
    return {{.dtype = DType::kI64, .row = {heads}},
            {.dtype = DType::kU8, .row = {heads, 3}},
            {.dtype = DType::kF32, .row = {2, heads, 2}}};
  }

  void MakePlan() {
    plan_.name = "mixed fields";
    plan_.problem.ranks = ranks_;
    plan_.problem.block_rows = kRows;
    plan_.problem.heads = plan_.problem.kv_heads = ranks_;
    // Two chunks a rank, of unlike size; in super-blocks the second ones come first.
    for (int r = 0; r < ranks_; ++r) {
      plan_.problem.chunks.push_back({.owner = r, .rows = {0, 1}, .position = 100 + r});
      plan_.problem.chunks.push_back({.owner = r, .rows = {1, kRows}, .position = 3 * r});
      plan_.groups.push_back({.q_begin = r, .q_end = r + 1, .kv_heads = {r}});
      plan_.super_rows.push_back(3 * ranks_ + r);
      plan_.super_rows.push_back(3 * r);
    }
    plan_.problem.keys.resize(plan_.problem.chunks.size() * plan_.problem.chunks.size());
    plan_.problem.pairs.resize(plan_.problem.keys.size());
    plan_.super_size = ranks_ * kRows;
    for (int r = 0; r < ranks_; ++r) plan_.ranks.push_back(RankPlanOf(r));
  }

  RankPlan RankPlanOf(int r) const {
    const int before = (r + ranks_ - 1) % ranks_, after = (r + 1) % ranks_;
    RankPlan rank;
    rank.slots = {{.home = true, .group = kAllHeads},
                  {.group = before},
                  {.group = r, .span = Span::kSuper},
                  {.group = before}};
    const auto chunk = [](int block, int which) {
      return BlockRows{block, which == 0 ? RowRange{0, 1} : RowRange{1, kRows}};
    };
    rank.steps.push_back({.kind = StepKind::kCopy, .slot = kHome, .into = kPacked, .rows = {r, {0, kRows}}});
    for (const int which : {0, 1}) {
      rank.steps.push_back({.kind = StepKind::kSend,
                            .slot = kPacked,
                            .rows = chunk(r, which),
                            .peer = before,
                            .message = 2 * r + which,
                            .after = {0}});
      rank.steps.push_back({.kind = StepKind::kReceive,
                            .slot = kSuper,
                            .rows = chunk(after, which),
                            .peer = after,
                            .message = 2 * after + which});
    }
    for (const int which : {0, 1})
      rank.steps.push_back({.kind = StepKind::kCopy, .slot = kHome, .into = kSuper, .rows = chunk(r, which)});
    // The first row of the second chunk goes on, out of the super-block.
    rank.steps.push_back({.kind = StepKind::kSend,
                          .slot = kSuper,
                          .rows = {after, {1, 2}},
                          .peer = after,
                          .message = 2 * ranks_ + r,
                          .after = {4}});
    rank.steps.push_back({.kind = StepKind::kReceive,
                          .slot = kBlock,
                          .rows = {r, {1, 2}},
                          .peer = before,
                          .message = 2 * ranks_ + before});
    return rank;
  }

  // ---- Contents -------------------------------------------------------------------------------------

  static constexpr char kBlank = 0x5a;
  static uint8_t ByteAt(int block, int64_t row, int64_t head, size_t field, int64_t i) {
    return static_cast<uint8_t>(
        1 + (block * 131 + row * 31 + head * 17 + static_cast<int64_t>(field) * 7 + i) % 80);
  }
  // Field f's bytes of one head of one row: pieces of so many bytes, and how many.
  static int64_t PieceBytes(size_t field) { return field == 1 ? 3 : 8; }
  static int64_t Pieces(size_t field) { return field == 2 ? 2 : 1; }
  // Piece p of a head in a row of a field with so many heads.
  static uint8_t* PieceAt(const TensorRef& field, size_t f, int64_t row, int64_t heads, int64_t head,
                          int64_t p) {
    return static_cast<uint8_t*>(field.raw()) + ((row * Pieces(f) + p) * heads + head) * PieceBytes(f);
  }

  std::vector<TensorRef> Filled(Context& ctx, const SlotSpec& slot) const {
    std::vector<TensorRef> fields;
    for (const SlotField& field : Fields(slot)) {
      std::vector<int64_t> dims = {kRows};
      dims.insert(dims.end(), field.row.dims().begin(), field.row.dims().end());
      fields.push_back(ctx.scratch.Allocate(field.dtype, Shape(absl::MakeConstSpan(dims))));
      const size_t f = fields.size() - 1;
      for (int64_t row = 0; row < kRows; ++row) {
        for (int64_t head = 0; head < ranks_; ++head) Fill(fields[f], f, row, head, ranks_, row);
      }
    }
    return fields;
  }
  void Fill(const TensorRef& field, size_t f, int64_t at, int64_t head, int64_t heads, int64_t row) const {
    for (int64_t p = 0; p < Pieces(f); ++p) {
      for (int64_t i = 0; i < PieceBytes(f); ++i)
        PieceAt(field, f, at, heads, head, p)[i] = ByteAt(comm_.rank(), row, head, f, p * 8 + i);
    }
  }
  static void Blank(const SlotMemory& slot) {
    for (const TensorRef& field : slot.fields)
      std::fill_n(static_cast<char*>(field.raw()), field.bytes(), kBlank);
  }

  void CopyHead(const Step& step, size_t f, const std::vector<SlotMemory>& slots) const {
    const int64_t head = spec(step.into).group;
    const int64_t from = RowInSlot(plan_, spec(step.slot), step.rows);
    const int64_t to = RowInSlot(plan_, spec(step.into), step.rows);
    for (int64_t row = 0; row < step.rows.rows.size(); ++row) {
      for (int64_t p = 0; p < Pieces(f); ++p) {
        std::copy_n(PieceAt(slots[static_cast<size_t>(step.slot)].fields[f], f, from + row, ranks_, head, p),
                    PieceBytes(f),
                    PieceAt(slots[static_cast<size_t>(step.into)].fields[f], f, to + row, 1, 0, p));
      }
    }
  }

  // These rows of `head`, and nothing else.
  void Expect(const SlotMemory& slot, int head, const std::vector<BlockRows>& written, Span span) const {
    for (size_t f = 0; f < slot.fields.size(); ++f) {
      const TensorRef& field = slot.fields[f];
      std::vector<uint8_t> expected(static_cast<size_t>(field.bytes()), kBlank);
      for (const BlockRows& rows : written) {
        for (int64_t row = rows.rows.begin; row < rows.rows.end; ++row) {
          const int64_t super = row == 0 ? 3 * ranks_ + rows.block : 3 * rows.block + row - 1;
          const int64_t at = span == Span::kSuper ? super : row;
          for (int64_t i = 0; i < Pieces(f) * PieceBytes(f); ++i) {
            expected[static_cast<size_t>(at * Pieces(f) * PieceBytes(f) + i)] =
                ByteAt(rows.block, row, head, f, i);
          }
        }
      }
      const uint8_t* got = static_cast<const uint8_t*>(field.raw());
      EXPECT_TRUE(std::equal(expected.begin(), expected.end(), got))
          << "rank " << comm_.rank() << ", field " << f;
    }
  }

  Communicator comm_;
  const int ranks_;
  ExchangePlan plan_;
};

}  // namespace annulus::testing
