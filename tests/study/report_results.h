#pragma once

// Made-up results of studies for tests of reports: numbers that look like such, and nothing that was ever
// measured.

#include <cmath>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "annulus/study/study.h"

namespace annulus::testing {

// Of a point whose step is this much slower than the ideal.
inline StepFigures MadeUpFigures(int64_t ranks, int64_t seq_len, double slowdown) {
  const double tokens = 4194304, n = static_cast<double>(ranks);
  const double compute = tokens / n / 15000 * (1 + static_cast<double>(seq_len) / 1e5);
  StepFigures f;
  f.compute_seconds = compute;
  f.exposed_exchange_seconds = compute * 0.02 * slowdown * std::log2(n + 1);
  f.exposed_gradients_seconds = compute * 0.015 * slowdown * std::log2(n + 1);
  f.exposed_tensor_seconds = ranks > 8 ? compute * 0.03 : 0;
  f.bubble_seconds = compute * 0.01 * slowdown;
  f.step_seconds = compute + f.exposed_exchange_seconds + f.exposed_gradients_seconds +
                   f.exposed_tensor_seconds + f.bubble_seconds;
  f.tokens_per_second = tokens / f.step_seconds;
  f.tflops_causal = 400 * compute / f.step_seconds;
  f.tflops_full = 1.1 * f.tflops_causal;
  f.mfu_causal = f.tflops_causal / 989;
  f.mfu_full = f.tflops_full / 989;
  f.memory = {.parameters = int64_t{14} << 30,
              .gradients = int64_t{14} << 30,
              .optimizer = (int64_t{84} << 30) / ranks,
              .activations = (seq_len << 20) / ranks,
              .workspace = int64_t{3} << 30,
              .exchange = ranks > 1 ? int64_t{1} << 30 : 0};
  f.other_memory_bytes = int64_t{2} << 30;
  f.bytes_inside_hosts = ranks > 1 ? (int64_t{28} << 30) * ranks : 0;
  f.bytes_between_hosts = ranks > 8 ? (int64_t{28} << 30) * ranks / 8 : 0;
  f.plans = {ranks == 1 ? "no exchange" : "forward: kv_ring by copy engine"};
  return f;
}

// Over ranks and sequence lengths: measured up to 8 ranks, predicted everywhere, one failed.
inline StudyResults MadeUpStudy(const std::vector<int64_t>& ranks, const std::vector<int64_t>& seq_lens,
                                const std::vector<std::string>& plans) {
  StudyResults results{.name = "dense 7B", .scaling = Scaling::kStrong, .points = {}};
  for (const int64_t n : ranks) {
    for (const int64_t seq_len : seq_lens) {
      for (const std::string& plan : plans) {
        PointResult point;
        point.point = {
            .id = absl::StrCat(results.points.size(), "-gpus=", n, "-seq_len=", seq_len, "-", plan),
            .labels = {{"gpus", absl::StrCat(n)},
                       {"data.seq_len", absl::StrCat(seq_len)},
                       {"parallel.exchange.plan", plan}},
            .overrides = {absl::StrCat("data.seq_len=", seq_len)},
            .ranks = n,
            .hosts = (n + 7) / 8};
        point.machine = {.device = "NVIDIA H200", .measured = true, .memory_bytes = int64_t{141} << 30};
        point.state = PointState::kDone;
        point.tokens_per_step = 4194304;
        point.layout = absl::StrCat("dp 1 x cp ", n, " x tp 1");
        const double slowdown = plan == "AUTO" ? 1 : 1.6;
        point.predicted = MadeUpFigures(n, seq_len, slowdown);
        if (n <= 8) {
          const double error = 1 + 0.06 * std::sin(static_cast<double>(n + seq_len));
          point.measured = MadeUpFigures(n, seq_len, slowdown * (1 + error));
          point.measured->memory.workspace += int64_t{1} << 30;
          point.measured_spread = 0.012;
          point.measured_on = absl::StrCat(n, " x NVIDIA H200");
        } else {
          point.goodput = Goodput{.share = 1 - static_cast<double>(n) / 20000,
                                  .seconds = 1e6,
                                  .failures = static_cast<double>(n / 16),
                                  .steps_between_saves = 400,
                                  .saving_seconds = 3600,
                                  .lost_seconds = 7200,
                                  .restarting_seconds = 900};
        }
        results.points.push_back(std::move(point));
      }
    }
  }
  if (results.points.size() > 2) {
    PointResult& failed = results.points[1];
    failed.state = PointState::kFailed;
    failed.measured.reset();
    failed.predicted.reset();
    failed.reason = "rank 0: out of memory: 152.1 GiB of 141.0 GiB <planned & \"held\">";
  }
  return results;
}

}  // namespace annulus::testing
