// Floor, bytes per parameter: 16 read, 12 written, 2 more for a bf16 copy.

#include <cmath>

#include "kernels/adamw/adamw_cuda.h"
#include "kernels/common/rows.cuh"

namespace annulus::kernels {
namespace {

// Factors are formed in f64 on the host: 1 - beta2 loses digits in f32.
template <typename Copy>
struct AdamWOp {
  float beta1, other1, beta2, other2, step_size, root_correction, keep, eps;
  const double* gradient_scale;
  float *param, *m, *v;
  const float* grad;
  Copy* copy;

  template <int N>
  struct State {
    float scale;
    Pack<float, N> param, m, v, grad;
  };
  template <int N>
  __device__ State<N> Load(int64_t, int64_t column) const {
    const auto scale = static_cast<float>(*gradient_scale);
    if (isnan(scale)) return {.scale = scale};
    return {scale, LoadPack<N>(static_cast<const float*>(param + column)),
            LoadPack<N>(static_cast<const float*>(m + column)),
            LoadPack<N>(static_cast<const float*>(v + column)), LoadPack<N>(grad + column)};
  }
  template <int N>
  __device__ void Store(int64_t, int64_t column, const State<N>& state) const {
    if (isnan(state.scale)) return;
    float new_param[N], new_m[N], new_v[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float g = state.scale * state.grad[i];
      new_m[i] = beta1 * state.m[i] + other1 * g;
      new_v[i] = beta2 * state.v[i] + other2 * (g * g);
      new_param[i] = keep * state.param[i] - step_size * new_m[i] / (sqrtf(new_v[i]) * root_correction + eps);
    }
    StorePack<N>(PackOf<float>(new_m), m + column);
    StorePack<N>(PackOf<float>(new_v), v + column);
    StorePack<N>(PackOf<float>(new_param), param + column);
    if (copy != nullptr) StorePack<N>(PackOf<Copy>(new_param), copy + column);
  }
};

}  // namespace

template <typename Copy>
cudaError_t CudaAdamW(const CudaAdamWArgs<Copy>& args, cudaStream_t stream) {
  const auto step = static_cast<double>(args.step);
  const AdamWOp<Copy> op{.beta1 = static_cast<float>(args.beta1),
                         .other1 = static_cast<float>(1 - args.beta1),
                         .beta2 = static_cast<float>(args.beta2),
                         .other2 = static_cast<float>(1 - args.beta2),
                         .step_size = static_cast<float>(args.lr / (1 - std::pow(args.beta1, step))),
                         .root_correction = static_cast<float>(1 / std::sqrt(1 - std::pow(args.beta2, step))),
                         .keep = static_cast<float>(1 - args.lr * args.weight_decay),
                         .eps = static_cast<float>(args.eps),
                         .gradient_scale = args.gradient_scale,
                         .param = args.param,
                         .m = args.m,
                         .v = args.v,
                         .grad = args.grad,
                         .copy = args.copy};
  const bool fit =
      Aligned(args.param) && Aligned(args.m) && Aligned(args.v) && Aligned(args.grad) && Aligned(args.copy);
  return LaunchRows<4, 2>(1, args.elements, fit, op, stream);
}

template cudaError_t CudaAdamW<float>(const CudaAdamWArgs<float>&, cudaStream_t);
template cudaError_t CudaAdamW<__nv_bfloat16>(const CudaAdamWArgs<__nv_bfloat16>&, cudaStream_t);

}  // namespace annulus::kernels
