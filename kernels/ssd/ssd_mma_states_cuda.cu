// Chunk states on tensor cores and the scan over supers. A warpgroup carries the state of one unit,
// [state, 64] f32, in its registers from chunk to chunk; two of them share the tile of b (c in backward):
//
//   forward    state <- decay state + b^T (to_end dt x)      from the first chunk of a super to its last
//   backward   state <- decay state + c^T (from_start dy)    the other way

#include "kernels/ssd/ssd_mma.cuh"

namespace annulus::kernels {
namespace {

constexpr int kGroupThreads = 128, kGroups = kSsdThreads / kGroupThreads;

// Bytes of shared memory: two stages, then weights of rows and sums of warps.
template <int kState>
struct StatesMemory {
  static constexpr int kStage = KeyTile<kState>::kBytes + kGroups * ValueTile::kBytes;
  static constexpr int kWeights = 2 * kStage;
  static constexpr int kSums = kWeights + kGroups * kSsdRows * 4;
  static constexpr int kBytes = kSums + 2 * kGroups * 4 * 4;
};

template <int kState, Flow kFlow>
class StatesCta {
 public:
  static constexpr int kTiles = kState / 64;  // of 64 rows of the state

  __device__ StatesCta(const MmaSsd& mma, const StridedRows<const Bf16>& keys,
                       const StridedRows<const Bf16>& values, const CudaSsdStates& states)
      : mma_(mma),
        keys_(keys),
        values_(values),
        states_(states),
        memory_(SharedBase()),
        thread_(static_cast<int>(threadIdx.x)),
        wg_(Warpgroup()) {
    const CudaSsd<Bf16>& ssd = mma.ssd;
    const int64_t of_group = ssd.heads / ssd.groups * mma.blocks, pairs = (of_group + kGroups - 1) / kGroups;
    const int64_t first = blockIdx.y % pairs * kGroups, group = blockIdx.y / pairs % ssd.groups;
    item_ = blockIdx.y / pairs / ssd.groups;
    group_ = group;
    stores_ = first + wg_ < of_group;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) column_[g] = group * of_group + min(first + g, of_group - 1);
    unit_ = group * of_group + min(first + wg_, of_group - 1);
    const ChunkRows super = ChunkAt(mma.supers, blockIdx.x);
    const int64_t begin = ssd.chunks.first_chunk[super.segment];
    first_ = begin + (super.begin - super.segment_begin) / kSsdRows;
    count_ = (super.end - super.begin + kSsdRows - 1) / kSsdRows;
  }

  __device__ void Run() {
    Load(0);
    CopyAsyncCommit();
    RowGates gates = Gates(0);
    for (int64_t i = 0; i < count_; ++i) {
      if (i + 1 < count_) Load(i + 1);
      CopyAsyncCommit();
      const float sum = WarpPrefixSum(gates.log_decay);
      float* sums = SharedFloats(memory_ + Memory::kSums) + (i % 2 * kGroups + wg_) * 4;
      if (thread_ % 32 == 31) sums[thread_ / 32 % 4] = sum;
      CopyAsyncWait<1>();
      BulkFence();
      __syncthreads();
      const float dt = gates.dt;
      if (i + 1 < count_) gates = Gates(i + 1);
      const float total = Weigh(sum, dt, sums);
      ScaleValues(i);
      if (i > 0) Keep(i);
      Advance(i, Exp2(total));
      log_decay_ += total;
      if (kFlow == Flow::kForward) StoreDecay(i);
      __syncthreads();
    }
    StoreSuper();
  }

 private:
  using Memory = StatesMemory<kState>;

  // The i-th chunk on the way.
  __device__ int64_t Chunk(int64_t i) const {
    return kFlow == Flow::kForward ? first_ + i : first_ + count_ - 1 - i;
  }
  __device__ uint32_t Stage(int64_t i) const {
    return memory_ + static_cast<uint32_t>(i % 2) * Memory::kStage;
  }
  __device__ uint32_t Values(int64_t i, int wg) const {
    return Stage(i) + KeyTile<kState>::kBytes + static_cast<uint32_t>(wg) * ValueTile::kBytes;
  }
  __device__ uint32_t Weights() const { return memory_ + Memory::kWeights + wg_ * kSsdRows * 4; }

