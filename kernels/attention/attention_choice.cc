// Which kernel serves a block of attention.

#include "kernels/attention/attention_kernels.h"

namespace annulus {
namespace {

constexpr AttentionKernel kHopper = AttentionKernel::kHopper, kCudnn = AttentionKernel::kCudnn;

// Where both serve a block, the faster one.
struct HopperOrCudnn {
  int64_t dim;
  AttentionKernel forward_full, forward_causal, backward_full, backward_causal;
};
constexpr HopperOrCudnn kFaster[] = {{64, kHopper, kHopper, kHopper, kHopper},
                                     {128, kHopper, kHopper, kHopper, kHopper},
                                     {192, kHopper, kHopper, kHopper, kHopper}};

AttentionKernel Faster(const AttentionKernelCase& c) {
  const bool causal = c.mask_shape == MaskShape::kCausal;
  for (const HopperOrCudnn& of : kFaster) {
    if (of.dim != c.dim) continue;
    if (c.pass == Pass::kForward) return causal ? of.forward_causal : of.forward_full;
    return causal ? of.backward_causal : of.backward_full;
  }
  return kHopper;
}

// Why a kernel for tensor cores cannot serve the case; empty: it can.
std::string WhyNotHopper(const AttentionKernelCase& c) {
  return c.hopper ? "" : "expected a GPU of compute capability 9.0 and a program built for 90a";
}
std::string WhyNotCudnn(const AttentionKernelCase& c) {
  if (!c.cudnn) return "expected a program built with cuDNN";
  if (c.determinism == Determinism::kRequired) return "expected sums in any order: deterministic: false";
  if (c.mask_shape == MaskShape::kGeneral) return "expected full and causal blocks, not those of other masks";
  return "";
}

}  // namespace

absl::string_view Name(AttentionKernel kernel) {
  switch (kernel) {
    case AttentionKernel::kCpuTiles:
      return "cpu tiles";
    case AttentionKernel::kF32:
      return "cuda f32";
    case AttentionKernel::kTensorCore:
      return "cuda mma";
    case AttentionKernel::kCudnn:
      return "cudnn";
    case AttentionKernel::kHopper:
      return "hopper";
  }
  return "";
}

bool HasCudnn() { return ANNULUS_HAS_CUDNN; }

AttentionKernel ChooseAttentionKernel(const AttentionKernelCase& c) {
  if (c.device == DeviceKind::kCpu) return AttentionKernel::kCpuTiles;
  if (c.dtype == DType::kF32) return AttentionKernel::kF32;
  if (c.asked == AttentionChoice::kHopper) return kHopper;
  if (c.asked == AttentionChoice::kCudnn) return kCudnn;
  if (c.asked == AttentionChoice::kTensorCore || !kernels::TensorCoreDims(c.dim, c.v_dim))
    return AttentionKernel::kTensorCore;
  const bool hopper = WhyNotHopper(c).empty(), cudnn = WhyNotCudnn(c).empty();
  if (hopper && cudnn) return Faster(c);
  return hopper ? kHopper : cudnn ? kCudnn : AttentionKernel::kTensorCore;
}

absl::Status CheckAttentionChoice(const AttentionKernelCase& c) {
  if (c.asked == AttentionChoice::kFastest) return absl::OkStatus();
  const bool hopper = c.asked == AttentionChoice::kHopper, cudnn = c.asked == AttentionChoice::kCudnn;
  std::string why;
  if (c.device != DeviceKind::kCuda || c.dtype != DType::kBF16) {
    why = "expected bf16 on a GPU";
  } else if (hopper || cudnn) {
    why = hopper ? WhyNotHopper(c) : WhyNotCudnn(c);
  }
  if (why.empty()) return absl::OkStatus();
  return Invalid("attention_kernel=", hopper ? "HOPPER" : cudnn ? "CUDNN" : "CUDA_MMA", ": ", why);
}

bool TakesArrivals(const AttentionKernelCase& c) {
  return c.pass == Pass::kForward && c.determinism == Determinism::kOff &&
         ChooseAttentionKernel(c) == kHopper;
}

bool OrdersSums(AttentionKernel kernel, Pass pass) {
  return pass == Pass::kBackward && (kernel == AttentionKernel::kTensorCore || kernel == kHopper);
}

bool AttentionSupports(DeviceKind device, DType dtype, int64_t dim, int64_t v_dim) {
  if (device == DeviceKind::kCpu) return dtype != DType::kBF16;
  if (dtype == DType::kBF16) return kernels::TensorCoreDims(dim, v_dim);
  constexpr int64_t kMostF32 = 256;  // what the f32 kernel holds in registers
  return dtype == DType::kF32 && dim <= kMostF32 && v_dim <= kMostF32;
}

namespace kernels {

AttentionKernelCase KernelCaseOf(const Context& ctx, const AttentionBlock& block, Pass pass) {
  return {.device = ctx.device.kind,
          .hopper = ctx.hopper,
          .dtype = block.q.dtype,
          .dim = block.q.dim,
          .v_dim = block.v.dim,
          .mask_shape = block.mask_shape,
          .pass = pass,
          .determinism = ctx.determinism,
          .asked = ctx.attention};
}

AttentionKernel KernelFor(const Context& ctx, const AttentionBlock& block, Pass pass) {
  return ChooseAttentionKernel(KernelCaseOf(ctx, block, pass));
}

}  // namespace kernels
}  // namespace annulus
