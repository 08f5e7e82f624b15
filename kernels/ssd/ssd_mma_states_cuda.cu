// Chunk states on tensor cores and the scan over supers. A warpgroup carries the state of one unit,
// [state, 64] f32, in its registers from chunk to chunk; two of them share the tile of b (c in backward):
//
//   forward    state <- decay state + b^T (to_end dt x)      from the first chunk of a super to its last
//   backward   state <- decay state + c^T (from_start dy)    the other way

#include "kernels/ssd/ssd_mma.cuh"

namespace annulus::kernels {
namespace {

constexpr int kGroupThreads = 128, kGroups = kSsdThreads / kGroupThreads;

constexpr int kStages = 3;  // of which two are on their way

// Bytes of shared memory: stages, then weights of rows and sums of warps.
template <int kState>
struct StatesMemory {
  static constexpr int kStage = KeyTile<kState>::kBytes + kGroups * ValueTile::kBytes;
  static constexpr int kWeights = kStages * kStage;
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
        shared_(SharedBase()),
        memory_(SharedAddress(shared_)),
        thread_(static_cast<int>(threadIdx.x)),
        wg_(Warpgroup()),
        super_(ChunkAt(mma.supers, blockIdx.x)),
        count_(static_cast<int>((super_.end - super_.begin + kSsdRows - 1) / kSsdRows)) {
    const CudaSsd<Bf16>& ssd = mma.ssd;
    const int of_group = static_cast<int>(ssd.heads / ssd.groups) * mma.blocks;
    const int pairs = (of_group + kGroups - 1) / kGroups, groups = static_cast<int>(ssd.groups);
    const int first = static_cast<int>(blockIdx.y) % pairs * kGroups,
              index = static_cast<int>(blockIdx.y) / pairs;
    item_ = index / groups;
    group_ = index % groups;
    stores_ = first + wg_ < of_group;
    const int64_t before = int64_t{group_} * of_group;  // units of the groups before
#pragma unroll
    for (int g = 0; g < kGroups; ++g) column_[g] = (before + min(first + g, of_group - 1)) * kSsdColumns;
    const int64_t unit = before + min(first + wg_, of_group - 1);
    unit_ = item_ * ssd.heads * mma.blocks + unit;
    head_ = static_cast<int>(unit) / mma.blocks;
    keeps_decays_ = kFlow == Flow::kForward && stores_ && static_cast<int>(unit) % mma.blocks == 0 &&
                    thread_ % kGroupThreads == 0;
    first_chunk_ = ssd.chunks.first_chunk[super_.segment] + (super_.begin - super_.segment_begin) / kSsdRows;
  }

  __device__ void Run() {
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < count_) Load(i);
      CopyAsyncCommit();
    }
    RowGates gates = Gates(0);
    for (int i = 0; i < count_; ++i) {
      const float log_decay = gates.LogDecay(-kReset), dt = gates.dt;
      if (i + 1 < count_) gates = Gates(i + 1);
      const float sum = WarpPrefixSum(log_decay);
      float* sums = Floats(Memory::kSums) + (i % 2 * kGroups + wg_) * 4;
      if (thread_ % 32 == 31) sums[thread_ / 32 % 4] = sum;
      CopyAsyncWait<kStages - 2>();
      BulkFence();
      __syncthreads();  // the chunk is there, and what held the chunk before it has been read
      if (i + kStages - 1 < count_) Load(i + kStages - 1);
      CopyAsyncCommit();
      const float total = Weigh(sum, dt, sums);
      ScaleValues(i);
      if (i > 0) Keep(i);
      Advance(i, Exp2(total));
      log_decay_ += total;
      if (keeps_decays_) {
        states_.decays[Chunk(i) * mma_.ssd.batch * mma_.ssd.heads + item_ * mma_.ssd.heads + head_] =
            log_decay_;
      }
    }
    StoreSuper();
  }

 private:
  using Memory = StatesMemory<kState>;