  __device__ void Load(int64_t i) {
    const ChunkRows rows = ChunkAt(mma_.ssd.chunks, Chunk(i));
    LoadRows<kState>(Stage(i), keys_, rows, item_, group_ * kState);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      LoadRows<kSsdColumns>(Values(i, g), values_, rows, item_, column_[g] * kSsdColumns);
    }
  }
  __device__ RowGates Gates(int64_t i) const {
    return LoadGates(mma_.ssd, ChunkAt(mma_.ssd.chunks, Chunk(i)), item_, unit_ / mma_.blocks,
                     thread_ % kGroupThreads);
  }

  // The row's factor; returns the sum over the chunk. sums: of the group's warps.
  __device__ float Weigh(float sum, float dt, const float* sums) {
    const int warp = thread_ / 32 % 4;
    float total = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (w < warp) sum += sums[w];
      total += sums[w];
    }
    SharedFloats(Weights())[thread_ % kGroupThreads] =
        kFlow == Flow::kForward ? Exp2(total - sum) * dt : Exp2(sum);
    NamedBarrier(1 + wg_, kGroupThreads);
    return total;
  }

  __device__ void ScaleValues(int64_t i) {
    constexpr int kPasses = kSsdRows * 8 / kGroupThreads;
    const int chunk = thread_ % 8, first = thread_ % kGroupThreads / 8;
    const float* weights = SharedFloats(Weights());
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = first + pass * (kGroupThreads / 8);
      const uint32_t at = Values(i, wg_) + ValueTile::Offset(row, chunk);
      const float weight = weights[row];
      uint4 v = LoadShared16(at);
      for (uint32_t* word : {&v.x, &v.y, &v.z, &v.w}) {
        const float2 pair = UnpackBf16(*word);
        *word = PackBf16(pair.x * weight, pair.y * weight);
      }
      StoreShared16(at, v);
    }
    BulkFence();
    NamedBarrier(1 + wg_, kGroupThreads);
  }

  __device__ void Advance(int64_t i, float decay) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      ScaleRows(state_[m], decay, decay);
      GroupUse(state_[m]);
    }
    GroupFence();
#pragma unroll
    for (int k = 0; k < kSsdRows / 16; ++k) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        MultiplyShared<Major::kDepthAcrossRows, Major::kDepthAcrossRows>(
            state_[m], OperandAt<kSsdRows>(Stage(i), 16 * k, 8 * m),
            OperandAt<kSsdRows>(Values(i, wg_), 16 * k, 0), 1);
      }
    }
    GroupCommit();
    GroupWait<0>();
#pragma unroll
    for (int m = 0; m < kTiles; ++m) GroupUse(state_[m]);
  }

  // Row of the state that this lane holds in fragment m.
  __device__ int StateRow(int m) const { return m * 64 + thread_ / 32 % 4 * 16 + thread_ % 32 / 4; }

  // What the chunks before leave, into the slot of chunk i.
  __device__ void Keep(int64_t i) {
    char* slot = SlotAt<kState>(states_.states, mma_, Chunk(i), OwnUnit());
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      StoreFragment(state_[m], [&](int half) {
        return stores_ ? reinterpret_cast<Bf16*>(slot + SlotRow(StateRow(m) + 8 * half)) : nullptr;
      });
    }
  }
  // All of the super, into the slot of its first chunk on the way.
  __device__ void StoreSuper() {
    if (!stores_) return;
    float* slot = reinterpret_cast<float*>(SlotAt<kState>(states_.states, mma_, Chunk(0), OwnUnit()));
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        float* to = slot + StateRow(m) * kSsdColumns + n * 8 + thread_ % 4 * 2;
        *reinterpret_cast<float2*>(to) = {state_[m][n][0], state_[m][n][1]};
        *reinterpret_cast<float2*>(to + 8 * kSsdColumns) = {state_[m][n][2], state_[m][n][3]};
      }
    }
  }
  // Of all chunks of the super so far.
  __device__ void StoreDecay(int64_t i) {
    if (thread_ % kGroupThreads != 0 || !stores_ || unit_ % mma_.blocks != 0) return;
    const int64_t heads = mma_.ssd.batch * mma_.ssd.heads;
    states_.decays[Chunk(i) * heads + item_ * mma_.ssd.heads + unit_ / mma_.blocks] = log_decay_;
  }
  __device__ int64_t OwnUnit() const { return item_ * mma_.ssd.heads * mma_.blocks + unit_; }

  const MmaSsd& mma_;
  const StridedRows<const Bf16>& keys_;
  const StridedRows<const Bf16>& values_;
  const CudaSsdStates& states_;
  const uint32_t memory_;
  const int thread_, wg_;
  int64_t item_, group_, unit_;  // unit: of the item
  int64_t column_[kGroups];      // units of the groups' warps
  int64_t first_, count_;        // chunks
  bool stores_;                  // false: a unit that another CTA's warpgroup has as well
  float log_decay_ = 0;
  float state_[kTiles][8][4] = {};
};

