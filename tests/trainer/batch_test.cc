// However sequences are spread over ranks, together the ranks hold each token of the step once.

#include "annulus/train/batch.h"

#include <tuple>

#include "trainer/trainer_testing.h"

namespace annulus::testing {
namespace {

// What the ranks hold of one sequence, put back in its place.
struct Gathered {
  std::vector<int32_t> tokens, targets;
  std::vector<int> holders;  // ranks by position
  std::vector<int64_t> document_starts;
};

void GatherRank(const Batch& batch, const SequenceLayout& layout, int cp_rank, size_t first,
                std::vector<Gathered>* all) {
  for (const MicroBatch& micro : batch) {
    const size_t count = static_cast<size_t>(micro.sequences.batch);
    const std::vector<int64_t> positions = layout.LocalPositions(cp_rank);
    ASSERT_EQ(micro.tokens.size(), positions.size() * count);
    ASSERT_EQ(micro.targets.size(), positions.size() * count);
    for (size_t i = 0; i < micro.tokens.size(); ++i) {
      const size_t position = static_cast<size_t>(positions[i / count]);
      Gathered& sequence = all->at(first + i % count);
      if (position >= sequence.tokens.size()) {  // padding of the layout
        EXPECT_EQ(micro.targets[i], kIgnoredTarget);
        continue;
      }
      sequence.tokens[position] = micro.tokens[i];
      sequence.targets[position] = micro.targets[i];
      ++sequence.holders[position];
    }
    for (size_t i = 0; i < micro.sequences.document_starts.size(); ++i) {
      all->at(first + i).document_starts = micro.sequences.document_starts[i];
    }
    first += count;
  }
}

// Meta tokens stand before every sequence, at the rows of the first positions.
TEST(MakeMicroBatch, MetaTokensComeFirst) {
  const RunSpec spec = SmallRun({"model.pattern=meta=2 A -", "parallel.tp=2", "parallel.cp=2"});
  Sequence sequence{
      .tokens = {5, 6, 7, 8}, .targets = {6, -1, 8, 9}, .document_starts = {0, 0, 2, 2}, .length = 3};
  const SequenceLayout layout(LayoutKind::kContiguous, 4 + 2, 2, 2);  // 4 rows a rank
  const MicroBatch first = MakeMicroBatch({sequence}, spec, layout, 0);
  EXPECT_EQ(first.tokens, (std::vector<int32_t>{256, 257, 5, 6}));
  EXPECT_EQ(first.targets, (std::vector<int32_t>{-1, -1, 6, -1}));
  EXPECT_EQ(first.sequences.lengths, (std::vector<int64_t>{5}));
  EXPECT_TRUE(first.sequences.document_starts.empty());
  EXPECT_EQ(first.counted_tokens, 3);
  const MicroBatch second = MakeMicroBatch({sequence}, spec, layout, 1);
  EXPECT_EQ(second.tokens, (std::vector<int32_t>{7, 0, 0, 0}));
  EXPECT_EQ(second.targets, (std::vector<int32_t>{8, -1, -1, -1}));
  EXPECT_EQ(LayoutOf(spec).length(), spec.data.seq_len + 2);
  EXPECT_EQ(LayoutOf(spec).local_rows() % 2, 0);
}

class BatchTest : public ::testing::TestWithParam<std::tuple<int, int, LayoutKind>> {};

TEST_P(BatchTest, RanksTogetherHoldEachTokenOfTheStepOnce) {
  const auto [dp, cp, kind] = GetParam();
  const RunSpec spec = SmallRun(
      {"data.document_mask=true", "data.packing=DOCUMENTS", "data.train[0].text.document_separator=\\n"});
  const std::unique_ptr<DataSet> data = OpenData(spec);
  const SequenceLayout layout(kind, spec.data.seq_len, cp);
  constexpr int64_t kStep = 3;
  const size_t sequences = static_cast<size_t>(spec.optim.sequences_per_step);
  const size_t length = static_cast<size_t>(spec.data.seq_len);
  std::vector<Gathered> all(sequences, {.tokens = std::vector<int32_t>(length),
                                        .targets = std::vector<int32_t>(length),
                                        .holders = std::vector<int>(length),
                                        .document_starts = {}});
  int64_t counted = 0;
  for (int dp_rank = 0; dp_rank < dp; ++dp_rank) {
    for (int cp_rank = 0; cp_rank < cp; ++cp_rank) {
      const absl::StatusOr<Batch> batch = LoadBatch(*data, spec, layout, kStep, dp_rank, dp, cp_rank);
      ASSERT_TRUE(batch.ok()) << batch.status();
      GatherRank(*batch, layout, cp_rank, sequences / static_cast<size_t>(dp) * static_cast<size_t>(dp_rank),
                 &all);
      if (cp_rank > 0) continue;
      for (const MicroBatch& micro : *batch) counted += micro.counted_tokens;
    }
  }
  int64_t targets = 0;
  for (size_t n = 0; n < sequences; ++n) {
    const absl::StatusOr<Sequence> want =
        data->Train(kStep * spec.optim.sequences_per_step + static_cast<int64_t>(n));
    ASSERT_TRUE(want.ok()) << want.status();
    EXPECT_EQ(all[n].holders, std::vector<int>(length, 1));
    EXPECT_EQ(all[n].targets, want->targets);
    EXPECT_EQ(all[n].document_starts, want->document_starts);
    for (size_t p = 0; p < static_cast<size_t>(want->length); ++p)
      EXPECT_EQ(all[n].tokens[p], want->tokens[p]);
    for (int32_t target : want->targets) targets += target != kIgnoredTarget;
  }
  EXPECT_EQ(counted, targets);
  EXPECT_GT(targets, 0);
}

INSTANTIATE_TEST_SUITE_P(Meshes, BatchTest,
                         ::testing::Combine(::testing::Values(1, 2, 3, 4), ::testing::Values(1, 2, 3),
                                            ::testing::Values(LayoutKind::kContiguous, LayoutKind::kZigzag,
                                                              LayoutKind::kStriped)));

TEST(LoadBatch, CutsIntoMicroBatchesWithTheRestLast) {
  const RunSpec spec = SmallRun({"optim.micro_batch=4"});
  const std::unique_ptr<DataSet> data = OpenData(spec);
  const SequenceLayout layout(LayoutKind::kZigzag, spec.data.seq_len, 2);
  const absl::StatusOr<Batch> batch = LoadBatch(*data, spec, layout, 0, 1, 2, 0);  // 6 sequences
  ASSERT_TRUE(batch.ok()) << batch.status();
  ASSERT_EQ(batch->size(), 2u);
  EXPECT_EQ((*batch)[0].sequences.batch, 4);
  EXPECT_EQ((*batch)[1].sequences.batch, 2);
  EXPECT_TRUE((*batch)[0].sequences.document_starts.empty());  // no document mask, one document
}

TEST(LoadBatch, NamesATokenOutsideTheVocabulary) {
  RunSpec spec = SmallRun();
  spec.model.vocab_size = 'r';  // "w" is above
  const std::unique_ptr<DataSet> data = OpenData(spec);
  const SequenceLayout layout(LayoutKind::kZigzag, spec.data.seq_len, 1);
  const absl::Status status = LoadBatch(*data, spec, layout, 0, 0, 1, 0).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kOutOfRange) << status;
}

}  // namespace
}  // namespace annulus::testing
