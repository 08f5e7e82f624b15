#pragma once

// Gradients on tensor cores. A CTA takes a chunk and some heads of one group, warpgroup w rows
// [64 w, 64 w + 64). With S = C B^T, L the decays between rows, to_end and from_start those to and from the
// states around the chunk, G the gradient of the state after it:
//
//   first, for each unit     dx~ = to_end (B G) + (S o L)^T dY      dx = dt dx~ + skip dY
//   (rows s of X)            dS^T += (X dY^T) o L^T dt              dB += (to_end dt X) G^T
//   then once                dB += dS^T C                           dC = dS B
//   then, for each unit      dC += from_start (dY h_in^T)
//   (rows t of dY)
//
// The second pass over dY finds most of it in L2. Everything that is summed over units stays in registers:
// dS^T 64, dB 64, later dC 64 of them.
//
// Decays. a_s takes part in what reaches row t >= s from u < s, in what row t >= s gets from the state
// before, in what the state after gets from u < s, and in what goes from state to state. With the energies
// E_ts = dY_t.X_s (S o L)_ts, r_t = sum over s of E_ts dt_s, c_s = dt_s sum over t of E_ts:
//
//   da_s = decay <G, h_in> + sum over t >= s of from_start_t dY_t.(h_in^T C_t)
//        + sum over u < s of (dt_u to_end_u X_u.(B G)_u + c_u - r_u)         ddt_s = X_s.dx~_s
//
// None of these is a small difference of large sums but c - r, whose terms are the same numbers in f32.

#include "kernels/ssd/ssd_mma.cuh"

namespace annulus::kernels {

// Where the gradients of parts of a group go until they are added: [parts, rows, batch, groups, state] f32.
struct PartialGradients {
  int parts = 1;  // 1: written at once
  float* db = nullptr;
  float* dc = nullptr;
};

// Bytes of shared memory.
//   b | stages of the first pass: x, dy, G | products | gates and sums of rows
//       c until products are there (second stage); later c, then stages of the second pass: dy, h
//                                        later dS^T
template <int kState>
struct BackwardMemory {
  static constexpr int kKeys = KeyTile<kState>::kBytes, kValues = ValueTile::kBytes;
  static constexpr int kStateBytes = StateTile<kState>::kBytes;
  static constexpr int kStage = 2 * kValues + kStateBytes;
  static constexpr int kB = 0;
  static constexpr int kStages = kB + kKeys;
  static constexpr int kFirstC = kStages + kStage;
  static constexpr int kC = kStages;
  static constexpr int kSecondStage = kValues + kStateBytes;
  static constexpr int kSecondStages = kC + kKeys;
  static constexpr int kProducts = kStages + 2 * kStage;
  static constexpr int kProductBlock = 64 * 64 * 4;
  static constexpr int kRowFloats = kProducts + 3 * kProductBlock;
  static constexpr int kArray = kSsdMostHeads * kSsdRows * 4;  // [heads, rows]
  static constexpr int kSums = kRowFloats;
  static constexpr int kDts = kSums + kArray;
  static constexpr int kEnds = kDts + kArray;                         // ddt
  static constexpr int kStarts = kEnds + kArray;                      // what rows get from the state before
  static constexpr int kColumns = kStarts + kArray;                   // r
  static constexpr int kWarpColumns = kColumns + kArray;              // [2, 8 warps, rows]
  static constexpr int kSkips = kWarpColumns + 2 * 8 * kSsdRows * 4;  // [8 warps, heads]
  static constexpr int kThrough = kSkips + 8 * kSsdMostHeads * 4;     // [8 warps, heads]
  static constexpr int kBytes = kThrough + 8 * kSsdMostHeads * 4;
  static_assert(kFirstC + kKeys <= kProducts && kSecondStages + 2 * kSecondStage <= kProducts);
  static_assert(KeyTile<128>::kBytes <= 3 * kProductBlock && kBytes + kSharedSlack <= 227 * 1024);
};

template <int kState>
class BackwardCta {
 public:
  __device__ BackwardCta(const MmaSsd& mma, const CudaSsdStates& states, const CudaSsdStates& gradients,
                         const CudaSsdGradients<Bf16>& out, const PartialGradients& partial, float* dskip)
      : mma_(mma),
        states_(states),
        gradients_(gradients),
        out_(out),
        partial_(partial),
        dskip_(dskip),
        units_(mma, blockIdx.y, partial.parts),
        memory_(SharedBase()),
        thread_(static_cast<int>(threadIdx.x)),
        wg_(Warpgroup()),
        row_(64 * wg_ + thread_ / 32 % 4 * 16 + thread_ % 32 / 4),
        chunk_(blockIdx.x),
        rows_(ChunkAt(mma.ssd.chunks, chunk_)),
        super_(SuperOf(mma, chunk_, rows_.segment)) {}