template <int kState, Flow kFlow>
__global__ void __launch_bounds__(kSsdThreads, 1)
    StatesKernel(const __grid_constant__ MmaSsd mma, const __grid_constant__ StridedRows<const Bf16> keys,
                 const __grid_constant__ StridedRows<const Bf16> values,
                 const __grid_constant__ CudaSsdStates states) {
  StatesCta<kState, kFlow>(mma, keys, values, states).Run();
}

enum class SuperMode { kSummarise, kReplace };

// CTA (unit of a segment, piece of its state); a thread takes four elements from super to super.
template <int kState, Flow kFlow, SuperMode kMode>
__global__ void __launch_bounds__(kSsdThreads)
    SupersKernel(const __grid_constant__ MmaSsd mma, const CudaSsdStates states, const float* initial,
                 const CudaSsdSummary summary) {
  constexpr bool kForward = kFlow == Flow::kForward;
  const int64_t heads = mma.ssd.batch * mma.ssd.heads, units = heads * mma.blocks;
  const int64_t unit = blockIdx.x % units, head = unit / mma.blocks;
  const int segment = static_cast<int>(blockIdx.x / units);
  const int64_t element = int64_t{blockIdx.y} * (kPieceBytes / 4) + threadIdx.x * 4;
  const int64_t own = ((segment * heads + head) * kState + element / kSsdColumns) * mma.ssd.dim +
                      unit % mma.blocks * kSsdColumns + element % kSsdColumns;
  const int64_t begin = mma.ssd.chunks.first_chunk[segment], end = mma.ssd.chunks.first_chunk[segment + 1];
  const int64_t supers = (end - begin + mma.super_chunks - 1) / mma.super_chunks;
  const auto super_at = [&](int64_t i) {
    const int64_t index = kForward ? i : supers - 1 - i;
    return SuperOf(mma, begin + index * mma.super_chunks, segment);
  };
  const auto piece_of = [&](const SuperChunks& super) {
    const int64_t chunk = kForward ? super.first : super.last;
    return SlotAt<kState>(states.states, mma, chunk, unit) + int64_t{blockIdx.y} * kPieceBytes;
  };
  float4 state = {0, 0, 0, 0};
  if (kMode == SuperMode::kReplace && initial != nullptr) {
    state = {initial[own], initial[own + 1], initial[own + 2], initial[own + 3]};
  }
  float log_decay = 0;
  float4 next = {0, 0, 0, 0};
  if (supers > 0) next = reinterpret_cast<const float4*>(piece_of(super_at(0)))[threadIdx.x];
  for (int64_t i = 0; i < supers; ++i) {
    const SuperChunks super = super_at(i);
    const float4 added = next;
    if (i + 1 < supers) next = reinterpret_cast<const float4*>(piece_of(super_at(i + 1)))[threadIdx.x];
    const float own_log = states.decays[super.last * heads + head], decay = Exp2(own_log);
    log_decay += own_log;
    if (kMode == SuperMode::kReplace) {
      __syncthreads();  // all have read
      reinterpret_cast<uint2*>(piece_of(super))[threadIdx.x] = {PackBf16(state.x, state.y),
                                                                PackBf16(state.z, state.w)};
    }
    state = {fmaf(decay, state.x, added.x), fmaf(decay, state.y, added.y), fmaf(decay, state.z, added.z),
             fmaf(decay, state.w, added.w)};
  }
  if (kMode == SuperMode::kReplace) return;
  float* to = summary.state + own;
  to[0] = state.x, to[1] = state.y, to[2] = state.z, to[3] = state.w;
  if (blockIdx.y == 0 && threadIdx.x == 0 && unit % mma.blocks == 0) {
    summary.transition[segment * heads + head] = Exp2(log_decay);
  }
}

