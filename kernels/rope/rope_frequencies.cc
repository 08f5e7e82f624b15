#include <algorithm>
#include <cmath>

#include "annulus/ops/rope.h"

namespace annulus {
namespace {

constexpr double kTwoPi = 6.28318530717958647692;

double Mix(double a, double b, double part_of_b) { return a + (b - a) * part_of_b; }

double Scaled(const Llama3Rope& law, double radians) {
  const double waves = law.original_length * radians / kTwoPi;  // in a sequence of the original length
  const double low = law.low_freq_factor, high = law.high_freq_factor;
  if (waves <= low) return radians / law.factor;
  if (waves >= high) return radians;
  return Mix(radians / law.factor, radians, (waves - low) / (high - low));
}

// The pair, as a real number, that turns so many times in the original length.
double PairThatTurns(const YarnRope& law, double theta, int64_t dim, double turns) {
  return static_cast<double>(dim) * std::log(law.original_length / (turns * kTwoPi)) / (2 * std::log(theta));
}

void Scale(const YarnRope& law, double theta, int64_t dim, std::vector<double>* radians) {
  const double first = std::max(0.0, std::floor(PairThatTurns(law, theta, dim, law.beta_fast)));
  const double last =
      std::min(static_cast<double>(dim - 1), std::ceil(PairThatTurns(law, theta, dim, law.beta_slow)));
  const double width = first == last ? 0.001 : last - first;
  for (size_t i = 0; i < radians->size(); ++i) {
    const double slowed = std::clamp((static_cast<double>(i) - first) / width, 0.0, 1.0);
    (*radians)[i] = Mix((*radians)[i], (*radians)[i] / law.factor, slowed);
  }
}

}  // namespace

double YarnScale(double factor, double mscale) {
  return factor <= 1 ? 1 : 0.1 * mscale * std::log(factor) + 1;
}

RopeFrequencies MakeRopeFrequencies(double theta, int64_t dim, const RopeScalingLaw& law) {
  ANNULUS_CHECK(theta > 0) << "theta " << theta;
  RopeFrequencies frequencies;
  for (int64_t i = 0; i < dim / 2; ++i) {
    frequencies.radians.push_back(std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(dim)));
  }
  if (const auto* llama3 = std::get_if<Llama3Rope>(&law)) {
    for (double& radians : frequencies.radians) radians = Scaled(*llama3, radians);
  } else if (const auto* yarn = std::get_if<YarnRope>(&law)) {
    Scale(*yarn, theta, dim, &frequencies.radians);
    frequencies.scale = YarnScale(yarn->factor, yarn->mscale) / YarnScale(yarn->factor, yarn->mscale_all_dim);
  }
  return frequencies;
}

}  // namespace annulus
