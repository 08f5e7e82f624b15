// y on tensor cores. A CTA takes a chunk and some heads of one group. Two pairs of warpgroups share the tile
// of C and the products C B^T of the chunk, which lie in shared memory, and take units in turns: warpgroup w
// of a pair rows [64 w, 64 w + 64) of
//
//   y = from_start (C h_in) + ((C B^T) o decays o dt) X + skip X
//
// while the pair's next unit arrives.

#include "kernels/ssd/ssd_mma.cuh"

namespace annulus::kernels {
namespace {

constexpr int kPairs = 2, kThreads = kPairs * kSsdThreads;

// Bytes of shared memory. B is needed only until the products are there: it lies where the second pair's
// first stage will.
template <int kState>
struct ForwardMemory {
  static constexpr int kStage = ValueTile::kBytes + StateTile<kState>::kBytes;
  static constexpr int kKeys = KeyTile<kState>::kBytes;
  static constexpr int kArray = kSsdMostHeads * kSsdRows * 4;  // [heads, rows]
  static constexpr int kProductBlock = 64 * 64 * 4;
  static constexpr int kC = 0;
  static constexpr int kStages = kC + kKeys;  // [pairs, 2]
  static constexpr int kB = kStages + 2 * kStage;
  static constexpr int kProducts = kStages + kPairs * 2 * kStage;  // blocks (0, 0), (1, 0), (1, 1)
  static constexpr int kSums = kProducts + 3 * kProductBlock;
  static constexpr int kDts = kSums + kArray;
  static constexpr int kFactors = kDts + kArray;
  static constexpr int kBytes = kFactors + kSsdMostHeads * 4;
  static_assert(kKeys <= 2 * kStage && kBytes + kSharedSlack <= 227 * 1024);
};

template <int kState>
class ForwardCta {
 public:
  __device__ ForwardCta(const MmaSsd& mma, const CudaSsdStates& states, const StridedRows<Bf16>& y, int parts)
      : mma_(mma),
        states_(states),
        y_(y),
        units_(mma, blockIdx.y, parts),
        shared_(SharedBase()),
        memory_(SharedAddress(shared_)),
        thread_(static_cast<int>(threadIdx.x % kSsdThreads)),
        pair_(Warpgroup() / 2),
        wg_(Warpgroup() % 2),
        row_(64 * wg_ + thread_ / 32 % 4 * 16 + thread_ % 32 / 4),
        chunk_(blockIdx.x),
        rows_(ChunkAt(mma.ssd.chunks, chunk_)),
        super_(SuperOf(mma, chunk_, rows_.segment)) {}

  __device__ void Run() {
    const CudaSsd<Bf16>& ssd = mma_.ssd;
    // Each pair brings one of the tiles that both use.
    LoadRows<kState>(memory_ + (pair_ == 0 ? Memory::kC : Memory::kB), pair_ == 0 ? ssd.c : ssd.b, rows_,
                     units_.item, units_.group * kState, thread_);
    CopyAsyncCommit();
    FillFactors<Flow::kForward>(mma_, states_.decays, chunk_, super_,
                                units_.item * ssd.heads + units_.first_head, units_.heads,
                                Floats(Memory::kFactors));
    FillGates(ssd, rows_, units_.item, units_.first_head, units_.heads, Floats(Memory::kSums),
              Floats(Memory::kDts));
    __syncthreads();
    StateLoad<kState> state;
    if (pair_ == 0) Load(0, &state);  // the other pair's stage still holds B
    CopyAsyncCommit();
    CopyAsyncWait<1>();
    BulkFence();
    __syncthreads();
    if (pair_ <= wg_) FillProducts(wg_, pair_ == 0 ? wg_ : 0);
    __syncthreads();
    if (pair_ > 0 && pair_ < units_.count) Load(pair_, &state);
    CopyAsyncCommit();
    for (int u = pair_; u < units_.count; u += kPairs) {
      const bool more = u + kPairs < units_.count;
      if (more) LoadValues(u + kPairs);
      CopyAsyncCommit();
      CopyAsyncWait<1>();
      state.Finish(StateTileAt(u), thread_);
      BulkFence();
      PairBarrier();
      Output(u, more ? u + kPairs : -1, &state);
      PairBarrier();
    }
  }

