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
  static constexpr int kFactors = kThrough + 8 * kSsdMostHeads * 4;   // [2, heads]: of h, of G
  static constexpr int kBytes = kFactors + 2 * kSsdMostHeads * 4;
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
        shared_(SharedBase()),
        memory_(SharedAddress(shared_)),
        thread_(static_cast<int>(threadIdx.x)),
        wg_(Warpgroup()),
        row_(64 * wg_ + thread_ / 32 % 4 * 16 + thread_ % 32 / 4),
        chunk_(blockIdx.x),
        rows_(ChunkAt(mma.ssd.chunks, chunk_)),
        super_(SuperOf(mma, chunk_, rows_.segment)) {}

  __device__ void Run() {
    const CudaSsd<Bf16>& ssd = mma_.ssd;
    LoadRows<kState>(memory_ + Memory::kB, ssd.b, rows_, units_.item, units_.group * kState, thread_);
    LoadRows<kState>(memory_ + Memory::kFirstC, ssd.c, rows_, units_.item, units_.group * kState, thread_);
    CopyAsyncCommit();
    for (int i = thread_; i < (Memory::kFactors - Memory::kEnds) / 4; i += kSsdThreads) {
      Floats(Memory::kEnds)[i] = 0;
    }
    const int64_t head = units_.item * ssd.heads + units_.first_head;
    FillFactors<Flow::kForward>(mma_, states_.decays, chunk_, super_, head, units_.heads,
                                Floats(Memory::kFactors));
    FillFactors<Flow::kBackward>(mma_, states_.decays, chunk_, super_, head, units_.heads,
                                 Floats(Memory::kFactors) + kSsdMostHeads);
    FillGates(ssd, rows_, units_.item, units_.first_head, units_.heads, Floats(Memory::kSums),
              Floats(Memory::kDts));
    __syncthreads();
    StateLoad<kState> load;
    LoadFirst(0);
    load.StartSuper(GradientSource(0), thread_);
    CopyAsyncCommit();
    CopyAsyncWait<1>();
    BulkFence();
    __syncthreads();
    FillProducts();
    FirstPass(&load);
    float dc[kState / 8][4];
    BetweenPasses(&dc);
    SecondPass(&load, &dc);
    StoreKeys(out_.dc, partial_.dc, dc);
    __syncthreads();
    SumGates();
    __syncthreads();
    StoreGates();
  }

 private:
  using Memory = BackwardMemory<kState>;

  __device__ float* Floats(int offset) const { return reinterpret_cast<float*>(shared_ + offset); }
  __device__ int Head(int u) const { return mma_.blocks == 1 ? u : u / mma_.blocks; }
  // Row array of the unit's head.
  __device__ float* OfHead(int offset, int u) const { return Floats(offset) + Head(u) * kSsdRows; }
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
    const int thread = Again(thread_);
    return tile + ValueTile::LaneOffset(thread % 32, 64 * wg_ + thread / 32 % 4 * 16);
  }

  __device__ int64_t Unit(int u) const {
    return units_.item * mma_.ssd.heads * mma_.blocks + units_.first + u;
  }
  __device__ StateSource HiddenSource(int u) const {
    return StateOf<kState, Flow::kForward>(mma_, states_.states, chunk_, super_, Unit(u),
                                           Floats(Memory::kFactors)[Head(u)]);
  }
  __device__ StateSource GradientSource(int u) const {
    return StateOf<kState, Flow::kBackward>(mma_, gradients_.states, chunk_, super_, Unit(u),
                                            Floats(Memory::kFactors)[kSsdMostHeads + Head(u)]);
  }
  // All but what of their states passes through registers.
  __device__ void LoadFirst(int u) {
    const int thread = Again(thread_);
    LoadRows<kSsdColumns>(X(u), mma_.ssd.x, rows_, units_.item, Column(u), thread);
    LoadRows<kSsdColumns>(Dy(u), out_.dy, rows_, units_.item, Column(u), thread);
    StateLoad<kState>::StartCopy(Gradient(u), GradientSource(u), thread);
  }
  __device__ void LoadSecond(int u) {
    const int thread = Again(thread_);
    LoadRows<kSsdColumns>(SecondDy(u), out_.dy, rows_, units_.item, Column(u), thread);
    StateLoad<kState>::StartCopy(State(u), HiddenSource(u), thread);
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

  // load: the first unit's; the next one's is asked for where a unit's registers are free.
  __device__ void FirstPass(StateLoad<kState>* load) {
    for (int u = 0; u < units_.count; ++u) {
      __syncthreads();  // what the next stage held has been read, sums of columns are there
      if (u > 0) AddColumns(u - 1);
      if (u + 1 < units_.count) LoadFirst(u + 1);
      CopyAsyncCommit();
      CopyAsyncWait<1>();
      load->Finish(Gradient(u), Again(thread_));
      BulkFence();
      __syncthreads();
      InputGradient(u, load);
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

  __device__ void InputGradient(int u, StateLoad<kState>* load) {
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
    KeyGradient(u, rows);
    if (u + 1 < units_.count) load->StartSuper(GradientSource(u + 1), Again(thread_));
    GroupWait<1>();
    GroupUse(dx);
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
    uint32_t x[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) LoadMatrices(x[k], ValueTile::At(LaneAt(X(u)), 0, k));
    GroupWait<0>();
    GroupUse(dx);
    ScaleRows(dx, rows->to_end[0], rows->to_end[1]);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = UnpackBf16(x[k][i]);
        const float* d = dx[2 * k + i / 2] + i % 2 * 2;
        rows->through[i % 2] += pair.x * d[0] + pair.y * d[1];
      }
    }
    GroupUse(dx);
  }

  // dx += (S o L)^T dY of the columns t in block wg, or in the one after it, and dS^T of that block, 32
  // columns at a time: more would not leave registers for what is summed over units. Leaves the last product
  // with dY in flight.
  enum class Block { kDiagonal = 0, kLater = 1 };
  template <Block kBlock>
  __device__ void Inside(int u, const float* sums, RowPair* rows, float (&dx)[8][4]) {
    const int t = wg_ + static_cast<int>(kBlock);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      float product[4][4];  // X dY^T
      GroupFence();
#pragma unroll
      for (int k = 0; k < kSsdColumns / 16; ++k) {
        MultiplyShared<Major::kDepthInRow, Major::kDepthInRow>(
            product, OperandAt<kSsdRows>(X(u), 64 * wg_, 2 * k),
            OperandAt<kSsdRows>(Dy(u), 64 * t + 32 * part, 2 * k), k > 0);
      }
      GroupCommit();
      GroupWait<0>();
      GroupUse(product);
      uint32_t weights[2][4];
      float columns[8];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        WeighFragment<kBlock>(t, 4 * part + n, sums, product[n], rows, weights[n / 2] + n % 2 * 2,
                              columns + 2 * n);
      }
      GroupUse(dx);
      GroupFence();
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        MultiplyRegisters<Major::kDepthAcrossRows>(
            dx, weights[k], OperandAt<kSsdRows>(Dy(u), 64 * t + 32 * part + 16 * k, 0), 1);
      }
      GroupCommit();
      StoreColumns(u, 64 * t + 32 * part, columns);
    }
  }

  // Fragment n of block t, rows of s and columns of t: from gradients X dY^T to the weights of dY, dS^T and
  // energies. In the diagonal block a warp's fragments lie before its rows, on the diagonal or past it.
  template <Block kBlock>
  __device__ void WeighFragment(int t, int n, const float* sums, const float (&gradients)[4], RowPair* rows,
                                uint32_t* weights, float* columns) {
    columns[0] = columns[1] = 0;
    const int past = n / 2 - thread_ / 32 % 4;
    if (kBlock == Block::kDiagonal && past < 0) {
      weights[0] = weights[1] = 0;
      return;
    }
    const int column = 64 * t + 8 * n + thread_ % 4 * 2;
    const float2 to = *reinterpret_cast<const float2*>(sums + column);
    const float4 own = *Product(t, n);
    const float s[4] = {own.x, own.y, own.z, own.w};
    float decay[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) decay[i] = Exp2((i % 2 == 0 ? to.x : to.y) - rows->sum[i / 2]);
    if (kBlock == Block::kDiagonal && past == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int later = column + i % 2 - (row_ + 8 * (i / 2));
        if (later < 0) decay[i] = 0;
        if (later == 0) rows->skip += gradients[i];
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float weight[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float gradient = gradients[2 * half + i];
        weight[i] = s[2 * half + i] * decay[2 * half + i];
        const float energy = gradient * weight[i];
        rows->energy[half] += energy;
        columns[i] = fmaf(energy, rows->dt[half], columns[i]);
        float& ds = ds_[static_cast<int>(kBlock)][n][2 * half + i];
        ds = fmaf(gradient, decay[2 * half + i] * rows->dt[half], ds);
      }
      weights[half] = PackBf16(weight[0], weight[1]);
    }
  }

  // Sums over the warp's rows of columns [t, t + 32): each lane ends with one of them.
  template <int kKept>
  __device__ static void HalveColumns(bool upper, int other, float (&columns)[8]) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const float sent = upper ? columns[i] : columns[i + kKept];
      const float own = upper ? columns[i + kKept] : columns[i];
      columns[i] = own + __shfl_xor_sync(~0u, sent, other);
    }
  }
  __device__ void StoreColumns(int u, int t, float (&columns)[8]) {
    const int lane = Again(thread_) % 32;
    HalveColumns<4>(lane & 16, 16, columns);
    HalveColumns<2>(lane & 8, 8, columns);
    HalveColumns<1>(lane & 4, 4, columns);
    const int n = (lane >> 4 & 1) * 2 + (lane >> 3 & 1);
    Floats(Memory::kWarpColumns)[(u % 2 * 8 + thread_ / 32) * kSsdRows + t + 8 * n + lane % 4 * 2 +
                                 (lane >> 2 & 1)] = columns[0];
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
      const float skip = mma_.ssd.skip[units_.first_head + Head(u)];
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
    const int own = Again(row_);
    StoreFragment(dx, [&](int half) -> Bf16* {
      const int64_t row = rows_.begin + own + 8 * half;
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
      Floats(Memory::kSkips)[thread_ / 32 * kSsdMostHeads + Head(u)] += skip;
    }
  }

  // dB += dS^T C, done; dC = dS B.
  __device__ void BetweenPasses(float (*dc)[kState / 8][4]) {
    const uint32_t tile = memory_ + Memory::kProducts;  // [s, t]
    LoadRows<kState>(memory_ + Memory::kC, mma_.ssd.c, rows_, units_.item, units_.group * kState, thread_);
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

  __device__ void SecondPass(StateLoad<kState>* load, float (*dc)[kState / 8][4]) {
    LoadSecond(0);
    load->StartSuper(HiddenSource(0), thread_);
    CopyAsyncCommit();
    for (int u = 0; u < units_.count; ++u) {
      __syncthreads();  // what the next stage held has been read
      if (u + 1 < units_.count) LoadSecond(u + 1);
      CopyAsyncCommit();
      ThroughChunk(u);
      CopyAsyncWait<1>();
      load->Finish(State(u), Again(thread_));
      BulkFence();
      __syncthreads();
      if (u + 1 < units_.count) load->StartSuper(HiddenSource(u + 1), Again(thread_));
      QueryGradient(u, dc);
    }
  }

  // <G, h_in>, where the state before the chunk reaches the one after it.
  __device__ void ThroughChunk(int u) {
    if (Exp2(OfHead(Memory::kSums, u)[kSsdRows - 1]) <= kNegligible) return;
    const StateSource h = HiddenSource(u), g = GradientSource(u);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < StateLoad<kState>::kChunks; ++i) {
      const int at = StateLoad<kState>::Offset(i, thread_);
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
      Floats(Memory::kThrough)[thread_ / 32 * kSsdMostHeads + Head(u)] += sum;
    }
  }
  __device__ static uint4 LoadOrZero(const char* slot, int at) {
    return slot != nullptr ? __ldcg(reinterpret_cast<const uint4*>(slot + at)) : uint4{0, 0, 0, 0};
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

  // da in the place of `starts`, and the chunk's part of dskip. A warp takes a head, a lane four rows.
  __device__ void SumGates() {
    const CudaSsd<Bf16>& ssd = mma_.ssd;
    const int lane = thread_ % 32;
    for (int h = thread_ / 32; h < units_.heads; h += kSsdThreads / 32) {
      float through = 0, skip = 0;
      for (int warp = 0; warp < 8; ++warp) {
        through += Floats(Memory::kThrough)[warp * kSsdMostHeads + h];
        skip += Floats(Memory::kSkips)[warp * kSsdMostHeads + h];
      }
      through *= Exp2(Floats(Memory::kSums)[h * kSsdRows + kSsdRows - 1]);
      if (dskip_ != nullptr && lane == 0) {
        dskip_[(chunk_ * ssd.batch + units_.item) * ssd.heads + units_.first_head + h] = skip;
      }
      float before[4], later[4], sum_before = 0, sum_later = 0;
      float* starts = Floats(Memory::kStarts) + h * kSsdRows + lane * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = h * kSsdRows + lane * 4 + i;
        before[i] = sum_before;
        sum_before += Floats(Memory::kDts)[at] * Floats(Memory::kEnds)[at] - Floats(Memory::kColumns)[at];
      }
#pragma unroll
      for (int i = 3; i >= 0; --i) {
        sum_later += starts[i];
        later[i] = sum_later;
      }
      const float of_before = WarpPrefixSum(sum_before) - sum_before;
      const float of_later = WarpSuffixSum(sum_later) - sum_later;
#pragma unroll
      for (int i = 0; i < 4; ++i) starts[i] = through + (of_before + before[i]) + (of_later + later[i]);
    }
  }
  // Heads of a row lie side by side.
  __device__ void StoreGates() {
    const CudaSsd<Bf16>& ssd = mma_.ssd;
    const int count = static_cast<int>(rows_.end - rows_.begin) * units_.heads;
    for (int i = thread_; i < count; i += kSsdThreads) {
      const int row = i / units_.heads, h = i % units_.heads;
      const int64_t token = (rows_.begin + row) * ssd.batch + units_.item;
      const int64_t gate = token * ssd.heads + units_.first_head + h;
      out_.da[gate] = ssd.ages[token] == 0 ? 0 : Floats(Memory::kStarts)[h * kSsdRows + row];
      if (out_.ddt != nullptr) out_.ddt[gate] = Floats(Memory::kEnds)[h * kSsdRows + row];
    }
  }

  const MmaSsd& mma_;
  const CudaSsdStates& states_;
  const CudaSsdStates& gradients_;
  const CudaSsdGradients<Bf16>& out_;
  const PartialGradients& partial_;
  float* const dskip_;
  const GroupUnits units_;
  char* const shared_;
  const uint32_t memory_;  // its address
  const int thread_, wg_;
  const int row_;  // of the chunk: this lane's are row and row + 8
  const int64_t chunk_;
  const ChunkRows rows_;
  const SuperChunks super_;
  float ds_[2][8][4] = {};  // dS^T of blocks wg and, of group 0, wg + 1
  float db_[kState / 8][4] = {};
};

}  // namespace annulus::kernels