template <int kState, Flow kFlow, SuperMode kMode>
cudaError_t LaunchSupers(const MmaSsd& mma, const CudaSsdStates& states, const float* initial,
                         const CudaSsdSummary& summary, cudaStream_t stream) {
  const dim3 grid(static_cast<uint32_t>(mma.ssd.chunks.count * mma.units()),
                  static_cast<uint32_t>(kState / kPieceRows));
  return LaunchSsd(SupersKernel<kState, kFlow, kMode>, grid, 0, stream, mma, states, initial, summary);
}

template <Flow kFlow>
cudaError_t ChunkStates(const MmaSsd& mma, const StridedRows<const Bf16>& keys,
                        const StridedRows<const Bf16>& values, const CudaSsdStates& states,
                        const CudaSsdSummary& summary, cudaStream_t stream) {
  return VisitState(mma.ssd, [&]<int kState>() {
    const dim3 grid(
        static_cast<uint32_t>(mma.supers.chunks()),
        static_cast<uint32_t>(mma.ssd.batch * mma.ssd.groups * CeilDiv(mma.group_units(), kGroups)));
    const cudaError_t error = LaunchSsd(StatesKernel<kState, kFlow>, grid, StatesMemory<kState>::kBytes,
                                        stream, mma, keys, values, states);
    if (error != cudaSuccess) return error;
    return LaunchSupers<kState, kFlow, SuperMode::kSummarise>(mma, states, nullptr, summary, stream);
  });
}

}  // namespace

bool MmaSsdKnows(const CudaSsd<Bf16>& ssd) {
  int device = 0, major = 0;
  const bool hopper =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
  return hopper && ssd.chunks.chunk == kSsdRows && (ssd.state == 64 || ssd.state == 128) && ssd.dim > 0 &&
         ssd.dim % kSsdColumns == 0;
}

// Supers are as long as leaves enough CTAs for a large device; which one it is must not change results.
MmaSsd MakeMmaSsd(const CudaSsd<Bf16>& ssd) {
  constexpr int64_t kCtasWanted = 512, kMostChunks = 32;
  MmaSsd mma{.ssd = ssd, .supers = {}, .blocks = ssd.dim / kSsdColumns};
  const int64_t ctas_of_chunk = ssd.batch * ssd.groups * CeilDiv(mma.group_units(), kGroups);
  mma.super_chunks = std::clamp<int64_t>(ssd.chunks.chunks() * ctas_of_chunk / kCtasWanted, 1, kMostChunks);
  mma.supers = ssd.chunks;
  mma.supers.chunk = mma.super_chunks * kSsdRows;
  for (int s = 0; s < ssd.chunks.count; ++s) {
    const int64_t chunks = ssd.chunks.first_chunk[s + 1] - ssd.chunks.first_chunk[s];
    mma.supers.first_chunk[s + 1] = mma.supers.first_chunk[s] + CeilDiv(chunks, mma.super_chunks);
  }
  return mma;
}

cudaError_t ReplaceSupers(Flow flow, const MmaSsd& mma, const CudaSsdStates& states, const float* initial,
                          cudaStream_t stream) {
  return VisitState(mma.ssd, [&]<int kState>() {
    if (flow == Flow::kForward) {
      return LaunchSupers<kState, Flow::kForward, SuperMode::kReplace>(mma, states, initial, {}, stream);
    }
    return LaunchSupers<kState, Flow::kBackward, SuperMode::kReplace>(mma, states, initial, {}, stream);
  });
}

cudaError_t MmaSsdChunkStates(const CudaSsd<Bf16>& ssd, const CudaSsdStates& states,
                              const CudaSsdSummary& summary, cudaStream_t stream) {
  return ChunkStates<Flow::kForward>(MakeMmaSsd(ssd), ssd.b, ssd.x, states, summary, stream);
}

cudaError_t MmaSsdBackwardChunkStates(const CudaSsd<Bf16>& ssd, StridedRows<const Bf16> dy,
                                      const CudaSsdStates& gradients, const CudaSsdSummary& summary,
                                      cudaStream_t stream) {
  return ChunkStates<Flow::kBackward>(MakeMmaSsd(ssd), ssd.c, dy, gradients, summary, stream);
}

}  // namespace annulus::kernels