 private:
  using Memory = ForwardMemory<kState>;

  __device__ void PairBarrier() const { NamedBarrier(1 + pair_, kSsdThreads); }
  __device__ float* Floats(int offset) const { return reinterpret_cast<float*>(shared_ + offset); }
  __device__ int Head(int u) const { return mma_.blocks == 1 ? u : u / mma_.blocks; }
  __device__ uint32_t Values(int u) const {
    return memory_ + Memory::kStages + static_cast<uint32_t>(2 * pair_ + u / kPairs % 2) * Memory::kStage;
  }
  __device__ uint32_t StateTileAt(int u) const { return Values(u) + ValueTile::kBytes; }
  __device__ StateSource Source(int u) const {
    return StateOf<kState, Flow::kForward>(mma_, states_.states, chunk_, super_,
                                           units_.item * mma_.ssd.heads * mma_.blocks + units_.first + u,
                                           Floats(Memory::kFactors)[Head(u)]);
  }

  // All but what of its state passes through registers.
  __device__ void LoadValues(int u) {
    LoadRows<kSsdColumns>(Values(u), mma_.ssd.x, rows_, units_.item, (units_.first + u) * kSsdColumns,
                          thread_);
    StateLoad<kState>::StartCopy(StateTileAt(u), Source(u), thread_);
  }
  __device__ void Load(int u, StateLoad<kState>* state) {
    LoadValues(u);
    state->StartSuper(Source(u), thread_);
  }

  // Element n of a thread's fragments of block (t, s) of the products.
  __device__ float4* Product(int t, int s, int n) const {
    return reinterpret_cast<float4*>(Floats(Memory::kProducts + (t + s) * Memory::kProductBlock)) + n * 128 +
           thread_ % 128;
  }
  __device__ void FillProducts(int t, int s) {
    float product[8][4];
    GroupFence();
#pragma unroll
    for (int k = 0; k < kState / 16; ++k) {
      MultiplyShared<Major::kDepthInRow, Major::kDepthInRow>(
          product, OperandAt<kSsdRows>(memory_ + Memory::kC, 64 * t, 2 * k),
          OperandAt<kSsdRows>(memory_ + Memory::kB, 64 * s, 2 * k), k > 0);
    }
    GroupCommit();
    GroupWait<0>();
    GroupUse(product);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      *Product(t, s, n) = {product[n][0], product[n][1], product[n][2], product[n][3]};
    }
  }

  // next: the unit whose state is asked for meanwhile, -1: none.
  __device__ void Output(int u, int next, StateLoad<kState>* state) {
    const int head = Head(u);
    const float* sums = Floats(Memory::kSums) + head * kSsdRows;
    const float* dts = Floats(Memory::kDts) + head * kSsdRows;
    const float sum[2] = {sums[row_], sums[row_ + 8]};
    float y[8][4];
    GroupFence();
#pragma unroll
    for (int k = 0; k < kState / 16; ++k) {
      MultiplyShared<Major::kDepthInRow, Major::kDepthAcrossRows>(
          y, OperandAt<kSsdRows>(memory_ + Memory::kC, 64 * wg_, 2 * k),
          OperandAt<kState>(StateTileAt(u), 16 * k, 0), k > 0);
    }
    GroupCommit();
    uint32_t weights[4][4];
    Weigh<Block::kDiagonal>(sums, dts, sum, weights);
    GroupWait<0>();
    GroupUse(y);
    ScaleRows(y, Exp2(sum[0]), Exp2(sum[1]));
    AddValues(u, wg_, weights, y);
    if (wg_ > 0) {
      Weigh<Block::kEarlier>(sums, dts, sum, weights);
      AddValues(u, 0, weights, y);
    }
    if (next >= 0) {
      state->StartSuper(Source(next), thread_);
    } else {
      state->factor = 0;
    }
    GroupWait<0>();
    GroupUse(y);
    if (mma_.ssd.skip != nullptr) AddSkip(u, mma_.ssd.skip[units_.first_head + head], y);
    StoreFragment(y, [&](int half) -> Bf16* {
      const int64_t to_row = rows_.begin + row_ + 8 * half;
      if (to_row >= rows_.end) return nullptr;
      return y_.data + to_row * y_.row_stride + units_.item * y_.batch_stride +
             (units_.first + u) * kSsdColumns;
    });
  }