  __device__ void Run() {
    const CudaSsd<Bf16>& ssd = mma_.ssd;
    LoadRows<kState>(memory_ + Memory::kB, ssd.b, rows_, units_.item, units_.group * kState);
    LoadRows<kState>(memory_ + Memory::kFirstC, ssd.c, rows_, units_.item, units_.group * kState);
    CopyAsyncCommit();
    StateLoad<kState> gradient;
    LoadFirst(0, &gradient);
    CopyAsyncCommit();
    FillGates(ssd, rows_, units_.item, units_.first_head, units_.heads, Floats(Memory::kSums),
              Floats(Memory::kDts));
    for (int i = thread_; i < (Memory::kBytes - Memory::kEnds) / 4; i += kSsdThreads) {
      Floats(Memory::kEnds)[i] = 0;
    }
    CopyAsyncWait<1>();
    BulkFence();
    __syncthreads();
    FillProducts();
    FirstPass(&gradient);
    float dc[kState / 8][4];
    BetweenPasses(&dc);
    SecondPass(&dc);
    StoreKeys(out_.dc, partial_.dc, dc);
    __syncthreads();
    StoreGates();
  }

 private:
  using Memory = BackwardMemory<kState>;

  __device__ float* Floats(int offset) const { return SharedFloats(memory_ + static_cast<uint32_t>(offset)); }
  // Row array of the unit's head.
  __device__ float* OfHead(int offset, int u) const {
    return Floats(offset) + static_cast<int>(u / mma_.blocks) * kSsdRows;
  }
  __device__ int64_t Unit(int u) const {
    return units_.item * mma_.ssd.heads * mma_.blocks + units_.first + u;
  }
  __device__ int64_t Column(int u) const { return (units_.first + u) * kSsdColumns; }
  __device__ uint32_t X(int u) const {
    return memory_ + Memory::kStages + static_cast<uint32_t>(u % 2) * Memory::kStage;
  }
  __device__ uint32_t Dy(int u) const { return X(u) + Memory::kValues; }
  __device__ uint32_t Gradient(int u) const { return Dy(u) + Memory::kValues; }
  __device__ uint32_t SecondDy(int u) const {
    return memory_ + Memory::kSecondStages + static_cast<uint32_t>(u % 2) * Memory::kSecondStage;
  }
  __device__ uint32_t State(int u) const { return SecondDy(u) + Memory::kValues; }
  // What this lane passes to ldmatrix for its warp's rows of a tile.
  __device__ uint32_t LaneAt(uint32_t tile) const {
    return tile + ValueTile::LaneOffset(thread_ % 32, row_ - thread_ % 32 / 4);
  }

  __device__ void LoadFirst(int u, StateLoad<kState>* gradient) {
    LoadRows<kSsdColumns>(X(u), mma_.ssd.x, rows_, units_.item, Column(u));
    LoadRows<kSsdColumns>(Dy(u), out_.dy, rows_, units_.item, Column(u));
    gradient->Start(Gradient(u), BackwardState<kState>(mma_, gradients_, chunk_, super_, Unit(u)));
  }
  __device__ void LoadSecond(int u, StateLoad<kState>* state) {
    LoadRows<kSsdColumns>(SecondDy(u), out_.dy, rows_, units_.item, Column(u));
    state->Start(State(u), ForwardState<kState>(mma_, states_, chunk_, super_, Unit(u)));
  }

