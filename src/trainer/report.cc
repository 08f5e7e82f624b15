#include "annulus/train/report.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_format.h"
#include "annulus/train/exchange.h"

namespace annulus {
namespace {

constexpr double kSecondsBetweenLines = 2.0;
constexpr int kBarColumns = 20;

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

nlohmann::json Number(double value) {
  if (std::isfinite(value)) return value;
  return std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf";
}

std::string WithThousands(int64_t value) {
  const std::string digits = absl::StrCat(value);
  std::string text;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) text += ',';
    text += digits[i];
  }
  return text;
}

// Columns of the terminal that standard output is; 0 where it is none. Under mpirun every rank has a terminal
// of its own between itself and mpirun, so there launch/mpirun says what its own output is.
int TerminalColumns() {
  const char* columns = std::getenv("ANNULUS_TERMINAL_COLUMNS");
  if (columns != nullptr || std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr) {
    return columns == nullptr ? 0 : std::atoi(columns);
  }
  winsize size{};
  if (isatty(STDOUT_FILENO) == 0) return 0;
  return ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

std::string Bar(double done) {
  const int filled = static_cast<int>(done * kBarColumns);
  return absl::StrCat("[", std::string(static_cast<size_t>(filled), '#'),
                      std::string(static_cast<size_t>(kBarColumns - filled), '.'), "] ");
}

}  // namespace

std::string FormatDuration(double seconds) {
  const int64_t s = static_cast<int64_t>(std::llround(std::max(0.0, seconds)));
  if (s < 60) return absl::StrCat(s, "s");
  if (s < 600) return absl::StrCat(s / 60, "m ", s % 60, "s");
  if (s < 3600) return absl::StrCat(s / 60, "m");
  return absl::StrCat(s / 3600, "h ", s % 3600 / 60, "m");
}

std::string CountText(int64_t count, absl::string_view what) {
  return absl::StrCat(count, " ", what, count == 1 ? "" : "s");
}

std::string FormatCount(double value) {
  if (value >= 1e9) return absl::StrFormat("%.2fG", value / 1e9);
  if (value >= 1e6) return absl::StrFormat("%.2fM", value / 1e6);
  if (value >= 1e3) return absl::StrFormat("%.2fk", value / 1e3);
  return absl::StrFormat("%.0f", value);
}

std::string MeshText(int64_t dp, int64_t cp, int64_t tp) {
  return absl::StrCat("dp ", dp, " x cp ", cp, " x tp ", tp);
}

std::string FormatBytes(double bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  while (bytes >= 1024 && unit < 4) bytes /= 1024, ++unit;
  return absl::StrFormat(unit == 0 ? "%.0f %s" : "%.1f %s", bytes, units[unit]);
}

std::string MemoryText(const MemoryPlan& memory) {
  std::string text;
  for (const MemoryPlan::Part& part : memory.parts()) {
    if (part.bytes == 0) continue;
    absl::StrAppend(&text, text.empty() ? "" : ", ", part.name, " ",
                    FormatBytes(static_cast<double>(part.bytes)));
  }
  return text;
}

namespace {

nlohmann::ordered_json MemoryJson(const StepReport& report) {
  nlohmann::ordered_json json;
  for (const MemoryPlan::Part& part : report.memory.parts()) json[part.name] = part.bytes;
  json["other"] = report.other_memory_bytes;
  return json;
}

// FLOP/s of a rank, and how much of the peak that is, in both conventions where the peak is known.
std::string RateText(const StepReport& report) {
  if (report.peak_tflops == 0) return absl::StrFormat("%.1f GFLOP/s causal/rank", report.tflops_causal * 1e3);
  return absl::StrFormat("%.1f TFLOP/s/rank, MFU %.1f%% causal %.1f%% full", report.tflops_causal,
                         100 * report.tflops_causal / report.peak_tflops,
                         100 * report.tflops_full / report.peak_tflops);
}

// One rank waits for nothing.
std::string TensorText(const StepReport& report) {
  if (report.exposed_tensor_ms == 0) return "";
  return absl::StrFormat(" tensor %.1f%%", 100 * report.exposed_tensor_ms / std::max(report.step_ms, 1e-9));
}

std::string ThrottleText(const StepReport& report) {
  const std::string label = Label(LinkThrottle{report.throttle_gb_per_second * 1e9});
  return label.empty() ? label : absl::StrCat(" | ", label);
}

}  // namespace

