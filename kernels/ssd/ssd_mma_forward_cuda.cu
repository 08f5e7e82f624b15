// y on tensor cores. A CTA takes a chunk and some heads of one group. Two pairs of warpgroups share the tile
// of C and the products C B^T of the chunk, which lie in shared memory, and take units in turns. With the
// rows folded (ssd_mma.cuh), those of the tile of C too, each warp has as much to do of
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
  static constexpr int kC = 0;
  static constexpr int kStages = kC + kKeys;  // [pairs, 2]
  static constexpr int kB = kStages + 2 * kStage;
  static constexpr int kProducts = kStages + kPairs * 2 * kStage;  // [pieces, 256] float2
  static constexpr int kSums = kProducts + kPieces * kSsdThreads * 8;
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
        units_(mma, blockIdx.y, static_cast<uint32_t>(parts)),
        shared_(SharedBase()),
        memory_(SharedAddress(shared_)),
        thread_(static_cast<int>(threadIdx.x % kSsdThreads)),
        pair_(Warpgroup() / 2),
        wg_(Warpgroup() % 2),
        warp_(__shfl_sync(~0u, thread_ / 32, 0)),
        chunk_(blockIdx.x),
        rows_(ChunkAt(mma.ssd.chunks, chunk_)),
        super_(SuperOf(mma, chunk_, rows_.segment)),
        x_(mma.ssd.x, rows_, units_.item, units_.first * kSsdColumns + thread_ % 8 * 8, thread_ / 8,
           kSsdThreads / 8, 4),
        slots_(SlotsOf<kState, Flow::kForward>(mma, states.states, chunk_, super_,
                                               units_.item * mma.ssd.heads * mma.blocks + units_.first)) {}

  __device__ void Run() {
    const CudaSsd<Bf16>& ssd = mma_.ssd;
    // Each pair brings one of the tiles that both use.
    if (pair_ == 0) {
      LoadFolded<kState>(memory_ + Memory::kC, ssd.c, rows_, units_.item, units_.group * kState);
    } else {
      LoadRows<kState>(memory_ + Memory::kB, ssd.b, rows_, units_.item, units_.group * kState, thread_);
    }
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
    FillProducts();
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

  // All but what of its state passes through registers.
  __device__ void LoadValues(int u) {
    x_.template Start<4, kSsdThreads / 8>(CopyAt(Values(u), threadIdx.x % kSsdThreads),
                                          kSsdThreads / 8 * mma_.ssd.x.row_stride, u);
    StateLoad<kState>::StartCopy(StateTileAt(u), slots_, u, thread_);
  }
  __device__ void Load(int u, StateLoad<kState>* state) {
    LoadValues(u);
    state->StartSuper(slots_, u, thread_, Floats(Memory::kFactors)[Head(u)]);
  }

  __device__ int Row(int half) const { return FoldedRow(16 * warp_ + 8 * half + thread_ % 32 / 4); }

  // Piece of C B^T as the thread of the same place in either pair has it. Piece m of the upper rows, of
  // columns [8 m, 8 m + 8), is at m; of the lower rows at 15 - m, but that on the diagonal, where the upper
  // rows have their own, at the end.
  __device__ float2* Product(int piece) const {
    return reinterpret_cast<float2*>(shared_ + Memory::kProducts) + piece * kSsdThreads + thread_;
  }
  // A pair takes half of the columns.
  __device__ void FillProducts() {
    float product[8][4];
    GroupFence();
#pragma unroll
    for (int k = 0; k < kState / 16; ++k) {
      MultiplyShared<Major::kDepthInRow, Major::kDepthInRow>(
          product, OperandAt<kSsdRows>(memory_ + Memory::kC, 64 * wg_, 2 * k),
          OperandAt<kSsdRows>(memory_ + Memory::kB, 64 * pair_, 2 * k), k > 0);
    }
    GroupCommit();
    GroupWait<0>();
    GroupUse(product);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int m = 8 * pair_ + n;
      if (m <= warp_) *Product(m == warp_ ? kPieces - 1 : 15 - m) = {product[n][0], product[n][1]};
      if (m <= 15 - warp_) *Product(m) = {product[n][2], product[n][3]};
    }
  }

  // next: the unit whose state is asked for meanwhile, -1: none.
  __device__ void Output(int u, int next, StateLoad<kState>* state) {
    const int head = Head(u);
    const float* sums = Floats(Memory::kSums) + head * kSsdRows;
    const float* dts = Floats(Memory::kDts) + head * kSsdRows;
    const float sum[2] = {sums[Row(0)], sums[Row(1)]};
    const float skip = mma_.ssd.skip != nullptr ? mma_.ssd.skip[units_.first_head + head] : 0;
    float y[8][4];
    GroupFence();
#pragma unroll
    for (int k = 0; k < kState / 16; ++k) {
      MultiplyShared<Major::kDepthInRow, Major::kDepthAcrossRows>(
          y, OperandAt<kSsdRows>(memory_ + Memory::kC, 64 * wg_, 2 * k),
          OperandAt<kState>(StateTileAt(u), 16 * k, 0), k > 0);
    }
    GroupCommit();
    uint32_t weights[2][4][4];
    Weigh<0>(sums, dts, sum, weights[0]);
    GroupWait<0>();
    GroupUse(y);
    ScaleRows(y, Exp2(sum[0]), Exp2(sum[1]));
    AddValues(u, 0, weights[0], y);
    Weigh<1>(sums, dts, sum, weights[1]);
    AddValues(u, 64, weights[1], y);
    if (next >= 0) {
      state->StartSuper(slots_, next, thread_, Floats(Memory::kFactors)[Head(next)]);
    } else {
      state->factor = 0;
    }
    GroupWait<0>();
    GroupUse(y);
    if (mma_.ssd.skip != nullptr) AddFolded<Order::kPlain>(Values(u), warp_, 0, skip, y);
    StoreFragment(y, [&](int half) -> Bf16* {
      const int64_t to_row = rows_.begin + Row(half);
      if (to_row >= rows_.end) return nullptr;
      return y_.data + to_row * y_.row_stride + units_.item * y_.batch_stride +
             (units_.first + u) * kSsdColumns;
    });
  }

  // The left operand of the warp's rows and columns [64 kPart, 64 kPart + 64).
  template <int kPart>
  __device__ void Weigh(const float* sums, const float* dts, const float (&sum)[2],
                        uint32_t (&weights)[4][4]) const {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int m = 8 * kPart + n;
      weights[n / 2][n % 2 * 2] = kPart > 0 || m > warp_ ? 0 : WeighPiece<Half::kLower>(m, sums, dts, sum[0]);
      weights[n / 2][n % 2 * 2 + 1] =
          kPart > 0 && m > 15 - warp_ ? 0 : WeighPiece<Half::kUpper>(m, sums, dts, sum[1]);
    }
  }
  enum class Half { kLower, kUpper };
  template <Half kHalf>
  __device__ uint32_t WeighPiece(int m, const float* sums, const float* dts, float sum) const {
    const bool diagonal = kHalf == Half::kLower ? m == warp_ : m >= 8 && m == 15 - warp_;
    const int column = thread_ % 4 * 2, row = thread_ % 32 / 4;
    const float2 from = *reinterpret_cast<const float2*>(sums + 8 * m + column);
    const float2 dt = *reinterpret_cast<const float2*>(dts + 8 * m + column);
    const float2 product = *Product(kHalf == Half::kUpper ? m : diagonal ? kPieces - 1 : 15 - m);
    float low = product.x * (Exp2(sum - from.x) * dt.x);
    float high = product.y * (Exp2(sum - from.y) * dt.y);
    if (diagonal) {  // what comes later weighs nothing
      if (column > row) low = 0;
      if (column + 1 > row) high = 0;
    }
    return PackBf16(low, high);
  }

  // y += weights X over rows [s, s + 64) of X, left in flight.
  __device__ void AddValues(int u, int s, const uint32_t (&weights)[4][4], float (&y)[8][4]) const {
    GroupUse(y);
    GroupFence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      MultiplyRegisters<Major::kDepthAcrossRows>(y, weights[k], OperandAt<kSsdRows>(Values(u), s + 16 * k, 0),
                                                 1);
    }
    GroupCommit();
  }

  const MmaSsd& mma_;
  const CudaSsdStates& states_;
  const StridedRows<Bf16>& y_;
  const GroupUnits units_;
  char* const shared_;
  const uint32_t memory_;                // its address
  const int thread_, pair_, wg_, warp_;  // all but the pair: of the pair
  const int64_t chunk_;
  const ChunkRows rows_;
  const SuperChunks super_;
  const RowCopies x_;
  const StateSlots slots_;
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
  const int parts = GroupParts(mma, kSsdMostHeads);
  return VisitState(ssd, [&]<int kState>() {
    const dim3 grid(static_cast<uint32_t>(ssd.chunks.chunks()),
                    static_cast<uint32_t>(ssd.batch * ssd.groups * parts));
    return LaunchSsd(ForwardKernel<kState>, grid, kThreads, ForwardMemory<kState>::kBytes, stream, mma,
                     states, y, parts);
  });
}

}  // namespace annulus::kernels