  // Element n of this thread's fragments of S^T, rows s of this group, columns t of block t: [64 s, 64 t].
  __device__ float4* Product(int t, int n) const {
    return reinterpret_cast<float4*>(Floats(Memory::kProducts + (wg_ + t) * Memory::kProductBlock)) +
           n * 128 + thread_ % 128;
  }
  __device__ void FillProducts() {
    for (int t = wg_; t < 2; ++t) {
      float product[8][4];
      GroupFence();
#pragma unroll
      for (int k = 0; k < kState / 16; ++k) {
        MultiplyShared<Major::kDepthInRow, Major::kDepthInRow>(
            product, OperandAt<kSsdRows>(memory_ + Memory::kB, 64 * wg_, 2 * k),
            OperandAt<kSsdRows>(memory_ + Memory::kFirstC, 64 * t, 2 * k), k > 0);
      }
      GroupCommit();
      GroupWait<0>();
      GroupUse(product);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        *Product(t, n) = {product[n][0], product[n][1], product[n][2], product[n][3]};
      }
    }
  }

  __device__ void FirstPass(StateLoad<kState>* gradient) {
    for (int u = 0; u < units_.count; ++u) {
      __syncthreads();  // what the next stage held has been read, sums of columns are there
      if (u > 0) AddColumns(u - 1);
      StateLoad<kState> next;
      if (u + 1 < units_.count) LoadFirst(u + 1, &next);
      CopyAsyncCommit();
      CopyAsyncWait<1>();
      gradient->Finish(Gradient(u));
      BulkFence();
      __syncthreads();
      InputGradient(u);
      *gradient = next;
    }
    __syncthreads();
    AddColumns(units_.count - 1);
  }

