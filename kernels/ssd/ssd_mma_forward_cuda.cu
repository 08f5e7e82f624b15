// y on tensor cores. A CTA takes a chunk and some heads of one group, warpgroup w rows [64 w, 64 w + 64): it
// keeps the products C B^T of the chunk in registers, and for each unit computes
//
//   y = from_start (C h_in) + ((C B^T) o decays o dt) X + skip X
//
// while the next unit's x and state arrive.

#include "kernels/ssd/ssd_mma.cuh"

namespace annulus::kernels {
namespace {

// Bytes of shared memory. B is needed only until the products are there: it lies where the second stage will.
template <int kState>
struct ForwardMemory {
  static constexpr int kStage = ValueTile::kBytes + StateTile<kState>::kBytes;
  static constexpr int kKeys = KeyTile<kState>::kBytes;
  static constexpr int kC = 0;
  static constexpr int kStages = kC + kKeys;
  static constexpr int kB = kStages + kStage;
  static constexpr int kSums = kStages + 2 * kStage;
  static constexpr int kDts = kSums + kSsdMostHeads * kSsdRows * 4;
  static constexpr int kBytes = kDts + kSsdMostHeads * kSsdRows * 4;
  static_assert(kKeys <= kStage);
};

template <int kState>
class ForwardCta {
 public:
  __device__ ForwardCta(const MmaSsd& mma, const CudaSsdStates& states, const StridedRows<Bf16>& y,
                        const GroupUnits& units)
      : mma_(mma),
        states_(states),
        y_(y),
        units_(units),
        memory_(SharedBase()),
        thread_(static_cast<int>(threadIdx.x)),
        wg_(Warpgroup()),
        chunk_(blockIdx.x),
        rows_(ChunkAt(mma.ssd.chunks, chunk_)),
        super_(SuperOf(mma, chunk_, rows_.segment)) {}

  __device__ void Run() {
    const CudaSsd<Bf16>& ssd = mma_.ssd;
    LoadRows<kState>(memory_ + Memory::kC, ssd.c, rows_, units_.item, units_.group * kState);
    LoadRows<kState>(memory_ + Memory::kB, ssd.b, rows_, units_.item, units_.group * kState);
    CopyAsyncCommit();
    StateLoad<kState> state;
    Load(0, &state);
    CopyAsyncCommit();
    FillGates(ssd, rows_, units_.item, units_.first_head, units_.heads, SharedFloats(memory_ + Memory::kSums),
              SharedFloats(memory_ + Memory::kDts));
    CopyAsyncWait<1>();
    BulkFence();
    __syncthreads();
    FillProducts();
    for (int u = 0; u < units_.count; ++u) {
      __syncthreads();  // what the next stage held has been read
      StateLoad<kState> next;
      if (u + 1 < units_.count) Load(u + 1, &next);
      CopyAsyncCommit();
      CopyAsyncWait<1>();
      state.Finish(StateTileAt(u));
      BulkFence();
      __syncthreads();
      Output(u);
      state = next;
    }
  }

 private:
  using Memory = ForwardMemory<kState>;

  __device__ uint32_t Values(int u) const {
    return memory_ + Memory::kStages + static_cast<uint32_t>(u % 2) * Memory::kStage;
  }
  __device__ uint32_t StateTileAt(int u) const { return Values(u) + ValueTile::kBytes; }

  __device__ void Load(int u, StateLoad<kState>* state) {
    const int64_t unit = units_.first + u;
    LoadRows<kSsdColumns>(Values(u), mma_.ssd.x, rows_, units_.item, unit * kSsdColumns);
    const int64_t of_all = units_.item * mma_.ssd.heads * mma_.blocks + unit;
    state->Start(StateTileAt(u), ForwardState<kState>(mma_, states_, chunk_, super_, of_all));
  }

  // products_[s] = C B^T of this group's rows and columns [64 s, 64 s + 64), up to its diagonal block.
  __device__ void FillProducts() {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (s > wg_) continue;
      GroupFence();
#pragma unroll
      for (int k = 0; k < kState / 16; ++k) {
        MultiplyShared<Major::kDepthInRow, Major::kDepthInRow>(
            products_[s], OperandAt<kSsdRows>(memory_ + Memory::kC, 64 * wg_, 2 * k),
            OperandAt<kSsdRows>(memory_ + Memory::kB, 64 * s, 2 * k), k > 0);
      }
      GroupCommit();
    }
    GroupWait<0>();
    GroupUse(products_[0]);
    GroupUse(products_[1]);
  }

