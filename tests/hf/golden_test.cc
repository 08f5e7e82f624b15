// Models imported from folders of Transformers compute its logits; tests/golden/make_hf_golden.py made them.

#include "annulus/base/hash.h"
#include "hf/hf_testing.h"
#include "model/mesh_run.h"

namespace annulus::testing {
namespace {

// Two f64 programs that sum in different orders: a few epsilons for each of the thousand or so operations on
// the way to a logit, of the size of the largest.
constexpr double kTolerance = 1e-12;

class Golden : public ::testing::TestWithParam<std::string> {};

TEST_P(Golden, ImportedModelComputesTheLogits) {
  const Json golden = ReadGolden(GetParam());
  const TemporaryDirectory directory;
  WriteGoldenFolder(golden, directory.path());
  const absl::StatusOr<HfFolder> folder = HfFolder::Open(directory.path());
  ASSERT_TRUE(folder.ok()) << folder.status();
  EXPECT_EQ(folder->architecture(), golden["config"]["architectures"][0]);
  const ModelSpec& spec = folder->spec();
  const ImportedParameters imported(*folder);

  WholeBatch whole{.length = golden["length"], .sequences = {}, .tokens = {}, .targets = {}};
  whole.sequences.batch = golden["sequences"];
  for (int64_t b = 0; b < whole.sequences.batch; ++b) {
    whole.sequences.lengths.push_back(whole.length);
    whole.tokens.emplace_back(), whole.targets.emplace_back();
    for (int64_t i = 0; i < whole.length; ++i) {
      whole.tokens.back().push_back(static_cast<int32_t>((7 * i + 3 * i * i + 11 * b) % spec.vocab_size));
      whole.targets.back().push_back(kNotCounted);
    }
  }
  MeshRun run;
  run.fill = [&](ParamStore& params) {
    for (size_t i = 0; i < params.table().params.size(); ++i) {
      const TensorRef to = params.Value(static_cast<int>(i));
      std::memcpy(to.raw(), imported.Of(params.table().params[i].name).raw(),
                  static_cast<size_t>(to.bytes()));
    }
  };
  const std::vector<double> logits = Logits(spec, whole, run);

  double squares = 0, largest = 0;
  for (const double x : logits) squares += x * x, largest = std::max(largest, std::abs(x));
  const Json& want = golden["logits"];
  EXPECT_NEAR(std::sqrt(squares), want["norm"].get<double>(), kTolerance * want["norm"].get<double>());
  ASSERT_EQ(want["index"].size(), 200u);
  double worst = 0;
  for (size_t n = 0; n < want["index"].size(); ++n) {
    const double difference = std::abs(logits.at(want["index"][n]) - want["value"][n].get<double>());
    worst = std::max(worst, difference / largest);
  }

  EXPECT_LE(worst, kTolerance);
}

// Of our own class the logits are those of the code that is exported, as it is now.
TEST(GoldenCode, IsTheCodeThatIsExported) {
  const std::string code = ReadFile(std::string(ANNULUS_SOURCE_DIR) + "/src/hf/modeling_annulus.py").value();
  uint64_t fnv = 0xcbf29ce484222325;
  for (const char c : code) fnv = (fnv ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  for (const char* name : {"annulus", "annulus_gated"}) {
    EXPECT_EQ(ReadGolden(name)["made_by"]["code"], Hex64(fnv))
        << "python3 tests/golden/make_hf_golden.py " << name << " makes it of the code as it is now";
  }
}

INSTANTIATE_TEST_SUITE_P(Classes, Golden, ::testing::ValuesIn(GoldenCases()),
                         [](const auto& test) { return test.param; });

}  // namespace
}  // namespace annulus::testing
