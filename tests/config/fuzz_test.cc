// Mutated configurations and overrides: each gives a Status, and whatever is accepted loads again from its
// resolved text. Deterministic; meant to run under the address and undefined-behaviour sanitizers too.

#include "annulus/base/random.h"
#include "annulus/train/profile.h"
#include "sample_config.h"

namespace annulus {
namespace {

std::string SampleWithMore() {
  std::string text = Changed("sequences_per_step: 8", R"(sequences_per_step: 8 micro_batch: 2
  schedule { warmup_stable_decay { warmup_steps: 3 decay_steps: 4 final_ratio: 0.5 } }
}
parallel {
  dp: 2 cp: 2 layout: ZIGZAG exchange { plan: KV_RING head_split: 2 backward { plan: MESH inner: 1 } })");
  absl::StrReplaceAll({{"seq_len: 64", R"(seq_len: 64 document_mask: false packing: DOCUMENTS
  train { megatron { prefix: "p" } weight: 2 }
  validation { llmc { path: "l" document_start_token: 3 } })"},
                       {"(A -)^2", "meta=3 (A+M{combine=mean-norm} -)^2 T{g=2}"},
                       {"d_model: 64", R"(d_model: 64 vocab_size: 500
  mamba { head_dim: 16 state: 8 groups: 2 } latent { heads: 4 kv_rank: 32 nope_dim: 8 rope_dim: 4 }
  rope_scaling { yarn { factor: 4 original_length: 64 } })"}},
                      &text);
  return text;
}

class Dice {
 public:
  explicit Dice(uint64_t seed) : random_(seed, "fuzz") {}
  uint64_t Below(uint64_t n) { return random_.Below(next_++, n); }

 private:
  RandomStream random_;
  uint64_t next_ = 0;
};

std::vector<std::string> Tokens(const std::string& text) {
  std::vector<std::string> tokens;
  for (const char c : text) {
    const bool word = std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '.' || c == '-';
    const bool joins =
        word && !tokens.empty() && std::isalnum(static_cast<unsigned char>(tokens.back().back()));
    if (joins) {
      tokens.back() += c;
    } else {
      tokens.emplace_back(1, c);
    }
  }
  return tokens;
}

std::string Join(const std::vector<std::string>& tokens) {
  std::string text;
  for (const std::string& token : tokens) text += token;
  return text;
}

const std::vector<std::string>& Splices() {
  static const std::vector<std::string> splices = {"0",
                                                   "-1",
                                                   "9223372036854775807",
                                                   "-9223372036854775808",
                                                   "1e308",
                                                   "nan",
                                                   "inf",
                                                   "0x7f",
                                                   "1e-320",
                                                   "\"\"",
                                                   "{",
                                                   "}",
                                                   "[",
                                                   "]",
                                                   "<",
                                                   ">",
                                                   ":",
                                                   "true",
                                                   "NONE",
                                                   "\\x00",
                                                   "\xff",
                                                   "#",
                                                   "model {",
                                                   "train { }",
                                                   "(((",
                                                   "^99",
                                                   "\"\\",
                                                   "10000000"};
  return splices;
}

std::string MutateOnce(const std::string& text, Dice* dice) {
  if (text.empty()) return "x";
  const size_t at = dice->Below(text.size());
  const size_t length = 1 + dice->Below(12);
  std::string out = text;
  std::vector<std::string> tokens;
  switch (dice->Below(7)) {
    case 0:
      out[at] = static_cast<char>(out[at] ^ (1u << dice->Below(8)));
      return out;
    case 1:
      out[at] = static_cast<char>(dice->Below(256));
      return out;
    case 2:
      return out.erase(at, length);
    case 3:
      return out.insert(at, text.substr(at, length));
    case 4:
      return out.insert(at, Splices()[dice->Below(Splices().size())]);
    case 5:
      tokens = Tokens(text);
      std::swap(tokens[dice->Below(tokens.size())], tokens[dice->Below(tokens.size())]);
      return Join(tokens);
    default:
      tokens = Tokens(text);
      tokens[dice->Below(tokens.size())] = Splices()[dice->Below(Splices().size())];
      return Join(tokens);
  }
}

struct Counts {
  int accepted = 0, refused = 0;
};

void Try(const std::string& text, const std::vector<std::string>& overrides, Counts* counts) {
  const auto config = Load(text, overrides, 4);
  if (!config.ok()) {
    ++counts->refused;
    EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_FALSE(config.status().message().empty());
    return;
  }
  ++counts->accepted;
  EXPECT_TRUE(ValidateForWorld(config->spec, 4).ok()) << text;
  const auto again = Load(config->text, {}, 4);
  ASSERT_TRUE(again.ok()) << again.status() << "\n" << config->text;
  EXPECT_TRUE(again->spec == config->spec) << config->text;
}

TEST(ConfigFuzz, MutatedTexts) {
  const std::string bases[] = {kSampleConfig, SampleWithMore()};
  for (const std::string& base : bases) ASSERT_EQ(ErrorsOf(base, {}, 4), "ok");
  Counts counts;
  for (uint64_t seed = 0; seed < 6000; ++seed) {
    Dice dice(seed);
    std::string text = bases[seed % 2];
    const uint64_t mutations = 1 + dice.Below(3);
    for (uint64_t i = 0; i < mutations; ++i) text = MutateOnce(text, &dice);
    Try(text, {}, &counts);
  }
  // Both ways are taken often enough to mean something.
  EXPECT_GT(counts.accepted, 100);
  EXPECT_GT(counts.refused, 2000);
}

TEST(ConfigFuzz, MutatedOverrides) {
  const std::vector<std::string> overrides = {"optim.adamw.lr=3e-4",
                                              "data.train[0].text.path=x",
                                              "data.train[1].megatron={prefix:\"p\"}",
                                              "parallel.layout=STRIPED",
                                              "optim.schedule={cosine{warmup_steps:3 final_ratio:0.5}}",
                                              "model.pattern=(A{w=3} - A{kv=@-2})^2 A{rope=none}",
                                              "parallel.tp=2",
                                              "model.tied_head=false",
                                              "seed=12"};
  Counts counts;
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    Dice dice(seed + 100000);
    std::vector<std::string> mutated;
    const uint64_t number = 1 + dice.Below(3);
    for (uint64_t i = 0; i < number; ++i) {
      mutated.push_back(overrides[dice.Below(overrides.size())]);
      if (dice.Below(3) > 0) mutated.back() = MutateOnce(mutated.back(), &dice);
    }
    Try(kSampleConfig, mutated, &counts);
  }
  EXPECT_GT(counts.accepted, 100);
  EXPECT_GT(counts.refused, 300);
}

TEST(ProfileFuzz, MutatedTexts) {
  const std::string base = R"(device: "d" measured: true ranks: 2 launch_seconds: 1e-6
copy { size: 1 per_second: 2 } copy { size: 3 per_second: 4 }
link { transport: NCCL one_way { size: 1 per_second: 2 } both_ways { size: 1 per_second: 2 }
  message_seconds: 1e-5 computing_slowdown: 1.5 }
attention { kernel: CUDNN pass: BACKWARD shape: FULL head_dim: 64 v_head_dim: 64
  pairs { size: 1 per_second: 2 } pairs { size: 3 per_second: 4 } })";
  ASSERT_TRUE(ParseProfile("p", base).ok()) << ParseProfile("p", base).status();
  Counts counts;
  for (uint64_t seed = 0; seed < 3000; ++seed) {
    Dice dice(seed + 200000);
    const auto profile = ParseProfile("p", MutateOnce(base, &dice));
    ++(profile.ok() ? counts.accepted : counts.refused);
    if (!profile.ok()) {
      EXPECT_FALSE(profile.status().message().empty());
      continue;
    }
    const auto again = ParseProfile("p", ProfileText(*profile));
    ASSERT_TRUE(again.ok()) << again.status() << "\n" << ProfileText(*profile);
    EXPECT_TRUE(*again == *profile) << ProfileText(*profile);
  }
  EXPECT_GT(counts.accepted, 100);
  EXPECT_GT(counts.refused, 1000);
}

}  // namespace
}  // namespace annulus
