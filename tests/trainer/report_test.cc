// What a run prints and writes: durations, sizes, the step line, metrics, and which rank prints at all.

#include "annulus/train/report.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <limits>
#include <nlohmann/json.hpp>

#include "absl/strings/match.h"

namespace annulus {
namespace {

StepReport Report() {
  return {.step = 120,
          .loss = 2.9134,
          .grad_norm = 0.714,
          .lr = 3e-4,
          .tokens = 131072,
          .step_ms = 1482.4,
          .tokens_per_second = 88400,
          .tflops_causal = 0.0123,
          .tflops_full = 0.02,
          .exposed_exchange_ms = 14.824,
          .exposed_reduce_ms = 29.648,
          .data_ms = 148.24,
          .exposed_tensor_ms = 0,
          .memory_peak_bytes = int64_t{3} << 29,
          .memory = {.parameters = 1 << 10, .gradients = 2 << 10, .optimizer = 3 << 20, .exchange = 4},
          .other_memory_bytes = 5,
          .skipped = false};
}

TEST(Format, Durations) {
  const std::pair<double, const char*> cases[] = {
      {-3, "0s"},      {0, "0s"},       {8.4, "8s"},      {59.4, "59s"}, {59.6, "1m 0s"},
      {61, "1m 1s"},   {599, "9m 59s"}, {600, "10m"},     {2760, "46m"}, {3599, "59m"},
      {3600, "1h 0m"}, {7500, "2h 5m"}, {90000, "25h 0m"}};
  for (const auto& [seconds, text] : cases) EXPECT_EQ(FormatDuration(seconds), text) << seconds;
}

TEST(Format, CountsAndBytes) {
  EXPECT_EQ(FormatCount(0), "0");
  EXPECT_EQ(FormatCount(999), "999");
  EXPECT_EQ(FormatCount(88400), "88.40k");
  EXPECT_EQ(FormatCount(1.2e6), "1.20M");
  EXPECT_EQ(FormatCount(8e9), "8.00G");
  EXPECT_EQ(FormatBytes(0), "0 B");
  EXPECT_EQ(FormatBytes(1023), "1023 B");
  EXPECT_EQ(FormatBytes(1024), "1.0 KiB");
  EXPECT_EQ(FormatBytes(71.2 * 1024 * 1024 * 1024), "71.2 GiB");
  EXPECT_EQ(FormatBytes(5e15), "4547.5 TiB");
}

TEST(Format, MemoryByWhatItIsFor) {
  EXPECT_EQ(MemoryText(Report().memory),
            "parameters 1.0 KiB, gradients 2.0 KiB, optimizer 3.0 MiB, exchange 4 B");
  EXPECT_EQ(MemoryText({}), "");
}

TEST(StepLine, SaysWhatTensorParallelRanksWaitFor) {
  StepReport report = Report();
  EXPECT_FALSE(absl::StrContains(StepLine(report, 2000, 8, 0), "tensor"));
  EXPECT_FALSE(absl::StrContains(MetricsJson(report, std::nullopt), "exposed_tensor_ms"));
  report.exposed_tensor_ms = 148.24;
  EXPECT_TRUE(absl::StrContains(StepLine(report, 2000, 8, 0), "gradients 2.0% tensor 10.0% |"));
  EXPECT_TRUE(absl::StrContains(MetricsJson(report, std::nullopt), "\"exposed_tensor_ms\":148.24"));
}

TEST(Metrics, SayWhatStateSpaceLayersSent) {
  StepReport report = Report();
  EXPECT_FALSE(absl::StrContains(MetricsJson(report, std::nullopt), "state_bytes"));
  report.state_bytes = 123456;
  EXPECT_TRUE(absl::StrContains(MetricsJson(report, std::nullopt), "\"state_bytes\":123456"));
}

TEST(StepLine, SaysWhatHappenedAndWhatIsLeft) {
  const std::string line = StepLine(Report(), 2000, 8, 2760);
  for (const char* part :
       {"step 120/2000 6%", "loss 2.913", "gnorm 0.71", "1,482 ms", "88.40k tok/s (11.05k/rank)",
        "12.3 GFLOP/s causal/rank", "data 10.0%", "exchange 1.0%", "gradients 2.0%", "1.5 GiB", "ETA 46m"}) {
    EXPECT_TRUE(absl::StrContains(line, part)) << part << " in: " << line;
  }
  EXPECT_FALSE(absl::StrContains(line, "SKIPPED"));
  EXPECT_FALSE(absl::StrContains(line, "\n"));
  StepReport skipped = Report();
  skipped.skipped = true;
  EXPECT_TRUE(absl::StrContains(StepLine(skipped, 2000, 8, 0), "SKIPPED"));

  StepReport on_gpu = Report();
  on_gpu.tflops_causal = 400, on_gpu.tflops_full = 500, on_gpu.peak_tflops = 1000;
  EXPECT_TRUE(
      absl::StrContains(StepLine(on_gpu, 2000, 8, 0), "400.0 TFLOP/s/rank, MFU 40.0% causal 50.0% full"));
}

TEST(Evaluation, SaysTheAccuracyWhereItWasCounted) {
  EXPECT_EQ(EvaluationText({.loss = 1.25}), "validation loss 1.2500 nats per token");
  EXPECT_EQ(EvaluationText({1.25, 0.98765}), "validation loss 1.2500 nats per token, accuracy 0.9877");
}

TEST(Metrics, AreOneObjectOnOneLine) {
  const std::string line = MetricsJson(Report(), Evaluation{.loss = 1.25});
  EXPECT_EQ(line.find('\n'), line.size() - 1);
  const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  ASSERT_TRUE(json.is_object()) << line;
  EXPECT_EQ(json["step"], 120);
  EXPECT_EQ(json["loss"], 2.9134);  // all digits: runs are compared bit for bit
  EXPECT_EQ(json["grad_norm"], 0.714);
  EXPECT_EQ(json["lr"], 3e-4);
  EXPECT_EQ(json["tokens"], 131072);
  EXPECT_EQ(json["step_ms"], 1482.4);
  EXPECT_EQ(json["tokens_per_second"], 88400);
  EXPECT_EQ(json["tflops_causal"], 0.0123);
  EXPECT_EQ(json["tflops_full"], 0.02);
  EXPECT_EQ(json["exposed_exchange_ms"], 14.824);
  EXPECT_EQ(json["memory_peak_bytes"], int64_t{3} << 29);
  EXPECT_EQ(json["memory_bytes"].dump(),
            R"({"activations":0,"exchange":4,"gradients":2048,"optimizer":3145728,"other":5,)"
            R"("parameters":1024,"workspace":0})");
  EXPECT_EQ(json["val_loss"], 1.25);
  EXPECT_FALSE(json.contains("val_accuracy"));
  EXPECT_EQ(nlohmann::json::parse(MetricsJson(Report(), Evaluation{1.25, 0.5}))["val_accuracy"], 0.5);
  EXPECT_FALSE(json.contains("skipped"));
  EXPECT_FALSE(nlohmann::json::parse(MetricsJson(Report(), std::nullopt)).contains("val_loss"));
}

std::vector<AttentionReport> Attention(double measured_ms) {
  return {{.layers = {},
           .pass = Pass::kForward,
           .plan = "kv_ring",
           .transport = TransportKind::kHost,
           .kernels = "hopper",
           .why = "kv_ring by host 2 ms; next mesh",
           .predicted_ms = 2,
           .measured_ms = measured_ms},
          {.layers = {.window = 128},
           .pass = Pass::kBackward,
           .plan = "ulysses",
           .why = "",
           .measured_ms = measured_ms + 1}};
}

TEST(Metrics, HoldPredictedAndMeasuredAttention) {
  StepReport report = Report();
  EXPECT_FALSE(nlohmann::json::parse(MetricsJson(report, std::nullopt)).contains("attention"));
  report.attention = Attention(2.5);
  report.throttle_gb_per_second = 1.5;
  const auto json = nlohmann::json::parse(MetricsJson(report, std::nullopt));
  ASSERT_EQ(json["attention"].size(), 2u);
  const auto &first = json["attention"][0], &second = json["attention"][1];
  EXPECT_EQ(first["window"], 0);
  EXPECT_EQ(first["pass"], "forward");
  EXPECT_EQ(first["plan"], "kv_ring");
  EXPECT_EQ(first["transport"], "host");
  EXPECT_EQ(first["kernels"], "hopper");
  EXPECT_EQ(first["predicted_ms"], 2.0);
  EXPECT_EQ(first["measured_ms"], 2.5);
  EXPECT_EQ(second["pass"], "backward");
  EXPECT_FALSE(second.contains("kernels"));
  EXPECT_FALSE(second.contains("predicted_ms")) << "not predicted is not 0";
  EXPECT_EQ(json["throttle_gb_per_second"], 1.5);
  EXPECT_TRUE(absl::StrContains(StepLine(report, 2000, 8, 0), "LINKS THROTTLED to 1.5 GB/s"));
}

TEST(AttentionLines, SayThePlanAndWhatBecameOfThePrediction) {
  StepReport report = Report();
  report.attention = Attention(1000);  // the first step makes the plans
  EXPECT_EQ(PlanLines(report),
            (std::vector<std::string>{"attention (all keys) forward: kv_ring by host 2 ms; next mesh",
                                      "attention (window 128) backward: ulysses by host"}));
  AttentionSummary summary;
  summary.Add(report);
  EXPECT_TRUE(summary.Lines().empty());
  for (const double ms : {3.0, 9.0, 4.0}) {
    report.attention = Attention(ms);
    summary.Add(report);
  }
  EXPECT_EQ(
      summary.Lines(),
      (std::vector<std::string>{
          "attention (all keys) forward: kv_ring by host, blocks by hopper, predicted 2 ms, measured 4 ms a "
          "layer (median of 3 steps)",
          "attention (window 128) backward: ulysses by host, measured 5 ms a layer (median of 3 steps)"}));
}

TEST(AttentionLines, SayWhatLatentAttentionExchanges) {
  StepReport report = Report();
  const AttentionClass latent{.branch = BranchKind::kLatentAttention};
  report.attention = {{.layers = latent, .exchange = "latents", .plan = "kv_ring", .why = "latents 2 ms"},
                      {.layers = {.branch = latent.branch, .window = 8, .latent_groups = 2},
                       .exchange = "keys and values",
                       .plan = "ulysses",
                       .why = "",
                       .predicted_ms = 3,
                       .measured_ms = 4}};
  EXPECT_EQ(PlanLines(report),
            (std::vector<std::string>{"latent attention (all keys) forward: latents 2 ms",
                                      "latent attention (2 branches, window 8) forward: keys and values, "
                                      "ulysses by host"}));
  AttentionSummary summary;
  summary.Add(report);
  summary.Add(report);
  EXPECT_EQ(summary.Lines()[1],
            "latent attention (2 branches, window 8) forward: keys and values, ulysses by host, predicted 3 "
            "ms, measured 4 ms a layer (median of 1 steps)");
  const auto json = nlohmann::json::parse(MetricsJson(report, std::nullopt));
  EXPECT_EQ(json["attention"][0]["layer"], "latent");
  EXPECT_EQ(json["attention"][0]["exchange"], "latents");
  EXPECT_EQ(json["attention"][1]["latent_groups"], 2);
}

TEST(Metrics, StayJsonWhenNumbersAreNotFinite) {
  StepReport report = Report();
  report.loss = std::numeric_limits<double>::quiet_NaN();
  report.grad_norm = std::numeric_limits<double>::infinity();
  report.skipped = true;
  const std::string line = MetricsJson(report, Evaluation{.loss = -std::numeric_limits<double>::infinity()});
  const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  ASSERT_TRUE(json.is_object()) << line;
  EXPECT_EQ(json["loss"], "nan");
  EXPECT_EQ(json["grad_norm"], "inf");
  EXPECT_EQ(json["val_loss"], "-inf");
  EXPECT_EQ(json["skipped"], true);
}

// What a console prints for a line and the steps 1 to 5 of 5, taken within moments.
std::string Printed(Console::Output output) {
  ::testing::internal::CaptureStdout();
  {
    Console console(output);
    console.Line("a line");
    StepReport report = Report();
    for (report.step = 1; report.step <= 5; ++report.step) {
      console.Progress(report, 5, absl::StrCat("step ", report.step, "."));
    }
  }
  return ::testing::internal::GetCapturedStdout();
}

TEST(Console, PrintsTheFirstAndTheLastStepWhenNothingIsRedrawn) {
  unsetenv("ANNULUS_TERMINAL_COLUMNS");
  EXPECT_EQ(Printed(Console::Output::kPrint), "a line\nstep 1.\nstep 5.\n");
}

TEST(Console, RedrawsTheStepLineOnATerminal) {
  setenv("ANNULUS_TERMINAL_COLUMNS", "60", 1);
  const std::string printed = Printed(Console::Output::kPrint);
  unsetenv("ANNULUS_TERMINAL_COLUMNS");
  EXPECT_TRUE(absl::StartsWith(printed, "a line\n\r"));
  for (int step = 1; step <= 5; ++step)
    EXPECT_TRUE(absl::StrContains(printed, absl::StrCat("step ", step, ".")));
  EXPECT_EQ(std::count(printed.begin(), printed.end(), '\n'), 2) << printed;
  EXPECT_TRUE(absl::EndsWith(printed, "\n"));
}

TEST(Console, OtherRanksPrintNothing) {
  EXPECT_EQ(Printed(Console::Output::kSilent), "");
  setenv("ANNULUS_TERMINAL_COLUMNS", "60", 1);
  EXPECT_EQ(Printed(Console::Output::kSilent), "");
  unsetenv("ANNULUS_TERMINAL_COLUMNS");
}

}  // namespace
}  // namespace annulus
