// Sampled text depends on parameters, prompt, temperature and seed, and on nothing else.

#include "annulus/train/sample.h"

#include "trainer/trainer_testing.h"

namespace annulus::testing {
namespace {

class SampleTest : public ::testing::Test {
 protected:
  SampleTest() { params_.Initialize(3); }

  std::string Text(const SampleSpec& sample, uint64_t seed, int64_t max_context = 11) const {
    std::string text;
    Context ctx{Device{}};
    const TrainedModel model{.spec = spec_.model, .params = params_, .max_context = max_context};
    const absl::Status status = Sample(ctx, model, sample, seed, [&](char byte) { text += byte; });
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_EQ(ctx.determinism, Determinism::kOff) << "as before";
    return text;
  }

  // Wider initial weights than training would use: logits that differ.
  const RunSpec spec_ = SmallRun({"model.init_stddev=0.7"});
  ParamStore params_{Device{}, DType::kF64, BuildParamTable(spec_.model), 1};
};

TEST_F(SampleTest, IsAFunctionOfTheSeed) {
  const SampleSpec sample{.prompt = "word", .tokens = 40, .temperature = 1.0};
  const std::string text = Text(sample, 1);
  EXPECT_EQ(text.size(), 40u);
  EXPECT_EQ(Text(sample, 1), text);
  EXPECT_NE(Text(sample, 2), text);
  EXPECT_NE(Text({.prompt = "Word", .tokens = 40, .temperature = 1.0}, 1), text);
  // A longer sample begins with the shorter one.
  EXPECT_EQ(Text({.prompt = "word", .tokens = 15, .temperature = 1.0}, 1), text.substr(0, 15));
}

TEST_F(SampleTest, TakesTheLikeliestByteAtTemperatureZero) {
  const SampleSpec greedy{.prompt = "word", .tokens = 20, .temperature = 0};
  const std::string text = Text(greedy, 1);
  EXPECT_EQ(Text(greedy, 2), text);
  EXPECT_EQ(Text({.prompt = "word", .tokens = 20, .temperature = 1e-6}, 3), text);

  // The same choice from the decoder's logits.
  Context ctx{Device{}};
  Decoder decoder(spec_.model, Recompute::kNone, params_);
  AttentionGeometry geometry(SequenceLayout(LayoutKind::kContiguous, 4, 1), MakeLoopbackGroup(1)[0]);
  geometry.SetBatch({.batch = 1, .lengths = {4}, .document_starts = {}});
  ModelStep step{.geometry = geometry};
  Tensor logits(Device{}, DType::kF64, Shape({4, spec_.model.vocab_size}));
  const std::vector<int32_t> prompt = {'w', 'o', 'r', 'd'};
  ASSERT_TRUE(decoder.Logits(ctx, step, {prompt.data(), DType::kI32, Device{}, {4}}, 0, logits.ref()).ok());
  const double* last = logits.ref().data<double>() + 3 * spec_.model.vocab_size;
  EXPECT_EQ(std::max_element(last, last + 256) - last, static_cast<unsigned char>(text[0]));
}

TEST_F(SampleTest, SeesNoMoreThanTheContext) {
  const SampleSpec sample{.prompt = "abcdefgh", .tokens = 1, .temperature = 0.5};
  const SampleSpec other_start{.prompt = "ABcdefgh", .tokens = 1, .temperature = 0.5};
  bool seen = false;
  for (uint64_t seed = 1; seed <= 50; ++seed) {
    EXPECT_EQ(Text(sample, seed, 6), Text(other_start, seed, 6)) << seed;
    seen = seen || Text(sample, seed, 8) != Text(other_start, seed, 8);
  }
  EXPECT_TRUE(seen);
}

TEST_F(SampleTest, AnEmptyPromptStartsALine) {
  EXPECT_EQ(Text({.prompt = "", .tokens = 12}, 1), Text({.prompt = "\n", .tokens = 12}, 1));
}

// Whatever the rank count does not divide: lengths, meta tokens, the vocabulary.
TEST_F(SampleTest, IsTheSameOnTensorParallelRanks) {
  ModelSpec spec = spec_.model;
  spec.heads = 12, spec.meta_tokens = 2, spec.vocab_size = 257;
  const auto text = [&](int tp) {
    std::vector<std::string> texts(static_cast<size_t>(tp));
    OnLoopback(tp, [&](Communicator comm) {
      ParamStore params(Device{}, DType::kF64, BuildParamTable(spec, {comm.rank(), tp}), 1);
      params.Initialize(3);
      Context ctx{Device{}};
      const TrainedModel model{
          .spec = spec, .params = params, .max_context = 7, .tensor = TensorParallel(comm)};
      const SampleSpec sample{.prompt = "word", .tokens = 20, .temperature = 1.0};
      std::string& own = texts[static_cast<size_t>(comm.rank())];
      ANNULUS_CHECK_OK(Sample(ctx, model, sample, 1, [&](char byte) { own += byte; }));
    });
    for (const std::string& each : texts) EXPECT_EQ(each, texts[0]) << tp << " ranks";
    return texts[0];
  };
  const std::string one = text(1);
  EXPECT_EQ(one.size(), 20u);
  for (const int tp : {2, 3, 4}) EXPECT_EQ(text(tp), one) << tp << " ranks";
}

TEST_F(SampleTest, NeedsAVocabularyOfBytes) {
  ModelSpec model = spec_.model;
  model.vocab_size = 200;
  const ParamStore params(Device{}, DType::kF64, BuildParamTable(model), 1);
  Context ctx{Device{}};
  const absl::Status status = Sample(ctx, {.spec = model, .params = params, .max_context = 11},
                                     {.prompt = "a", .tokens = 1}, 1, [](char) {});
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("model.vocab_size=200"), std::string::npos) << status;
}

}  // namespace
}  // namespace annulus::testing
