#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/mamba_gates/mamba_gates_kernels.h"

namespace annulus::kernels {
namespace {

constexpr int64_t kTileTokens = 64;  // between polls

// log(1 + e^u), without overflow and exact for very negative u.
template <typename T>
T Softplus(T u) {
  return std::max(u, T{0}) + std::log1p(std::exp(-std::abs(u)));
}

template <typename T>
struct Limits {
  explicit Limits(const MambaGates& gates)
      : low(static_cast<T>(gates.low)),
        high(gates.high > 0 ? static_cast<T>(gates.high) : std::numeric_limits<T>::infinity()) {}
  T Clamp(T x) const { return std::min(std::max(x, low), high); }
  bool Inside(T x) const { return low <= x && x <= high; }
  T low, high;
};

}  // namespace

template <typename T>
absl::Status MambaGatesForward(CpuTag, Context& ctx, const MambaGates& gates, TensorRef dt, TensorRef a) {
  const int64_t tokens = gates.raw.rows, heads = gates.raw.cols;
  const T* bias = gates.bias.data<T>();
  const T* a_log = gates.a_log.data<T>();
  const Limits<T> limits(gates);
  for (int64_t t = 0; t < tokens; ++t) {
    if (t % kTileTokens == 0) ctx.Poll();
    const T* raw = static_cast<const T*>(gates.raw.data) + t * gates.raw.stride;
    T* step = dt.data<T>() + t * heads;
    T* decay = a.data<T>() + t * heads;
    for (int64_t h = 0; h < heads; ++h) {
      step[h] = limits.Clamp(Softplus(raw[h] + bias[h]));
      decay[h] = -std::exp(a_log[h]) * step[h];
    }
  }
  return absl::OkStatus();
}

// softplus' is the sigmoid; outside the limits nothing flows. da / da_log = a.
template <typename T>
absl::Status MambaGatesBackward(CpuTag, Context& ctx, const MambaGates& gates,
                                const MambaGatesGradients& gradients) {
  const int64_t tokens = gates.raw.rows, heads = gates.raw.cols;
  const T* bias = gates.bias.data<T>();
  const T* a_log = gates.a_log.data<T>();
  T* dbias = gradients.dbias.data<T>();
  T* da_log = gradients.da_log.data<T>();
  const Limits<T> limits(gates);
  for (int64_t t = 0; t < tokens; ++t) {
    if (t % kTileTokens == 0) ctx.Poll();
    const T* raw = static_cast<const T*>(gates.raw.data) + t * gates.raw.stride;
    const T* ddt = gradients.ddt.defined() ? gradients.ddt.data<T>() + t * heads : nullptr;
    const T* da = gradients.da.data<T>() + t * heads;
    T* draw = static_cast<T*>(gradients.draw.data) + t * gradients.draw.stride;
    for (int64_t h = 0; h < heads; ++h) {
      const T u = raw[h] + bias[h], soft = Softplus(u), rate = -std::exp(a_log[h]);
      const T upstream = (ddt != nullptr ? ddt[h] : T{0}) + da[h] * rate;
      const T sigmoid = T{1} / (T{1} + std::exp(-u));
      draw[h] = limits.Inside(soft) ? upstream * sigmoid : T{0};
      dbias[h] += draw[h];
      da_log[h] += da[h] * rate * limits.Clamp(soft);
    }
  }
  return absl::OkStatus();
}

template absl::Status MambaGatesForward<float>(CpuTag, Context&, const MambaGates&, TensorRef, TensorRef);
template absl::Status MambaGatesForward<double>(CpuTag, Context&, const MambaGates&, TensorRef, TensorRef);
template absl::Status MambaGatesBackward<float>(CpuTag, Context&, const MambaGates&,
                                                const MambaGatesGradients&);
template absl::Status MambaGatesBackward<double>(CpuTag, Context&, const MambaGates&,
                                                 const MambaGatesGradients&);

}  // namespace annulus::kernels
