// A trained model goes out to a folder of Transformers and comes back as a run that samples the same text and
// trains on; latent attention is converted to its tensor-parallel form.

#include "absl/strings/str_replace.h"
#include "system/tiny_run.h"

namespace annulus::testing {
namespace {

class HuggingFaceTest : public ::testing::Test {
 protected:
  HuggingFaceTest() { WriteTinyInputs(folder_.path()); }
  JobResult Run(std::vector<std::string> arguments) const {
    return RunJob({.folder = folder_.path(), .ranks = 1, .arguments = std::move(arguments)});
  }
  void RunWell(std::vector<std::string> arguments) const { ExpectDone(Run(std::move(arguments))); }
  std::string Sampled(const std::string& run) const {
    const JobResult result = Run({"sample", run, "--prompt", "ab", "--tokens", "12", "--temperature", "0"});
    ExpectDone(result);
    return result.out;
  }

  const TemporaryFolder folder_;
};

TEST_F(HuggingFaceTest, OutAndBackAgain) {
  ExpectDone(RunJob(TrainJob(folder_.path(), 1, "a", {"optim.steps=3"})));
  RunWell({"export", "c.textproto", "--checkpoint", "a", "--out", "hf", "--probe"});
  for (const char* file : {"config.json", "model.safetensors", "probe.json"}) {
    EXPECT_TRUE(Exists(folder_.path() + "/hf/" + file)) << file;
  }
  RunWell({"import", "hf", "--like", "c.textproto", "--out", "b"});
  EXPECT_EQ(Sampled("b"), Sampled("a"));

  // At step 0 it may go on with any data.
  ExpectDone(RunJob({.folder = folder_.path(),
                     .ranks = 2,
                     .arguments = {"train", "b/config.textproto", "--run_dir", "b", "--resume", "--set",
                                   "data.seq_len=17"}}));
  EXPECT_EQ(LastStep(folder_.path() + "/b"), 8);
  const JobResult twice = Run({"import", "hf", "--like", "c.textproto", "--out", "b"});
  EXPECT_EQ(twice.exit_code, 1);
  EXPECT_TRUE(absl::StrContains(twice.err, "error: --out=b: already holds a run; expected a new directory"))
      << twice;
}

TEST_F(HuggingFaceTest, ConvertsLatentAttention) {
  Overwrite(folder_.path() + "/c.textproto",
            absl::StrReplaceAll(kTinyConfig, {{"(A -)^2", "(T -)^2"},
                                              {"attention { heads: 2 kv_heads: 1 }",
                                               "latent { heads: 2 kv_rank: 8 nope_dim: 8 rope_dim: 4 }"}}));
  ExpectDone(RunJob(TrainJob(folder_.path(), 1, "a", {"optim.steps=3"})));
  for (const char* transform : {"pca", "hadamard"}) {
    const JobResult result = Run({"convert", "c.textproto", "--checkpoint", "a", "--groups", "2",
                                  "--transform", transform, "--calibration", "2", "--out", transform});
    ExpectDone(result);
    EXPECT_TRUE(absl::StrContains(result.out, "perplexity of")) << result;
    EXPECT_EQ(Sampled(transform).size(), Sampled("a").size());
  }
  const JobResult result =
      Run({"convert", "c.textproto", "--checkpoint", "a", "--groups", "3", "--out", "x"});
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_TRUE(absl::StrContains(result.err, "--groups=3: expected a divisor of model.latent.kv_rank=8"))
      << result;
}

}  // namespace
}  // namespace annulus::testing
