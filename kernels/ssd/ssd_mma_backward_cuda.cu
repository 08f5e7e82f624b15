#include "kernels/common/parts.cuh"
#include "kernels/ssd/ssd_mma_backward.cuh"

namespace annulus::kernels {
namespace {

template <int kState>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    BackwardKernel(const __grid_constant__ MmaSsd mma, const __grid_constant__ CudaSsdStates states,
                   const __grid_constant__ CudaSsdStates gradients,
                   const __grid_constant__ CudaSsdGradients<Bf16> out,
                   const __grid_constant__ PartialGradients partial, float* dskip) {
  BackwardCta<kState>(mma, states, gradients, out, partial, dskip).Run();
}

// to = sum over parts of partial, rounded.   partial: [parts, rows, batch, columns]
struct AddPartsShape {
  int64_t rows, batch, columns;
  int parts;
};
__global__ void __launch_bounds__(256)
    RoundPartsKernel(const AddPartsShape shape, const float* partial, const StridedRows<Bf16> to) {
  constexpr int kN = 8;
  const int64_t vectors = shape.columns / kN, tokens = shape.rows * shape.batch;
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= tokens * vectors) return;
  float sum[kN] = {};
  for (int part = 0; part < shape.parts; ++part) {
    const Pack<float, kN> pack = LoadPack<kN>(partial + (part * tokens * vectors + index) * kN);
#pragma unroll
    for (int i = 0; i < kN; ++i) sum[i] += pack[i];
  }
  const int64_t token = index / vectors, column = index % vectors * kN;
  StorePack<kN>(PackOf<Bf16>(sum), to.data + token / shape.batch * to.row_stride +
                                       token % shape.batch * to.batch_stride + column);
}

struct BackwardScratch {
  float* dskip = nullptr;  // [chunks, batch * heads]
  PartialGradients partial;
  int64_t bytes = 0;
  BackwardScratch(const MmaSsd& mma, void* memory) {
    const CudaSsd<Bf16>& ssd = mma.ssd;
    char* next = static_cast<char*>(memory);
    const auto take = [&](float** to, int64_t elements) {
      *to = reinterpret_cast<float*>(next + bytes);
      bytes += CeilDiv(elements * 4, 256) * 256;
    };
    take(&dskip, ssd.chunks.chunks() * ssd.all_heads());
    partial.parts = GroupParts(mma, kBackwardMostHeads);
    if (partial.parts == 1) return;
    const int64_t keys = ssd.rows * ssd.batch * ssd.groups * ssd.state;
    take(&partial.db, partial.parts * keys);
    take(&partial.dc, partial.parts * keys);
  }
};

cudaError_t AddPartials(const MmaSsd& mma, const PartialGradients& partial, const CudaSsdGradients<Bf16>& out,
                        cudaStream_t stream) {
  const CudaSsd<Bf16>& ssd = mma.ssd;
  const AddPartsShape shape{ssd.rows, ssd.batch, ssd.groups * ssd.state, partial.parts};
  const auto blocks = static_cast<uint32_t>(CeilDiv(shape.rows * shape.batch * shape.columns / 8, 256));
  if (blocks == 0) return cudaSuccess;
  RoundPartsKernel<<<blocks, 256, 0, stream>>>(shape, partial.db, out.db);
  RoundPartsKernel<<<blocks, 256, 0, stream>>>(shape, partial.dc, out.dc);
  return cudaGetLastError();
}

}  // namespace

int64_t MmaSsdBackwardScratchBytes(const CudaSsd<Bf16>& ssd) {
  return BackwardScratch(MakeMmaSsd(ssd), nullptr).bytes;
}

cudaError_t MmaSsdBackward(const CudaSsd<Bf16>& ssd, const CudaSsdStates& states, float* gradients,
                           const CudaSsdGradients<Bf16>& out, void* scratch, cudaStream_t stream) {
  const MmaSsd mma = MakeMmaSsd(ssd);
  const BackwardScratch own(mma, scratch);
  const CudaSsdStates of_gradients{gradients, states.decays};
  cudaError_t error = ReplaceSupers(Flow::kBackward, mma, of_gradients, out.final_gradient, stream);
  if (error != cudaSuccess) return error;
  error = VisitState(ssd, [&]<int kState>() {
    const dim3 grid(static_cast<uint32_t>(ssd.chunks.chunks()),
                    static_cast<uint32_t>(ssd.batch * ssd.groups * own.partial.parts));
    return LaunchSsd(BackwardKernel<kState>, grid, kBackwardThreads, BackwardMemory<kState>::kBytes, stream,
                     mma, states, of_gradients, out, own.partial, out.dskip != nullptr ? own.dskip : nullptr);
  });
  if (error == cudaSuccess && own.partial.parts > 1) error = AddPartials(mma, own.partial, out, stream);
  if (error != cudaSuccess || out.dskip == nullptr) return error;
  return AddParts(own.dskip, ssd.chunks.chunks() * ssd.batch, ssd.heads, out.dskip, stream);
}

}  // namespace annulus::kernels