  // The sums of columns that the warps left, by the group that has less to do.
  __device__ void AddColumns(int u) {
    if (wg_ == 0) return;
    const int t = thread_ % 128;
    const float* columns = Floats(Memory::kWarpColumns) + u % 2 * 8 * kSsdRows + t;
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < 8; ++warp) {
      if (warp < 4 || t >= 64) sum += columns[warp * kSsdRows];
    }
    OfHead(Memory::kColumns, u)[t] += sum;
  }

  // What this lane's two rows, s and s + 8, bring along and gather.
  struct RowPair {
    float sum[2], dt[2], to_end[2];
    float energy[2] = {0, 0}, through[2] = {0, 0};
    float skip = 0;
  };

  __device__ void InputGradient(int u) {
    const float* sums = OfHead(Memory::kSums, u);
    const float* dts = OfHead(Memory::kDts, u);
    RowPair rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows.sum[half] = sums[row_ + 8 * half];
      rows.dt[half] = dts[row_ + 8 * half];
      rows.to_end[half] = Exp2(sums[kSsdRows - 1] - rows.sum[half]);
    }
    float dx[8][4];
    ThroughEnd(u, &rows, dx);
    Inside<Block::kDiagonal>(u, sums, &rows, dx);
    if (wg_ == 0) Inside<Block::kLater>(u, sums, &rows, dx);
    GroupWait<0>();
    GroupUse(dx);
    KeyGradient(u, rows);
    StoreInputGradient(u, rows, dx);
    GatherRows(u, &rows);
    GroupWait<0>();
    GroupUse(db_);
  }

  // dx = to_end (B G)
  __device__ void ThroughEnd(int u, RowPair* rows, float (&dx)[8][4]) {
    GroupFence();
#pragma unroll
    for (int k = 0; k < kState / 16; ++k) {
      MultiplyShared<Major::kDepthInRow, Major::kDepthAcrossRows>(
          dx, OperandAt<kSsdRows>(memory_ + Memory::kB, 64 * wg_, 2 * k),
          OperandAt<kState>(Gradient(u), 16 * k, 0), k > 0);
    }
    GroupCommit();
    GroupWait<0>();
    GroupUse(dx);
    ScaleRows(dx, rows->to_end[0], rows->to_end[1]);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t x[4];
      LoadMatrices(x, ValueTile::At(LaneAt(X(u)), 0, k));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = UnpackBf16(x[i]);
        const float* d = dx[2 * k + i / 2] + i % 2 * 2;
        rows->through[i % 2] += pair.x * d[0] + pair.y * d[1];
      }
    }
    GroupUse(dx);
  }

  // dx += (S o L)^T dY of the columns t in block wg, or in the one after it, and dS^T of that block. Leaves
  // the product with dY in flight.
  enum class Block { kDiagonal = 0, kLater = 1 };
  template <Block kBlock>
  __device__ void Inside(int u, const float* sums, RowPair* rows, float (&dx)[8][4]) {
    const int t = wg_ + static_cast<int>(kBlock);
    float product[8][4];  // X dY^T
    GroupFence();
#pragma unroll
    for (int k = 0; k < kSsdColumns / 16; ++k) {
      MultiplyShared<Major::kDepthInRow, Major::kDepthInRow>(
          product, OperandAt<kSsdRows>(X(u), 64 * wg_, 2 * k), OperandAt<kSsdRows>(Dy(u), 64 * t, 2 * k),
          k > 0);
    }
    GroupCommit();
    GroupWait<0>();
    GroupUse(product);
    uint32_t weights[4][4];
    float columns[16];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int column = 64 * t + 8 * n + thread_ % 4 * 2;
      const float2 to = *reinterpret_cast<const float2*>(sums + column);
      const float4 own = *Product(t, n);
      const float s[4] = {own.x, own.y, own.z, own.w};
      columns[2 * n] = columns[2 * n + 1] = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_ + 8 * half;
        float weight[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float decay = Exp2((i == 0 ? to.x : to.y) - rows->sum[half]);
          const float gradient = product[n][2 * half + i];
          if (kBlock == Block::kDiagonal) {
            if (column + i < row) decay = 0;
            if (column + i == row) rows->skip += gradient;
          }
          weight[i] = s[2 * half + i] * decay;
          const float energy = gradient * weight[i];
          rows->energy[half] += energy;
          columns[2 * n + i] = fmaf(energy, rows->dt[half], columns[2 * n + i]);
          float& ds = ds_[static_cast<int>(kBlock)][n][2 * half + i];
          ds = fmaf(gradient, decay * rows->dt[half], ds);
        }
        weights[n / 2][n % 2 * 2 + half] = PackBf16(weight[0], weight[1]);
      }
    }
    GroupFence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      MultiplyRegisters<Major::kDepthAcrossRows>(dx, weights[k],
                                                 OperandAt<kSsdRows>(Dy(u), 64 * t + 16 * k, 0), 1);
    }
    GroupCommit();
    StoreColumns(u, t, columns);
  }

  // Sums over the warp's rows: each lane ends with the columns of one of the eight fragments.
  __device__ void StoreColumns(int u, int t, float (&columns)[16]) {
    const int lane = thread_ % 32;
#pragma unroll
    for (int level = 0; level < 3; ++level) {
      const int kept = 8 >> level;
      const bool upper = lane & (16 >> level);
#pragma unroll
      for (int i = 0; i < kept; ++i) {
        const float sent = upper ? columns[i] : columns[i + kept];
        const float own = upper ? columns[i + kept] : columns[i];
        columns[i] = own + __shfl_xor_sync(~0u, sent, 16 >> level);
      }
    }
    const int n = (lane >> 4 & 1) * 4 + (lane >> 3 & 1) * 2 + (lane >> 2 & 1);
    float* to =
        Floats(Memory::kWarpColumns) + (u % 2 * 8 + thread_ / 32) * kSsdRows + 64 * t + 8 * n + lane % 4 * 2;
    *reinterpret_cast<float2*>(to) = {columns[0], columns[1]};
  }

  // dB += (to_end dt X) G^T, left in flight.
  __device__ void KeyGradient(int u, const RowPair& rows) {
    uint32_t x[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      LoadMatrices(x[k], ValueTile::At(LaneAt(X(u)), 0, k));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = UnpackBf16(x[k][i]);
        const float factor = rows.to_end[i % 2] * rows.dt[i % 2];
        x[k][i] = PackBf16(pair.x * factor, pair.y * factor);
      }
    }
    GroupUse(db_);
    GroupFence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      MultiplyRegisters<Major::kDepthInRow>(db_, x[k], OperandAt<kState>(Gradient(u), 0, 2 * k), 1);
    }
    GroupCommit();
  }

  __device__ void StoreInputGradient(int u, const RowPair& rows, float (&dx)[8][4]) {
    ScaleRows(dx, rows.dt[0], rows.dt[1]);
    if (mma_.ssd.skip != nullptr) {
      const float skip = mma_.ssd.skip[units_.first_head + u / mma_.blocks];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t dy[4];
        LoadMatrices(dy, ValueTile::At(LaneAt(Dy(u)), 0, k));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 pair = UnpackBf16(dy[i]);
          float* to = dx[2 * k + i / 2] + i % 2 * 2;
          to[0] = fmaf(skip, pair.x, to[0]);
          to[1] = fmaf(skip, pair.y, to[1]);
        }
      }
    }
    StoreFragment(dx, [&](int half) -> Bf16* {
      const int64_t row = rows_.begin + row_ + 8 * half;
      if (row >= rows_.end) return nullptr;
      return out_.dx.data + row * out_.dx.row_stride + units_.item * out_.dx.batch_stride + Column(u);
    });
  }

  // The rows' ddt, and the warp's part of dskip. Each element belongs to one lane.
  __device__ void GatherRows(int u, RowPair* rows) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float ddt = rows->energy[half] + rows->through[half];
      ddt += __shfl_xor_sync(~0u, ddt, 1);
      ddt += __shfl_xor_sync(~0u, ddt, 2);
      if (thread_ % 4 == 0) OfHead(Memory::kEnds, u)[row_ + 8 * half] += ddt;
    }
    const float skip = WarpSum(rows->skip);
    if (thread_ % 32 == 0) {
      Floats(Memory::kSkips)[thread_ / 32 * kSsdMostHeads + static_cast<int>(u / mma_.blocks)] += skip;
    }
  }

  // dB += dS^T C, done; dC = dS B.
  __device__ void BetweenPasses(float (*dc)[kState / 8][4]) {
    const uint32_t tile = memory_ + Memory::kProducts;  // [s, t]
    LoadRows<kState>(memory_ + Memory::kC, mma_.ssd.c, rows_, units_.item, units_.group * kState);
    CopyAsyncCommit();
    uint32_t ds[2][4][4];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t pair = PackBf16(ds_[t][n][2 * half], ds_[t][n][2 * half + 1]);
          ds[t][n / 2][n % 2 * 2 + half] = pair;
          if (t > 0 && wg_ > 0) continue;
          const int at = KeyTile<128>::Offset(row_ + 8 * half, 8 * (wg_ + t) + n);
          StoreShared(tile + static_cast<uint32_t>(at + thread_ % 4 * 4), pair);
        }
      }
    }
    CopyAsyncWait<0>();
    BulkFence();
    __syncthreads();
    AddQueries(ds[0], 64 * wg_);
    if (wg_ == 0) AddQueries(ds[1], 64);
    AddKeys(tile, 0, dc);
    if (wg_ == 1) AddKeys(tile, 64, dc);
    GroupWait<0>();
    GroupUse(db_);
    GroupUse(*dc);
    StoreKeys(out_.db, partial_.db, db_);
  }

  // dB += dS^T C over rows [t, t + 64) of C, left in flight.
  __device__ void AddQueries(const uint32_t (&ds)[4][4], int t) {
    GroupUse(db_);
    GroupFence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      MultiplyRegisters<Major::kDepthAcrossRows>(db_, ds[k],
                                                 OperandAt<kSsdRows>(memory_ + Memory::kC, t + 16 * k, 0), 1);
    }
    GroupCommit();
  }
  // dC (=, +=) dS B over rows [s, s + 64) of B, left in flight.   tile: dS^T
  __device__ void AddKeys(uint32_t tile, int s, float (*dc)[kState / 8][4]) {
    GroupFence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      MultiplyShared<Major::kDepthAcrossRows, Major::kDepthAcrossRows>(
          *dc, OperandAt<kSsdRows>(tile, s + 16 * k, 8 * wg_),
          OperandAt<kSsdRows>(memory_ + Memory::kB, s + 16 * k, 0), s > 0 || k > 0);
    }
    GroupCommit();
  }

  __device__ void SecondPass(float (*dc)[kState / 8][4]) {
    StateLoad<kState> state;
    LoadSecond(0, &state);
    CopyAsyncCommit();
    for (int u = 0; u < units_.count; ++u) {
      __syncthreads();  // what the next stage held has been read
      StateLoad<kState> next;
      if (u + 1 < units_.count) LoadSecond(u + 1, &next);
      CopyAsyncCommit();
      ThroughChunk(u);
      CopyAsyncWait<1>();
      state.Finish(State(u));
      BulkFence();
      __syncthreads();
      QueryGradient(u, dc);
      state = next;
    }
  }

  // <G, h_in>, where the state before the chunk reaches the one after it.
  __device__ void ThroughChunk(int u) {
    if (Exp2(OfHead(Memory::kSums, u)[kSsdRows - 1]) <= kNegligible) return;
    const StateSource h = ForwardState<kState>(mma_, states_, chunk_, super_, Unit(u));
    const StateSource g = BackwardState<kState>(mma_, gradients_, chunk_, super_, Unit(u));
    float sum = 0;
#pragma unroll
    for (int i = 0; i < StateLoad<kState>::kChunks; ++i) {
      const int64_t at = StateLoad<kState>::Offset(i);
      const uint4 h_own = LoadOrZero(h.own, at), h_super = LoadOrZero(h.super, at);
      const uint4 g_own = LoadOrZero(g.own, at), g_super = LoadOrZero(g.super, at);
      const auto dot = [&](uint32_t h0, uint32_t h1, uint32_t g0, uint32_t g1) {
        const float2 a = Combine(h0, h.factor, h1), b = Combine(g0, g.factor, g1);
        return a.x * b.x + a.y * b.y;
      };
      sum += dot(h_own.x, h_super.x, g_own.x, g_super.x) + dot(h_own.y, h_super.y, g_own.y, g_super.y) +
             dot(h_own.z, h_super.z, g_own.z, g_super.z) + dot(h_own.w, h_super.w, g_own.w, g_super.w);
    }
    sum = WarpSum(sum);
    if (thread_ % 32 == 0) {
      Floats(Memory::kThrough)[thread_ / 32 * kSsdMostHeads + static_cast<int>(u / mma_.blocks)] += sum;
    }
  }
  __device__ static uint4 LoadOrZero(const char* slot, int64_t at) {
    return slot != nullptr ? *reinterpret_cast<const uint4*>(slot + at) : uint4{0, 0, 0, 0};
  }

  // dC += from_start (dY h_in^T)
  __device__ void QueryGradient(int u, float (*dc)[kState / 8][4]) {
    const float* sums = OfHead(Memory::kSums, u);
    const float from_start[2] = {Exp2(sums[row_]), Exp2(sums[row_ + 8])};
    const uint32_t c_at =
        memory_ + Memory::kC + KeyTile<kState>::LaneOffset(thread_ % 32, row_ - thread_ % 32 / 4);
    float gathered[2] = {0, 0};
#pragma unroll
    for (int block = 0; block < kState / 64; ++block) {
      float product[8][4];
      GroupFence();
#pragma unroll
      for (int k = 0; k < kSsdColumns / 16; ++k) {
        MultiplyShared<Major::kDepthInRow, Major::kDepthInRow>(
            product, OperandAt<kSsdRows>(SecondDy(u), 64 * wg_, 2 * k),
            OperandAt<kState>(State(u), 64 * block, 2 * k), k > 0);
      }
      GroupCommit();
      GroupWait<0>();
      GroupUse(product);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t c[4];
        LoadMatrices(c, KeyTile<kState>::At(c_at, 0, 4 * block + k));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = 2 * k + i / 2, half = i % 2;
          const float2 pair = UnpackBf16(c[i]);
          const float* p = product[n] + 2 * half;
          float* to = (*dc)[8 * block + n] + 2 * half;
          gathered[half] += pair.x * p[0] + pair.y * p[1];
          to[0] = fmaf(from_start[half], p[0], to[0]);
          to[1] = fmaf(from_start[half], p[1], to[1]);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = gathered[half] * from_start[half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (thread_ % 4 == 0) OfHead(Memory::kStarts, u)[row_ + 8 * half] += sum;
    }
  }

  // Rows of db or dc.
  __device__ void StoreKeys(const StridedRows<Bf16>& to, float* partial,
                            const float (&value)[kState / 8][4]) {
    if (partial_.parts == 1) {
      StoreFragment(value, [&](int half) -> Bf16* {
        const int64_t row = rows_.begin + row_ + 8 * half;
        if (row >= rows_.end) return nullptr;
        return to.data + row * to.row_stride + units_.item * to.batch_stride + units_.group * kState;
      });
      return;
    }
    const CudaSsd<Bf16>& ssd = mma_.ssd;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = rows_.begin + row_ + 8 * half;
      if (row >= rows_.end) continue;
      const int64_t key =
          ((units_.part * ssd.rows + row) * ssd.batch + units_.item) * ssd.groups + units_.group;
#pragma unroll
      for (int n = 0; n < kState / 8; ++n) {
        *reinterpret_cast<float2*>(partial + key * kState + 8 * n + thread_ % 4 * 2) = {
            value[n][2 * half], value[n][2 * half + 1]};
      }
    }
  }

  // ddt, da and the chunk's part of dskip; a warp takes a head, a lane four rows.
  __device__ void StoreGates() {
    const CudaSsd<Bf16>& ssd = mma_.ssd;
    const int lane = thread_ % 32;
    for (int h = thread_ / 32; h < units_.heads; h += kSsdThreads / 32) {
      float through = 0, skip = 0;
      for (int warp = 0; warp < 8; ++warp) {
        through += Floats(Memory::kThrough)[warp * kSsdMostHeads + h];
        skip += Floats(Memory::kSkips)[warp * kSsdMostHeads + h];
      }
      through *= Exp2(Floats(Memory::kSums)[h * kSsdRows + kSsdRows - 1]);
      const int64_t head = units_.first_head + h;
      if (dskip_ != nullptr && lane == 0) {
        dskip_[(chunk_ * ssd.batch + units_.item) * ssd.heads + head] = skip;
      }
      float before[4], later[4], ddt[4], sum_before = 0, sum_later = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = h * kSsdRows + lane * 4 + i;
        ddt[i] = Floats(Memory::kEnds)[at];
        before[i] = sum_before;
        sum_before += Floats(Memory::kDts)[at] * ddt[i] - Floats(Memory::kColumns)[at];
      }
#pragma unroll
      for (int i = 3; i >= 0; --i) {
        sum_later += Floats(Memory::kStarts)[h * kSsdRows + lane * 4 + i];
        later[i] = sum_later;
      }
      const float of_before = WarpPrefixSum(sum_before) - sum_before;
      const float of_later = WarpSuffixSum(sum_later) - sum_later;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = rows_.begin + lane * 4 + i, token = row * ssd.batch + units_.item;
        if (row >= rows_.end) continue;
        const float da = through + (of_before + before[i]) + (of_later + later[i]);
        out_.da[token * ssd.heads + head] = ssd.ages[token] == 0 ? 0 : da;
        if (out_.ddt != nullptr) out_.ddt[token * ssd.heads + head] = ddt[i];
      }
    }
  }

  const MmaSsd& mma_;
  const CudaSsdStates& states_;
  const CudaSsdStates& gradients_;
  const CudaSsdGradients<Bf16>& out_;
  const PartialGradients& partial_;
  float* const dskip_;
  const GroupUnits units_;
  const uint32_t memory_;
  const int thread_, wg_, row_;
  const int64_t chunk_;
  const ChunkRows rows_;
  const SuperChunks super_;
  float ds_[2][8][4] = {};  // dS^T of blocks wg and, of group 0, wg + 1
  float db_[kState / 8][4] = {};
};

}  // namespace annulus::kernels
