#pragma once

// What one check found.

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

namespace annulus::testing {

// f32 epsilon, 1.2e-7, times the products of operand norms that enter a score or its gradient, here below
// 100.
inline constexpr double kAbsoluteTolerance = 1e-5;

struct Comparison {
  bool ok = true;
  std::string text;

  // max |got - want| <= 2 max |naive - want| + kAbsoluteTolerance, all finite but where `want` is infinite.
  void Compare(const char* name, const std::vector<double>& got, const std::vector<double>& want,
               const std::vector<double>& naive) {
    double error = 0, naive_error = 0, square = 0, norm = 0;
    bool finite = true;
    for (size_t i = 0; i < want.size(); ++i) {
      if (std::isinf(want[i])) {
        finite = finite && got[i] == want[i];
        continue;
      }
      finite = finite && std::isfinite(got[i]);
      error = std::max(error, std::abs(got[i] - want[i]));
      naive_error = std::max(naive_error, std::abs(naive[i] - want[i]));
      square += (got[i] - want[i]) * (got[i] - want[i]);
      norm += want[i] * want[i];
    }
    const bool good = finite && error <= 2 * naive_error + kAbsoluteTolerance;
    ok = ok && good;
    char line[200];
    std::snprintf(line, sizeof line, " %s %.1e/%.1e rel %.1e%s", name, error, naive_error,
                  std::sqrt(square / std::max(norm, 1e-30)),
                  good     ? ""
                  : finite ? " FAIL"
                           : " NONFINITE");
    text += line;
  }
  void Require(bool condition, const char* what) {
    if (condition) return;
    ok = false;
    text += std::string(" FAIL:") + what;
  }
};

}  // namespace annulus::testing
