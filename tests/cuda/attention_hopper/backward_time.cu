// Times the backward of block attention on Hopper beside cuDNN and the portable kernel. FLOP are those of
// pairs that are not masked: 2 (3 dim + 2 v_dim) each.

#include <memory>
#include <string>

#include "cuda/attention_hopper/backward_time.h"
#include "cuda/attention_hopper/backward_variants.h"
#include "cuda/attention_hopper/timed_shapes.h"
#include "cuda/attention_mma/timing.cuh"
#include "kernels/attention/attention_hopper_backward.h"
#include "kernels/attention/attention_mma.h"
#include "kernels/attention/attention_partial_cuda.h"

namespace annulus::testing {
namespace {

using kernels::MmaQueryGradient;

// Operands on the device, with statistics of a forward pass.
class Operands {
 public:
  explicit Operands(const TimedShape& t)
      : t_(t),
        q_(t.rows * t.heads * t.dim),
        k_(t.rows * t.kv_heads * t.dim),
        v_(t.rows * t.kv_heads * t.v_dim),
        dout_(t.rows * t.heads * t.v_dim),
        out_(dout_.size()),
        partial_(dout_.size()),
        dq_(q_.size()),
        dk_(k_.size()),
        dv_(v_.size()),
        lse_(std::vector<float>(Size(t.rows * t.heads), -INFINITY)),
        delta_(t.rows * t.heads),
        lse_of_heads_(t.rows * t.heads) {
    std::vector<int64_t> lo, hi;
    pairs_ = FillTimedBounds(t, &lo, &hi);
    lo_ = std::make_unique<DeviceArray<int64_t>>(lo);
    hi_ = std::make_unique<DeviceArray<int64_t>>(hi);
    uint32_t seed = 1;
    for (const auto* x : {&q_, &k_, &v_, &dout_}) FillRandom<<<1024, 256>>>(x->data(), x->size(), seed++);
    for (const auto* x : {&dq_, &dk_, &dv_}) CUDA(cudaMemset(x->data(), 0, Size(x->size()) * 4));
    const int64_t width = t.heads * t.v_dim;
    CUDA(kernels::MmaAttentionForward(
        Block(), {{partial_.data(), width, width}, lse_.data, {out_.data(), width, width}}, nullptr));
    CUDA(kernels::CudaAttentionDelta<bf16>(
        {t.rows, 1, t.heads, t.v_dim, {out_.data(), width, width}, {dout_.data(), width, width}, delta_.data},
        nullptr));
    CUDA(cudaDeviceSynchronize());
  }

  double flop() const {
    return pairs_ * static_cast<double>(t_.heads) * 2 * static_cast<double>(3 * t_.dim + 2 * t_.v_dim);
  }
  kernels::MmaAttentionBlock Block() const {
    return TimedBlock(t_, q_.data(), k_.data(), v_.data(), lo_->data, hi_->data);
  }
  kernels::MmaAttentionGradients Gradients() const {
    const int64_t q = t_.heads * t_.dim, k = t_.kv_heads * t_.dim, v = t_.kv_heads * t_.v_dim,
                  out = t_.heads * t_.v_dim;
    return {{dout_.data(), out, out}, lse_.data,          delta_.data,
            {dq_.data(), q, q},       {dk_.data(), k, k}, {dv_.data(), v, v}};
  }

#if ANNULUS_HAS_CUDNN
  // Seconds of cuDNN, which knows full and causal blocks; its gradients are bf16.
  double TimeCudnn(kernels::CudnnAttention* cudnn) {
    const kernels::CudnnBlock block = CudnnBlockOf(t_, Block().scale);
    const auto forward_bytes = cudnn->ForwardWorkspaceBytes(block),
               backward_bytes = cudnn->BackwardWorkspaceBytes(block);
    if (!forward_bytes.ok() || !backward_bytes.ok()) return 0;
    const int64_t bytes = std::max(*forward_bytes, *backward_bytes);
    const DeviceArray<char> workspace(bytes);
    const kernels::CudnnCall call{workspace.data, bytes, nullptr};
    if (!cudnn->Forward(block, {q_.data(), k_.data(), v_.data(), out_.data(), lse_of_heads_.data}, call)
             .ok()) {
      return 0;
    }
    const kernels::CudnnBackwardPointers pointers{q_.data(),   k_.data(),    v_.data(),
                                                  out_.data(), dout_.data(), lse_of_heads_.data,
                                                  dq_.data(),  dk_.data(),   dv_.data()};
    bool ok = true;
    const double seconds = MedianSeconds([&] { ok = cudnn->Backward(block, pointers, call).ok() && ok; }, 5);
    return ok ? seconds : 0;
  }
#endif