std::string StepLine(const StepReport& report, int64_t total_steps, int ranks, double eta_seconds) {
  const double ms = std::max(report.step_ms, 1e-9);
  return absl::StrFormat(
      "step %d/%d %d%% | loss %.3f | gnorm %.2f | %s ms | %s tok/s (%s/rank) | %s | "
      "wait: data %.1f%% exchange %.1f%% gradients %.1f%%%s | %s | ETA %s%s%s",
      report.step, total_steps, 100 * report.step / total_steps, report.loss, report.grad_norm,
      WithThousands(std::llround(ms)), FormatCount(report.tokens_per_second),
      FormatCount(report.tokens_per_second / ranks), RateText(report), 100 * report.data_ms / ms,
      100 * report.exposed_exchange_ms / ms, 100 * report.exposed_reduce_ms / ms, TensorText(report),
      FormatBytes(static_cast<double>(report.memory_peak_bytes)), FormatDuration(eta_seconds),
      ThrottleText(report), report.skipped ? " | SKIPPED: not finite" : "");
}

namespace {

std::string AttentionText(const AttentionReport& attention) {
  return absl::StrCat(ClassText(attention.layers), " ", Name(attention.pass), ": ");
}

// "kv_ring by host", "latents, kv_ring by host"
std::string PlanText(const AttentionReport& attention) {
  if (attention.plan == kNoExchange) return attention.plan;
  return absl::StrCat(attention.exchange, attention.exchange.empty() ? "" : ", ", attention.plan, " by ",
                      Name(attention.transport));
}

// "blocks by hopper, "
std::string KernelsText(const AttentionReport& attention) {
  return attention.kernels.empty() ? "" : absl::StrCat("blocks by ", attention.kernels, ", ");
}

}  // namespace

std::vector<std::string> PlanLines(const StepReport& report) {
  std::vector<std::string> lines;
  for (const AttentionReport& attention : report.attention) {
    lines.push_back(
        absl::StrCat(AttentionText(attention), attention.why.empty() ? PlanText(attention) : attention.why));
  }
  return lines;
}

void AttentionSummary::Add(const StepReport& report) {
  if (std::exchange(first_, false)) return;
  last_ = report.attention;
  throttle_ = ThrottleText(report);
  measured_ms_.resize(last_.size());
  for (size_t i = 0; i < last_.size(); ++i) measured_ms_[i].push_back(last_[i].measured_ms);
}

std::vector<std::string> AttentionSummary::Lines() const {
  std::vector<std::string> lines;
  for (size_t i = 0; i < last_.size(); ++i) {
    std::vector<double> times = measured_ms_[i];
    const auto median = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2);
    std::nth_element(times.begin(), median, times.end());
    const double predicted = last_[i].predicted_ms;
    lines.push_back(absl::StrFormat("%s%s, %s%smeasured %.3g ms a layer (median of %d steps)%s",
                                    AttentionText(last_[i]), PlanText(last_[i]), KernelsText(last_[i]),
                                    predicted > 0 ? absl::StrFormat("predicted %.3g ms, ", predicted) : "",
                                    *median, times.size(), throttle_));
  }
  return lines;
}

namespace {

nlohmann::ordered_json AttentionJson(const std::vector<AttentionReport>& reports) {
  auto json = nlohmann::ordered_json::array();
  for (const AttentionReport& attention : reports) {
    nlohmann::ordered_json entry = {{"layer", Name(attention.layers.branch)},
                                    {"window", attention.layers.window},
                                    {"pass", Name(attention.pass)},
                                    {"plan", attention.plan},
                                    {"transport", std::string(Name(attention.transport))},
                                    {"measured_ms", attention.measured_ms}};
    if (!attention.kernels.empty()) entry["kernels"] = attention.kernels;
    if (attention.layers.latent_groups > 1) entry["latent_groups"] = attention.layers.latent_groups;
    if (!attention.exchange.empty()) entry["exchange"] = attention.exchange;
    if (attention.predicted_ms > 0) entry["predicted_ms"] = attention.predicted_ms;
    json.push_back(std::move(entry));
  }
  return json;
}

}  // namespace