  __device__ void Output(int u) {
    const int head = static_cast<int>(u / mma_.blocks);
    const float* sums = SharedFloats(memory_ + Memory::kSums) + head * kSsdRows;
    const float* dts = SharedFloats(memory_ + Memory::kDts) + head * kSsdRows;
    const int row = 64 * wg_ + thread_ / 32 % 4 * 16 + thread_ % 32 / 4;
    const float sum[2] = {sums[row], sums[row + 8]};
    float y[8][4];
    GroupFence();
#pragma unroll
    for (int k = 0; k < kState / 16; ++k) {
      MultiplyShared<Major::kDepthInRow, Major::kDepthAcrossRows>(
          y, OperandAt<kSsdRows>(memory_ + Memory::kC, 64 * wg_, 2 * k),
          OperandAt<kState>(StateTileAt(u), 16 * k, 0), k > 0);
    }
    GroupCommit();
    GroupWait<0>();
    GroupUse(y);
    ScaleRows(y, Exp2(sum[0]), Exp2(sum[1]));
    GroupUse(y);
    AddInside(u, sums, dts, row, sum, y);
    if (mma_.ssd.skip != nullptr) AddSkip(u, mma_.ssd.skip[units_.first_head + head], y);
    StoreFragment(y, [&](int half) -> Bf16* {
      const int64_t to_row = rows_.begin + row + 8 * half;
      if (to_row >= rows_.end) return nullptr;
      return y_.data + to_row * y_.row_stride + units_.item * y_.batch_stride +
             (units_.first + u) * kSsdColumns;
    });
  }

  // y += (products o decays o dt) X
  __device__ void AddInside(int u, const float* sums, const float* dts, int row, const float (&sum)[2],
                            float (&y)[8][4]) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (s > wg_) continue;
      uint32_t weights[4][4];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int column = 64 * s + 8 * n + thread_ % 4 * 2;
        const float2 from = *reinterpret_cast<const float2*>(sums + column);
        const float2 dt = *reinterpret_cast<const float2*>(dts + column);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* product = products_[s][n] + 2 * half;
          float low = product[0] * (Exp2(sum[half] - from.x) * dt.x);
          float high = product[1] * (Exp2(sum[half] - from.y) * dt.y);
          if (s == wg_) {  // what comes later weighs nothing
            if (column > row + 8 * half) low = 0;
            if (column + 1 > row + 8 * half) high = 0;
          }
          weights[n / 2][n % 2 * 2 + half] = PackBf16(low, high);
        }
      }
      GroupFence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        MultiplyRegisters<Major::kDepthAcrossRows>(y, weights[k],
                                                   OperandAt<kSsdRows>(Values(u), 64 * s + 16 * k, 0), 1);
      }
      GroupCommit();
    }
    GroupWait<0>();
    GroupUse(y);
  }

  __device__ void AddSkip(int u, float skip, float (&y)[8][4]) {
    const uint32_t lane_at =
        Values(u) + ValueTile::LaneOffset(thread_ % 32, 64 * wg_ + thread_ / 32 % 4 * 16);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t x[4];
      LoadMatrices(x, ValueTile::At(lane_at, 0, k));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = UnpackBf16(x[i]);
        float* to = y[2 * k + i / 2] + i % 2 * 2;
        to[0] = fmaf(skip, pair.x, to[0]);
        to[1] = fmaf(skip, pair.y, to[1]);
      }
    }
  }

  const MmaSsd& mma_;
  const CudaSsdStates& states_;
  const StridedRows<Bf16>& y_;
  const GroupUnits units_;
  const uint32_t memory_;
  const int thread_, wg_;
  const int64_t chunk_;
  const ChunkRows rows_;
  const SuperChunks super_;
  float products_[2][8][4];
};

template <int kState>
__global__ void __launch_bounds__(kSsdThreads, 1)
    ForwardKernel(const __grid_constant__ MmaSsd mma, const __grid_constant__ CudaSsdStates states,
                  const __grid_constant__ StridedRows<Bf16> y, int parts) {
  const GroupUnits units(mma, blockIdx.y, parts);
  ForwardCta<kState>(mma, states, y, units).Run();
}

}  // namespace

cudaError_t MmaSsdForward(const CudaSsd<Bf16>& ssd, const float* initial, const CudaSsdStates& states,
                          StridedRows<Bf16> y, cudaStream_t stream) {
  const MmaSsd mma = MakeMmaSsd(ssd);
  const cudaError_t error = ReplaceSupers(Flow::kForward, mma, states, initial, stream);
  if (error != cudaSuccess) return error;
  // Each part computes the products of its group again.
  const int parts = GroupParts(mma);
  return VisitState(ssd, [&]<int kState>() {
    const dim3 grid(static_cast<uint32_t>(ssd.chunks.chunks()),
                    static_cast<uint32_t>(ssd.batch * ssd.groups * parts));
    return LaunchSsd(ForwardKernel<kState>, grid, ForwardMemory<kState>::kBytes, stream, mma, states, y,
                     parts);
  });
}

}  // namespace annulus::kernels