 private:
  template <typename T>
  class Sized {
   public:
    explicit Sized(int64_t n) : size_(n), array_(n) {}
    int64_t size() const { return size_; }
    T* data() const { return array_.data; }

   private:
    int64_t size_;
    DeviceArray<T> array_;
  };

  const TimedShape t_;
  Sized<bf16> q_, k_, v_, dout_, out_;
  Sized<float> partial_, dq_, dk_, dv_;
  DeviceArray<float> lse_, delta_, lse_of_heads_;
  std::unique_ptr<DeviceArray<int64_t>> lo_, hi_;
  double pairs_ = 0;
};

double TimeHopper(const Operands& operands, MmaQueryGradient mode) {
  const DeviceArray<char> workspace(kernels::HopperAttentionBackwardWorkspaceBytes(operands.Block(), mode));
  return MedianSeconds(
      [&] {
        CUDA(kernels::HopperAttentionBackward(operands.Block(), operands.Gradients(), mode, workspace.data,
                                              nullptr));
      },
      5);
}

double TimeMma(const Operands& operands) {
  const auto mode = MmaQueryGradient::kAtomic;
  const DeviceArray<char> workspace(kernels::MmaAttentionBackwardWorkspaceBytes(operands.Block(), mode));
  return MedianSeconds(
      [&] {
        CUDA(kernels::MmaAttentionBackward(operands.Block(), operands.Gradients(), mode, workspace.data,
                                           nullptr));
      },
      3);
}

void TimeVariants(const TimedShape& t, const Operands& operands) {
  for (int i = 0; i < kHopperBackwardVariantCount; ++i) {
    const HopperBackwardVariant& variant = kHopperBackwardVariants[i];
    if (variant.dim != t.dim) continue;
    const kernels::BackwardTableShape shape{variant.queries, MmaQueryGradient::kAtomic};
    const DeviceArray<char> workspace(kernels::BackwardTableBytes(operands.Block(), shape));
    const double seconds = MedianSeconds(
        [&] {
          kernels::HopperBackwardArgs args;
          CUDA(kernels::PrepareHopperBackward(operands.Block(), operands.Gradients(), shape, workspace.data,
                                              &args, nullptr));
          CUDA(variant.kernel.launch(args, MmaQueryGradient::kAtomic, nullptr));
        },
        5);
    std::printf("    %s: %.1f TFLOP/s\n", variant.name, operands.flop() / seconds * 1e-12);
  }
}

#if ANNULUS_HAS_CUDNN
double TimeLibrary(const TimedShape& t, Operands* operands) {
  static auto cudnn = kernels::CudnnAttention::Create();
  return CudnnKnows(t.mask) && cudnn.ok() ? operands->TimeCudnn(cudnn->get()) : 0;
}
#else
double TimeLibrary(const TimedShape&, Operands*) { return 0; }
#endif

void Time(const TimedShape& t) {
  Operands operands(t);
  const auto rate = [&](double seconds) { return seconds > 0 ? operands.flop() / seconds * 1e-12 : 0; };
  const double seconds = TimeHopper(operands, MmaQueryGradient::kAtomic);
  const double ordered = TimeHopper(operands, MmaQueryGradient::kOrdered);
  const double mma = TimeMma(operands);
  TimeVariants(t, operands);
  const double library = TimeLibrary(t, &operands);  // the last, as its gradients are bf16
  std::printf(
      "%3ld/%-3ld %6ld rows %2ld/%-2ld %-15s %9.3f ms %6.1f TFLOP/s, ordered %6.1f, mma %6.1f, cudnn %6.1f\n",
      long(t.dim), long(t.v_dim), long(t.rows), long(t.heads), long(t.kv_heads), Name(t.mask), seconds * 1e3,
      rate(seconds), rate(ordered), rate(mma), rate(library));
}

}  // namespace

void TimeBackward() {
  for (const auto& [dim, v_dim] : {std::pair<int64_t, int64_t>{128, 128}, {64, 64}, {192, 128}}) {
    for (const int64_t rows : {8192, 32768}) {
      for (const TimedMask mask : {TimedMask::kCausal, TimedMask::kFull}) {
        Time({dim, v_dim, rows, 16, 16, mask});
      }
    }
    Time({dim, v_dim, 32768, 16, 16, TimedMask::kDocuments});
    Time({dim, v_dim, 131072, 4, 4, TimedMask::kWindow});
  }
  Time({128, 128, 32768, 32, 8});
}

}  // namespace annulus::testing