  __device__ float* Floats(int offset) const { return reinterpret_cast<float*>(shared_ + offset); }
  // The i-th chunk on the way, counted in the super, and in all.
  __device__ int Within(int i) const { return kFlow == Flow::kForward ? i : count_ - 1 - i; }
  __device__ int64_t Chunk(int i) const { return first_chunk_ + Within(i); }
  __device__ uint32_t Stage(int i) const {
    return memory_ + static_cast<uint32_t>(i % kStages) * Memory::kStage;
  }
  __device__ uint32_t Values(int i, int wg) const {
    return Stage(i) + KeyTile<kState>::kBytes + static_cast<uint32_t>(wg) * ValueTile::kBytes;
  }
  __device__ float* Weights() const { return Floats(Memory::kWeights) + wg_ * kSsdRows; }

  __device__ void Load(int i) {
    ChunkRows rows = super_;
    rows.begin += int64_t{Within(i)} * kSsdRows;
    LoadRows<kState>(Stage(i), keys_, rows, item_, int64_t{group_} * kState, thread_);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      LoadRows<kSsdColumns>(Values(i, g), values_, rows, item_, column_[g], thread_);
    }
  }
  __device__ RowGates Gates(int i) const {
    return LoadGates(mma_.ssd, super_.begin + int64_t{Within(i)} * kSsdRows, super_.end, item_, head_,
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
    Weights()[thread_ % kGroupThreads] = kFlow == Flow::kForward ? Exp2(total - sum) * dt : Exp2(sum);
    NamedBarrier(1 + wg_, kGroupThreads);
    return total;
  }

  __device__ void ScaleValues(int i) {
    constexpr int kPasses = kSsdRows * 8 / kGroupThreads, kStep = kGroupThreads / 8;
    const int row = thread_ % kGroupThreads / 8;
    const uint32_t at = Values(i, wg_) + ValueTile::Offset(row, thread_ % 8);
    uint4 v[kPasses];
    float weight[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      v[pass] = LoadShared16(at + pass * kStep * 128);
      weight[pass] = Weights()[row + pass * kStep];
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const auto scaled = [&](uint32_t word) {
        const float2 pair = UnpackBf16(word);
        return PackBf16(pair.x * weight[pass], pair.y * weight[pass]);
      };
      StoreShared16(at + pass * kStep * 128,
                    {scaled(v[pass].x), scaled(v[pass].y), scaled(v[pass].z), scaled(v[pass].w)});
    }
    BulkFence();
    NamedBarrier(1 + wg_, kGroupThreads);
  }

  __device__ void Advance(int i, float decay) {
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
  __device__ void Keep(int i) {
    char* slot = SlotAt<kState>(states_.states, mma_, Chunk(i), unit_);
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
    float* slot = reinterpret_cast<float*>(SlotAt<kState>(states_.states, mma_, Chunk(0), unit_));
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

  const MmaSsd& mma_;
  const StridedRows<const Bf16>& keys_;
  const StridedRows<const Bf16>& values_;
  const CudaSsdStates& states_;
  char* const shared_;
  const uint32_t memory_;  // its address
  const int thread_, wg_;
  const ChunkRows super_;
  const int count_;  // chunks of the super
  int item_, group_, head_;
  int64_t first_chunk_, unit_;
  int64_t column_[kGroups];  // where the warpgroups' values begin
  bool stores_;              // false: a unit that another CTA's warpgroup has as well
  bool keeps_decays_;
  float log_decay_ = 0;  // of the super's chunks so far
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
  return LaunchSsd(SupersKernel<kState, kFlow, kMode>, grid, kSsdThreads, 0, stream, mma, states, initial,
                   summary);
}

template <Flow kFlow>
cudaError_t ChunkStates(const MmaSsd& mma, const StridedRows<const Bf16>& keys,
                        const StridedRows<const Bf16>& values, const CudaSsdStates& states,
                        const CudaSsdSummary& summary, cudaStream_t stream) {
  return VisitState(mma.ssd, [&]<int kState>() {
    const dim3 grid(
        static_cast<uint32_t>(mma.supers.chunks()),
        static_cast<uint32_t>(mma.ssd.batch * mma.ssd.groups * CeilDiv(mma.group_units(), kGroups)));
    const cudaError_t error = LaunchSsd(StatesKernel<kState, kFlow>, grid, kSsdThreads,
                                        StatesMemory<kState>::kBytes, stream, mma, keys, values, states);
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
  MmaSsd mma{.ssd = ssd, .supers = {}, .blocks = static_cast<int>(ssd.dim / kSsdColumns)};
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
