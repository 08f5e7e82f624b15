// Results of points as JSON: every field survives, and what is no result is refused.

#include "../../src/study/study_json.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"

namespace annulus {
namespace {

// Every number another one, so that none can stand for another.
StepFigures Figures(double first) {
  StepFigures figures;
  double next = first;
  for (double* value : {&figures.step_seconds, &figures.compute_seconds, &figures.exposed_exchange_seconds,
                        &figures.exposed_gradients_seconds, &figures.exposed_tensor_seconds,
                        &figures.bubble_seconds, &figures.tokens_per_second, &figures.tflops_causal,
                        &figures.tflops_full, &figures.mfu_causal, &figures.mfu_full}) {
    *value = (next += 1) / 3;
  }
  int64_t bytes = (int64_t{1} << 60) + static_cast<int64_t>(first);
  for (int64_t* value :
       {&figures.memory.parameters, &figures.memory.gradients, &figures.memory.optimizer,
        &figures.memory.activations, &figures.memory.workspace, &figures.memory.exchange,
        &figures.other_memory_bytes, &figures.bytes_inside_hosts, &figures.bytes_between_hosts}) {
    *value = ++bytes;
  }
  figures.plans = {"forward: kv_ring by host", "backward: \"x\"\n"};
  figures.documents = absl::StrCat("documents of ", first);
  return figures;
}

StoredPoint Sample() {
  StoredPoint stored;
  stored.result.point = {.id = "cp=2",
                         .labels = {{"cp", "2"}, {"model", "8 layers"}},
                         .overrides = {"a=b"},
                         .ranks = 8,
                         .hosts = 2};
  stored.result.state = PointState::kFailed;
  stored.result.reason = "why";
  stored.result.tokens_per_step = 7;
  stored.result.layout = "dp 2";
  stored.result.measured = Figures(0);
  stored.result.measured_spread = 0.1;
  stored.result.measured_on = "8 x NVIDIA H200";
  stored.result.predicted = Figures(100);
  stored.result.goodput = Goodput{.share = 0.9,
                                  .seconds = 1,
                                  .failures = 2,
                                  .steps_between_saves = 3,
                                  .saving_seconds = 4,
                                  .lost_seconds = 5,
                                  .restarting_seconds = 6};
  stored.measurement_key = "k1";
  stored.prediction_key = "k2";
  stored.measurement_error = "e1";
  stored.prediction_error = "e2";
  return stored;
}

TEST(StudyJson, EveryFieldSurvives) {
  const std::string text = StoredPointJson(Sample());
  const auto again = ParseStoredPoint(text);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(StoredPointJson(*again), text);
  const StepFigures want = Figures(100), &got = *again->result.predicted;
  EXPECT_EQ(got.mfu_full, want.mfu_full);
  EXPECT_EQ(got.memory.exchange, want.memory.exchange);
  EXPECT_EQ(got.bytes_between_hosts, want.bytes_between_hosts);
  EXPECT_EQ(got.plans, want.plans);
  EXPECT_EQ(got.documents, want.documents);
  EXPECT_EQ(again->result.point.labels[1].value, "8 layers");
  EXPECT_EQ(again->result.point.hosts, 2);
  EXPECT_EQ(again->result.measured_on, "8 x NVIDIA H200");
  EXPECT_EQ(again->result.state, PointState::kFailed);
  EXPECT_EQ(again->result.goodput->restarting_seconds, 6);
  EXPECT_EQ(again->prediction_error, "e2");
}

TEST(StudyJson, EveryStateSurvives) {
  for (const PointState state :
       {PointState::kOpen, PointState::kDone, PointState::kFailed, PointState::kRefused}) {
    StoredPoint stored = Sample();
    stored.result.state = state;
    const auto again = ParseStoredPoint(StoredPointJson(stored));
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_EQ(again->result.state, state) << Name(state);
  }
}

TEST(StudyJson, WhatIsNotThereStaysAway) {
  const auto again = ParseStoredPoint(StoredPointJson({}));
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_FALSE(again->result.measured || again->result.predicted || again->result.goodput);
}

TEST(StudyJson, NumbersThatAreNotFiniteAndBytesThatAreNoTextAreWritten) {
  StoredPoint stored = Sample();
  stored.result.measured->step_seconds = std::numeric_limits<double>::infinity();
  stored.measurement_error = "\xff";
  const auto again = ParseStoredPoint(StoredPointJson(stored));
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(std::isnan(again->result.measured->step_seconds));
}

// Results of before these fields are not made anew.
TEST(StudyJson, SomeFieldsMayBeMissing) {
  StoredPoint stored = Sample();
  stored.result.measured_on = stored.result.measured->documents = stored.result.predicted->documents = "";
  const std::string text = StoredPointJson(stored);
  EXPECT_FALSE(absl::StrContains(text, "documents") || absl::StrContains(text, "measured_on")) << text;
  EXPECT_TRUE(ParseStoredPoint(text).ok());
}

TEST(StudyJson, OtherTextsAreRefused) {
  const std::string text = StoredPointJson(Sample());
  for (size_t size = 0; size + 2 < text.size(); size += 7) {
    EXPECT_FALSE(ParseStoredPoint(text.substr(0, size)).ok()) << size;
  }
  EXPECT_FALSE(ParseStoredPoint(absl::StrReplaceAll(text, {{"\"format\": 1", "\"format\": 2"}})).ok());
  EXPECT_FALSE(ParseStoredPoint(absl::StrReplaceAll(text, {{"\"step_seconds\"", "\"seconds\""}})).ok());
  EXPECT_FALSE(ParseStoredPoint(absl::StrReplaceAll(text, {{"\"ranks\": 8", "\"ranks\": \"8\""}})).ok());
}

}  // namespace
}  // namespace annulus
