#pragma once

// Numbers of reports, for people. What is not finite reads "NaN" or "inf"; what is not there, kNone.

#include <string>
#include <vector>

namespace annulus {

inline constexpr char kNone[] = "–";

std::string StepText(double seconds);     // "412 ms", "1.24 s", "200.0 s"
std::string RateText(double per_second);  // "1.24M"
std::string PercentText(double share);    // "48.3%"
std::string ErrorText(double share);      // "+3.2%"
std::string SizeText(double bytes);       // "71.2 GiB"
std::string TickText(double value);       // "500", "2k", "1.5M"
std::string PercentTick(double share);    // "50%"
std::string NumberText(double value);     // "2.931", four digits

// "off by 3.1% in the median and 12.0% at worst (4 ranks), of 3 points": of errors without their signs, not
// empty, `worst` the point that has the largest.
std::string ErrorsText(const std::vector<double>& sizes, const std::string& worst);

// The largest binary unit of which `most` bytes hold at least one: ticks are round in it.
struct ByteUnit {
  const char* name;
  double bytes;
};
ByteUnit ByteUnitFor(double most);

}  // namespace annulus