  // The left operand of this group's rows and the columns of its own block, or of the block before.
  enum class Block { kDiagonal, kEarlier };
  template <Block kBlock>
  __device__ void Weigh(const float* sums, const float* dts, const float (&sum)[2],
                        uint32_t (&weights)[4][4]) const {
    const int s = kBlock == Block::kDiagonal ? wg_ : 0;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      // In the diagonal block a warp's fragments lie before the diagonal, on it or past it.
      const int before = thread_ / 32 % 4 - n / 2;
      if (kBlock == Block::kDiagonal && before < 0) {
        weights[n / 2][n % 2 * 2] = weights[n / 2][n % 2 * 2 + 1] = 0;
        continue;
      }
      const int column = 64 * s + 8 * n + thread_ % 4 * 2;
      const float2 from = *reinterpret_cast<const float2*>(sums + column);
      const float2 dt = *reinterpret_cast<const float2*>(dts + column);
      const float4 own = *Product(wg_, s, n);
      const float product[2][2] = {{own.x, own.y}, {own.z, own.w}};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float low = product[half][0] * (Exp2(sum[half] - from.x) * dt.x);
        float high = product[half][1] * (Exp2(sum[half] - from.y) * dt.y);
        if (kBlock == Block::kDiagonal && before == 0) {  // what comes later weighs nothing
          if (column > row_ + 8 * half) low = 0;
          if (column + 1 > row_ + 8 * half) high = 0;
        }
        weights[n / 2][n % 2 * 2 + half] = PackBf16(low, high);
      }
    }
  }

  // y += weights X over rows [64 s, 64 s + 64) of X, left in flight.
  __device__ void AddValues(int u, int s, const uint32_t (&weights)[4][4], float (&y)[8][4]) const {
    GroupUse(y);
    GroupFence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      MultiplyRegisters<Major::kDepthAcrossRows>(y, weights[k],
                                                 OperandAt<kSsdRows>(Values(u), 64 * s + 16 * k, 0), 1);
    }
    GroupCommit();
  }

  __device__ void AddSkip(int u, float skip, float (&y)[8][4]) const {
    const uint32_t lane_at = Values(u) + ValueTile::LaneOffset(thread_ % 32, row_ - thread_ % 32 / 4);
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
  char* const shared_;
  const uint32_t memory_;         // its address
  const int thread_, pair_, wg_;  // thread: of the pair; wg: of the pair
  const int row_;                 // of the chunk: this lane's are row and row + 8
  const int64_t chunk_;
  const ChunkRows rows_;
  const SuperChunks super_;
};

template <int kState>
__global__ void __launch_bounds__(kThreads, 1)
    ForwardKernel(const __grid_constant__ MmaSsd mma, const __grid_constant__ CudaSsdStates states,
                  const __grid_constant__ StridedRows<Bf16> y, int parts) {
  ForwardCta<kState>(mma, states, y, parts).Run();
}

}  // namespace

cudaError_t MmaSsdForward(const CudaSsd<Bf16>& ssd, const float* initial, const CudaSsdStates& states,
                          StridedRows<Bf16> y, cudaStream_t stream) {
  const MmaSsd mma = MakeMmaSsd(ssd);
  const cudaError_t error = ReplaceSupers(Flow::kForward, mma, states, initial, stream);
  if (error != cudaSuccess) return error;
  const int parts = GroupParts(mma);
  return VisitState(ssd, [&]<int kState>() {
    const dim3 grid(static_cast<uint32_t>(ssd.chunks.chunks()),
                    static_cast<uint32_t>(ssd.batch * ssd.groups * parts));
    return LaunchSsd(ForwardKernel<kState>, grid, kThreads, ForwardMemory<kState>::kBytes, stream, mma,
                     states, y, parts);
  });
}

}  // namespace annulus::kernels
