// Against tests/golden/llama.json, made by PyTorch in f64 (tests/golden/make_llama_golden.py says how, and
// gives the formulas of weights and tokens that are repeated here).

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "annulus/base/file.h"
#include "annulus/train/optimizer.h"
#include "model/mesh_run.h"
#include "support/optimizer_step.h"

namespace annulus::testing {
namespace {

using Json = nlohmann::json;

// Two f64 programs that sum in different orders: a few epsilons (2e-16) for each of the thousand or so
// operations on the way to a number, so 1e-12 for one pass. AdamW's first steps divide each gradient by its
// own size, which blows up the relative error of the smallest entries; ten of them keep within 1e-10.
constexpr double kPassTolerance = 1e-12;
constexpr double kStepsTolerance = 1e-10;

const Json& Golden() {
  static const Json golden = [] {
    const auto text = ReadFile(std::string(ANNULUS_SOURCE_DIR) + "/tests/golden/llama.json");
    return Json::parse(text.value(), nullptr, /*allow_exceptions=*/false);
  }();
  return golden;
}

ModelSpec SpecOf(int64_t window) {
  const Json& m = Golden()["model"];
  ModelSpec spec{.d_model = m["d_model"],
                 .vocab_size = m["vocab_size"],
                 .heads = m["heads"],
                 .kv_heads = m["kv_heads"],
                 .head_dim = m["head_dim"],
                 .d_ff = m["d_ff"],
                 .norm_eps = m["norm_eps"],
                 .init_stddev = 0.02,
                 .tied_head = m["tied_head"],
                 .layers = {}};
  spec.layers = ParsePattern(m["pattern"].get<std::string>(),
                             {.window = window, .rope_theta = m["rope_theta"].get<double>()})
                    .value()
                    .layers;
  return spec;
}

WholeBatch BatchOf(const Json& variant) {
  const int64_t sequences = Golden()["batch"]["sequences"], length = Golden()["batch"]["seq_len"];
  WholeBatch whole{.length = length,
                   .sequences = {.batch = sequences, .lengths = {}, .document_starts = {}},
                   .tokens = {},
                   .targets = {}};
  const auto token = [](int64_t b, int64_t i) {
    return static_cast<int32_t>((7 * i + 3 * i * i + 11 * b) % 97);
  };
  for (int64_t b = 0; b < sequences; ++b) {
    whole.sequences.lengths.push_back(length);
    std::vector<int64_t> starts;
    for (int64_t i = 0, document = 0; i < length; ++i) {
      for (int64_t start : variant["document_starts"][static_cast<size_t>(b)])
        document = start <= i ? start : document;
      starts.push_back(document);
    }
    whole.sequences.document_starts.push_back(std::move(starts));
    whole.tokens.emplace_back(), whole.targets.emplace_back();
    for (int64_t i = 0; i < length; ++i) {
      whole.tokens.back().push_back(token(b, i));
      whole.targets.back().push_back(token(b, i + 1));
    }
  }
  return whole;
}

void FillGolden(ParamStore& params) {
  const Json& parameters = Golden()["parameters"];
  ASSERT_EQ(parameters.size(), params.table().params.size());
  for (size_t t = 0; t < parameters.size(); ++t) {
    const std::string name = parameters[t]["name"];
    const TensorRef value = params.Value(params.table().IndexOf(name));
    ASSERT_EQ(parameters[t]["shape"].size(), static_cast<size_t>(value.rank())) << name;
    for (int64_t i = 0; i < value.elements(); ++i) {
      const int64_t n = i + 1;
      const double wave =
          static_cast<double>((n * (37 * n + 11) + 101 * static_cast<int64_t>(t)) % 1009) / 504.0 - 1.0;
      double& w = value.data<double>()[i];
      if (value.rank() == 1) {
        w = 1.0 + 0.1 * wave;
      } else {
        w = (name == "embed.weight" ? 1.0 : 2.0 / std::sqrt(static_cast<double>(value.dim(1)))) * wave;
      }
    }
  }
}

void ExpectNear(double got, double golden, double tolerance, absl::string_view what) {
  EXPECT_LE(std::abs(got - golden), tolerance * std::abs(golden)) << what << ": " << got << " for " << golden;
}

// Norm, and sampled entries relative to the largest of the tensor.
void ExpectTensor(const std::vector<double>& got, const Json& golden, double tolerance,
                  absl::string_view what) {
  double squares = 0, largest = 0;
  for (double x : got) {
    squares += x * x;
    largest = std::max(largest, std::abs(x));
  }
  ExpectNear(std::sqrt(squares), golden["norm"], tolerance, what);
  ASSERT_EQ(golden["index"].size(), golden["value"].size());
  ASSERT_GT(golden["index"].size(), 0u);
  for (size_t n = 0; n < golden["index"].size(); ++n) {
    const size_t index = golden["index"][n];
    ASSERT_LT(index, got.size());
    EXPECT_LE(std::abs(got[index] - golden["value"][n].get<double>()), tolerance * largest)
        << what << " at " << index;
  }
}

OptimSpec OptimOf() {
  const Json& o = Golden()["optim"];
  OptimSpec spec;
  spec.lr = o["lr"], spec.beta1 = o["beta1"], spec.beta2 = o["beta2"], spec.eps = o["eps"];
  spec.weight_decay = o["weight_decay"], spec.clip_norm = o["clip_norm"];
  spec.schedule.kind = ScheduleKind::kConstant;
  spec.steps = o["steps"];
  return spec;
}

// Ten steps of one rank; rank 0 compares.
void TakeSteps(const ModelSpec& model_spec, RankModel& model, const Json& variant) {
  const bool compares = model.mesh().world.rank() == 0;
  Communicator group = model.mesh().dp_cp;
  const OptimSpec spec = OptimOf();
  ShardedAdamW optimizer(model.ctx(), spec, model_spec, model.params(), {group, model.tensor()});
  const Json& steps = variant["steps"];
  ASSERT_EQ(static_cast<int64_t>(steps.size()), spec.steps);
  for (int64_t step = 0; step < spec.steps; ++step) {
    const Json& golden = steps[static_cast<size_t>(step)];
    const auto done = [&](int bucket) { return optimizer.StartReduce(bucket); };
    model.LossAndGradients({.needed = {}, .begun = {}, .done = done});
    const double norm = FinishStep(model.ctx(), optimizer,
                                   {.groups = {group, model.tensor()},
                                    .clip_norm = spec.clip_norm,
                                    .step = step + 1,
                                    .lr = LearningRate(spec, step)});
    const double loss = model.Loss();
    if (!compares) continue;
    ExpectNear(norm, golden["grad_norm"], kStepsTolerance, absl::StrCat("gradient norm of step ", step));
    ExpectNear(loss, golden["loss_after"], kStepsTolerance, absl::StrCat("loss after step ", step));
  }
  // Each rank has a share of the whole tensors.
  const GatheredTensors final_state = optimizer.Gather().value();
  double compared = 0;
  for (const NamedTensor& tensor : final_state.tensors) {
    if (!variant["final_weights"].contains(tensor.name)) continue;
    ExpectTensor(Doubles(tensor.tensor), variant["final_weights"][tensor.name], kStepsTolerance, tensor.name);
    ++compared;
  }
  Communicator world = model.mesh().world;
  EXPECT_EQ(world.AllReduceValue(compared, ReduceOp::kSum).value(), variant["final_weights"].size());
}

class GoldenLlama : public ::testing::TestWithParam<std::tuple<const char*, int, int, int>> {
 protected:
  const Json& variant() const { return Golden()["variants"][std::get<0>(GetParam())]; }
  MeshRun run() const {
    return {.dp = std::get<1>(GetParam()),
            .cp = std::get<2>(GetParam()),
            .tp = std::get<3>(GetParam()),
            .fill = FillGolden};
  }
  ModelSpec spec() const { return SpecOf(variant()["window"]); }
};

INSTANTIATE_TEST_SUITE_P(VariantsAndMeshes, GoldenLlama,
                         ::testing::Combine(::testing::Values("causal", "window_documents"),
                                            ::testing::Values(1, 2), ::testing::Values(1, 2),
                                            ::testing::Values(1, 2)),
                         [](const auto& info) {
                           return absl::StrCat(std::get<0>(info.param), "_dp", std::get<1>(info.param), "_cp",
                                               std::get<2>(info.param), "_tp", std::get<3>(info.param));
                         });

TEST_P(GoldenLlama, Logits) {
  ExpectTensor(Logits(spec(), BatchOf(variant()), run()), variant()["logits"], kPassTolerance, "logits");
}

TEST_P(GoldenLlama, LossAndGradients) {
  const Outcome outcome = Train(spec(), BatchOf(variant()), run());
  ExpectNear(outcome.loss, variant()["loss"], kPassTolerance, "loss");
  ASSERT_EQ(outcome.gradients.size(), variant()["gradients"].size());
  for (const auto& [name, gradient] : outcome.gradients) {
    ExpectTensor(gradient, variant()["gradients"][name], kPassTolerance, name);
  }
}

TEST_P(GoldenLlama, TenAdamWSteps) {
  OnMesh(spec(), BatchOf(variant()), run(), [&](RankModel& model) { TakeSteps(spec(), model, variant()); });
}

}  // namespace
}  // namespace annulus::testing