std::string EvaluationText(const Evaluation& evaluation) {
  std::string text = absl::StrFormat("validation loss %.4f nats per token", evaluation.loss);
  if (evaluation.accuracy.has_value()) absl::StrAppendFormat(&text, ", accuracy %.4f", *evaluation.accuracy);
  return text;
}

std::string MetricsJson(const StepReport& report, const std::optional<Evaluation>& evaluation) {
  nlohmann::ordered_json json;
  json["step"] = report.step;
  json["loss"] = Number(report.loss);
  json["grad_norm"] = Number(report.grad_norm);
  json["lr"] = report.lr;
  json["tokens"] = report.tokens;
  json["step_ms"] = report.step_ms;
  json["tokens_per_second"] = report.tokens_per_second;
  json["tflops_causal"] = report.tflops_causal;
  json["tflops_full"] = report.tflops_full;
  if (report.peak_tflops > 0) {
    json["mfu_causal"] = report.tflops_causal / report.peak_tflops;
    json["mfu_full"] = report.tflops_full / report.peak_tflops;
  }
  json["exposed_exchange_ms"] = report.exposed_exchange_ms;
  json["exposed_reduce_ms"] = report.exposed_reduce_ms;
  if (report.exposed_tensor_ms > 0) json["exposed_tensor_ms"] = report.exposed_tensor_ms;
  json["data_ms"] = report.data_ms;
  if (report.state_bytes > 0) json["state_bytes"] = report.state_bytes;
  if (report.sent.has_value()) {
    json["sent_bytes"] = {{"inside_hosts", report.sent->inside_hosts_bytes},
                          {"between_hosts", report.sent->between_hosts_bytes}};
  }
  json["memory_peak_bytes"] = report.memory_peak_bytes;
  if (!report.attention.empty()) json["attention"] = AttentionJson(report.attention);
  if (report.throttle_gb_per_second > 0) json["throttle_gb_per_second"] = report.throttle_gb_per_second;
  json["memory_bytes"] = MemoryJson(report);
  if (report.skipped) json["skipped"] = true;
  if (evaluation.has_value()) {
    json["val_loss"] = Number(evaluation->loss);
    if (evaluation->accuracy.has_value()) json["val_accuracy"] = *evaluation->accuracy;
  }
  return json.dump() + "\n";
}

Console::Console(Output output) : output_(output), columns_(TerminalColumns()) {}

Console::~Console() {
  if (open_line_) std::fputs("\n", stdout);
  std::fflush(stdout);
}

void Console::Line(const std::string& text) {
  if (output_ == Output::kSilent) return;
  if (open_line_) std::fputs("\r\033[K", stdout);
  open_line_ = false;
  std::fprintf(stdout, "%s\n", text.c_str());
  std::fflush(stdout);
}

void Console::Progress(const StepReport& report, int64_t total_steps, const std::string& line) {
  if (output_ == Output::kSilent) return;
  if (columns_ > 0) {
    const double done = static_cast<double>(report.step) / static_cast<double>(total_steps);
    // One column short: a full line would wrap, and what wraps is not redrawn.
    const std::string text = (Bar(done) + line).substr(0, static_cast<size_t>(columns_ - 1));
    std::fprintf(stdout, "\r\033[K%s", text.c_str());
    std::fflush(stdout);
    open_line_ = true;
    return;
  }
  const bool due = Now() - last_seconds_ >= kSecondsBetweenLines;
  if (!due && report.step != total_steps) return;
  last_seconds_ = Now();
  Line(line);
}

}  // namespace annulus
