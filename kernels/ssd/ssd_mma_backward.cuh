#pragma once

// Gradients on tensor cores. A CTA takes a chunk and some heads of one group. With S = C B^T, L the decays
// between rows, to_end and from_start those to and from the states around the chunk, G the gradient of the
// state after it:
//
//   first, for each unit     dx~ = to_end (B G) + (S o L)^T dY      dx = dt dx~ + skip dY
//   (rows s of X)            dS^T += (X dY^T) o L^T dt              dB += (to_end dt X) G^T
//   then once                dB += dS^T C                           dC = dS B
//   then, for each unit      dC += from_start (dY h_in^T)
//   (rows t of dY)
//
// In the first pass a pair of warpgroups takes what happens inside the chunk, keeps dS^T and hands its part
// of dx~ over through shared memory; the other brings the tiles, takes what goes through the state, keeps dB
// and writes dx, while the first is at the next unit. The second pass takes the units backward, so that it
// finds the last of them in L2; while a unit's product is added, the next one's is on its way and the two
// units after it are copied. Warpgroup w of pair p keeps rows [64 w, 64 w + 64) and half p of the columns of
// dC. That leaves each thread the 128 registers with which four warpgroups fit. Loops must not spill any:
// shared memory leaves 28 KB of L1 to 512 threads, so that what is spilled comes from L2. One CTA
// fills an SM: nothing covers its waits at the start, between the passes and at the end.
//
// In the first pass rows are folded (ssd_mma.cuh), those of the tiles of X, B and dS^T too: row s of dS^T has
// columns t >= s. The tile of dY has its rows mirrored.
//
// Decays. a_s takes part in what reaches row t >= s from u < s, in what row t >= s gets from the state
// before, in what the state after gets from u < s, and in what goes from state to state. With the energies
// E_ts = dY_t.X_s (S o L)_ts, r_t = sum over s of E_ts dt_s, c_s = dt_s sum over t of E_ts:
//
//   da_s = decay <G, h_in> + sum over t >= s of from_start_t dY_t.(h_in^T C_t)
//        + sum over u < s of (dt_u to_end_u X_u.(B G)_u + c_u - r_u)         ddt_s = X_s.dx~_s
//
// None of these is a small difference of large sums but c - r, whose terms are the same numbers in f32.

#include "kernels/ssd/ssd_mma_backward_memory.cuh"

namespace annulus::kernels {

template <int kState>
class BackwardCta {
 public:
  __device__ BackwardCta(const MmaSsd& mma, const CudaSsdStates& states, const CudaSsdStates& gradients,
                         const CudaSsdGradients<Bf16>& out, const PartialGradients& partial, float* dskip)
      : mma_(mma),
        states_(states),
        out_(out),
        partial_(partial),
        dskip_(dskip),
        shared_(SharedBase()),
        memory_(SharedAddress(shared_)),
        place_(*reinterpret_cast<CtaPlace*>(shared_ + Memory::kPlace)),
        units_(place_.units),
        rows_(place_.rows),
        thread_(static_cast<int>(threadIdx.x % kSsdThreads)),
        pair_(Warpgroup() / 2),
        wg_(Warpgroup() % 2),
        warp_(__shfl_sync(~0u, thread_ / 32, 0)),
        per_block_((1 << 16) / mma.blocks + 1) {
    if (threadIdx.x == 0) {
      const GroupUnits units(mma, blockIdx.y, static_cast<uint32_t>(partial.parts));
      place_ = {units, ChunkAt(mma.ssd.chunks, blockIdx.x), {}, {}};
      place_.x = ValuesFrom(mma.ssd.x);
      place_.dy = ValuesFrom(out.dy);
      const int64_t chunk = blockIdx.x;
      const SuperChunks super = SuperOf(mma, chunk, rows_.segment);
      place_.super = super;
      *HiddenSlots() = SlotsOf<kState, Flow::kForward>(mma, states.states, chunk, super, Unit(0));
      *GradientSlots() = SlotsOf<kState, Flow::kBackward>(mma, gradients.states, chunk, super, Unit(0));
      Phases().Init();
    }
    __syncthreads();
  }

  __device__ void Run() {
    Start();
    if (pair_ == 0) {
      InsideChunk();
    } else {
      ThroughState();
    }
    float dc[kState / 16][4];
    ProductQueryGradient(dc);
    SecondPass(dc);
    StoreKeys(out_.dc, partial_.dc, dc, SecondRow(), SecondRow() + 8, pair_ * (kState / 2));
    __syncthreads();
    const GateGradients<Memory> gates{mma_, units_, rows_, blockIdx.x, shared_};
    gates.Sum(dskip_);
    __syncthreads();
    gates.Store(out_);
  }

 private:
  using Memory = BackwardMemory<kState>;
  using Second = StateLoad<kState, kBackwardThreads>;  // states of the second pass
  enum Barrier { kUnitsAreDone = 1, kProductsAreThere = 2, kFirstPair = 3, kSecondPair = 4 };

  // Behind it what follows from these indices is computed anew: it stays in no registers across a loop.
  __device__ void Refresh() {
    thread_ = static_cast<int>(Again(threadIdx.x) % kSsdThreads);
    for (int* index : {&pair_, &wg_, &warp_}) *index = static_cast<int>(Again(static_cast<uint32_t>(*index)));
  }
  __device__ float* Floats(int offset) const { return reinterpret_cast<float*>(shared_ + offset); }
  // u / blocks: exact, for u < kBackwardMostHeads blocks.
  __device__ int Head(int u) const { return u * per_block_ >> 16; }
  // Row array of the unit's head.
  __device__ float* OfHead(int offset, int u) const { return Floats(offset) + Head(u) * kSsdRows; }
  __device__ UnitPhases Phases() const { return UnitPhases(memory_ + Memory::kPhases); }
  __device__ int Rows() const { return static_cast<int>(rows_.end - rows_.begin); }
  __device__ int64_t Column(int u) const { return (units_.first + u) * kSsdColumns; }
  // The last unit is in the second stage.
  __device__ uint32_t X(int u) const {
    return memory_ + Memory::kStages + static_cast<uint32_t>(u + units_.count) % 2 * Memory::kStage;
  }
  __device__ uint32_t Dy(int u) const { return X(u) + Memory::kValues; }
  __device__ uint32_t Gradient(int u) const { return Dy(u) + Memory::kValues; }
  __device__ int SecondStage(int u) const {
    return static_cast<int>(static_cast<uint32_t>(units_.count - 1 - u) % 3);
  }
  __device__ uint32_t SecondDy(int u) const { return memory_ + Memory::SecondStage(SecondStage(u)); }
  __device__ uint32_t State(int u) const { return SecondDy(u) + Memory::kValues; }
  __device__ uint32_t SecondGradient(int u) const { return memory_ + Memory::SecondGradient(SecondStage(u)); }
  __device__ float4* InsideAt(int n) const {
    return reinterpret_cast<float4*>(shared_ + Memory::kInside) + n * kSsdThreads + thread_;
  }
  __device__ float2* InsideEnergies() const {
    return reinterpret_cast<float2*>(shared_ + Memory::kInsideEnergies) + thread_;
  }

  // This lane's rows of the chunk: in the first pass, half 0 or 1, and the first of two in the second.
  __device__ int FirstRow(int half) const {
    return (half == 0 ? 8 * warp_ : 120 - 8 * warp_) + thread_ % 32 / 4;
  }
  __device__ int SecondRow() const { return 16 * warp_ + thread_ % 32 / 4; }

  __device__ int64_t Unit(int u) const {
    return units_.item * mma_.ssd.heads * mma_.blocks + units_.first + u;
  }
  // What is left of the state before the super at the chunk, and of the gradient of that after it.
  __device__ float HiddenKept(int u) const { return Floats(Memory::kFactors)[Head(u)]; }
  __device__ float GradientKept(int u) const {
    return Floats(Memory::kFactors)[kBackwardMostHeads + Head(u)];
  }
  // In shared memory, for registers are short.
  __device__ StateSlots* HiddenSlots() const {
    return reinterpret_cast<StateSlots*>(shared_ + Memory::kSlots);
  }
  __device__ StateSlots* GradientSlots() const { return HiddenSlots() + 1; }

  // Gates and products; the second pair starts on the first unit.
  __device__ void Start() {
    const CudaSsd<Bf16>& ssd = mma_.ssd;
    const int64_t keys = units_.group * kState, head = units_.item * ssd.heads + units_.first_head;
    if (pair_ == 0) {
      LoadRows<kState>(X(1), ssd.c, rows_, units_.item, keys, thread_);
    } else {
      LoadFolded<kState>(memory_ + Memory::kB, ssd.b, rows_, units_.item, keys);
    }
    CopyAsyncCommit();
    if (pair_ == 1) FirstLoad(0);
    CopyAsyncCommit();
    for (int i = static_cast<int>(threadIdx.x); i < (Memory::kFactors - Memory::kEnds) / 4;
         i += kBackwardThreads) {
      Floats(Memory::kEnds)[i] = 0;
    }
    FillFactors<Flow::kForward>(mma_, states_.decays, blockIdx.x, place_.super, head, units_.heads,
                                Floats(Memory::kFactors));
    FillFactors<Flow::kBackward>(mma_, states_.decays, blockIdx.x, place_.super, head, units_.heads,
                                 Floats(Memory::kFactors) + kBackwardMostHeads);
    if (const int h = static_cast<int>(threadIdx.x); ssd.skip != nullptr && h < units_.heads) {
      Floats(Memory::kFactors)[2 * kBackwardMostHeads + h] = ssd.skip[units_.first_head + h];
    }
    FillGates(ssd, rows_, units_.item, units_.first_head, units_.heads, Floats(Memory::kSums),
              Floats(Memory::kDts));
    CopyAsyncWait<1>();
    BulkFence();
    __syncthreads();
    FillProducts();
    __syncthreads();  // c has been read: the second unit goes there
  }
  // Piece of S^T as the thread of the same place in either pair has it, rows s and columns t. Piece m of the
  // lower rows, of columns [8 m, 8 m + 8), is at m; of the upper rows at 15 - m, but that on the diagonal,
  // where the lower rows have their own, at the end. So are those of dS^T.
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
          product, OperandAt<kSsdRows>(memory_ + Memory::kB, 64 * wg_, 2 * k),
          OperandAt<kSsdRows>(X(1), 64 * pair_, 2 * k), k > 0);
    }
    GroupCommit();
    GroupWait<0>();
    GroupUse(product);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int m = 8 * pair_ + n;
      if (m >= warp_) *Product(m) = {product[n][0], product[n][1]};
      if (m >= 15 - warp_) *Product(m == 15 - warp_ ? kPieces - 1 : 15 - m) = {product[n][2], product[n][3]};
    }
  }

  __device__ RowPair RowsOf(int u) const {
    RowPair rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows.sum[half] = OfHead(Memory::kSums, u)[FirstRow(half)];
      rows.dt[half] = OfHead(Memory::kDts, u)[FirstRow(half)];
    }
    return rows;
  }

  // ---- The first pass, inside the chunk: by the first pair.

  using ProductGradients = float[kPieces][2];  // dS^T
  __device__ void InsideChunk() {
    ProductGradients ds = {};
    for (int u = 0; u < units_.count; ++u) {
      Phases().Wait(UnitPhases::kUnitIsThere + u % 2, u / 2);
      NamedBarrier(kFirstPair, kSsdThreads);  // the columns of the unit before have been added
      Refresh();
      RowPair rows = RowsOf(u);
      float dx[8][4];
      Inside(u, &rows, dx, ds);
      Refresh();
      NamedBarrier(kFirstPair, kSsdThreads);  // the columns of all warps are there
      AddColumns(u);
      const float skip = WarpSum(rows.skip);
      if (thread_ % 32 == 0) Floats(Memory::kSkips)[warp_ * kBackwardMostHeads + Head(u)] += skip;
      if (u > 0) Phases().Wait(UnitPhases::kInsideIsRead, u - 1);
#pragma unroll
      for (int n = 0; n < 8; ++n) *InsideAt(n) = {dx[n][0], dx[n][1], dx[n][2], dx[n][3]};
      *InsideEnergies() = {rows.energy[0], rows.energy[1]};
      Phases().Arrive(UnitPhases::kInsideIsThere);
    }
    StartBetweenPasses();
    StoreProductGradients(ds);
    FinishFirstPass();
  }

  // dx = (S o L)^T dY and dS^T, in four parts. Part p takes the blocks of 8 columns t m = 2 p and 2 p + 1 and
  // their mirror images 15 - m, which lie together in the tile of dY. Of these a warp has the lower rows of
  // 15 - m, and either the lower rows of m or the upper ones of 15 - m, or on the diagonal both: no branch
  // but that for the latter.
  __device__ void Inside(int u, RowPair* rows, float (&dx)[8][4], ProductGradients& ds) {
    const float* sums = OfHead(Memory::kSums, u) + thread_ % 4 * 2;
    float gradients[4][4];
    StartGradients(u, 0, gradients);
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      GroupWait<0>();
      GroupUse(gradients);
      uint32_t weights[2][4];  // of dY
      WeighPart(part, sums, gradients, rows, weights, ds);
      if (part < 3) StartGradients(u, part + 1, gradients);
      GroupFence();
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        MultiplyRegisters<Major::kDepthAcrossRows>(
            dx, weights[k], OperandAt<kSsdRows>(Dy(u), 32 * part + 16 * k, 0), part > 0 || k > 0);
      }
      GroupCommit();
    }
    GroupWait<0>();
    GroupUse(dx);
  }

  // X dY^T of a part's columns t, left in flight.
  __device__ void StartGradients(int u, int part, float (&gradients)[4][4]) {
    GroupFence();
#pragma unroll
    for (int depth = 0; depth < kSsdColumns / 16; ++depth) {
      MultiplyShared<Major::kDepthInRow, Major::kDepthInRow>(
          gradients, OperandAt<kSsdRows>(X(u), 64 * wg_, 2 * depth),
          OperandAt<kSsdRows>(Dy(u), 32 * part, 2 * depth), depth > 0);
    }
    GroupCommit();
  }

  __device__ void WeighPart(int part, const float* sums, const float (&gradients)[4][4], RowPair* rows,
                            uint32_t (&weights)[2][4], ProductGradients& ds) {
    const int warp = static_cast<int>(Again(static_cast<uint32_t>(warp_)));
    const int own_first = thread_ % 32 / 4 - thread_ % 4 * 2;  // on the diagonal
    const auto to = [&](int m) { return *reinterpret_cast<const float2*>(sums + 8 * m); };
    // The upper rows on the diagonal.
    Piece upper = {0, 0, {0, 0}};
    if (warp / 2 == part) {
      const bool odd = warp % 2;
      const float lower_gradient[2] = {odd ? gradients[1][0] : gradients[0][0],
                                       odd ? gradients[1][1] : gradients[0][1]};
      const float gradient[2] = {odd ? gradients[2][2] : gradients[3][2],
                                 odd ? gradients[2][3] : gradients[3][3]};
      upper = WeighPiece(gradient, to(15 - warp), *Product(kPieces - 1), rows->sum[1], rows->dt[1], own_first,
                         ds[kPieces - 1]);
      rows->energy[1] += upper.energy;
      if (own_first == 0) rows->skip += lower_gradient[0] + gradient[0];
      if (own_first == 1) rows->skip += lower_gradient[1] + gradient[1];
    }
    float columns[2][2][2];  // of m and 15 - m, block of two, column of the lane
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int m = 2 * part + i, f = 3 - i;
      const bool diagonal = m == warp, low = m >= warp;
      const float of_lower[2] = {gradients[f][0], gradients[f][1]};
      const Piece lower =
          WeighPiece(of_lower, to(15 - m), *Product(15 - m), rows->sum[0], rows->dt[0], 0, ds[15 - m]);
      const float of_either[2] = {low ? gradients[i][0] : gradients[f][2],
                                  low ? gradients[i][1] : gradients[f][3]};
      const Piece either =
          WeighPiece(of_either, to(low ? m : 15 - m), *Product(m), low ? rows->sum[0] : rows->sum[1],
                     low ? rows->dt[0] : rows->dt[1], diagonal ? own_first : 0, ds[m]);
      rows->energy[0] += lower.energy;
      rows->energy[0] += low ? either.energy : 0;
      rows->energy[1] += low ? 0 : either.energy;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        columns[0][i][c] = low ? either.columns[c] : 0;
        columns[1][1 - i][c] = lower.columns[c] + (diagonal ? upper.columns[c] : low ? 0 : either.columns[c]);
      }
      weights[0][2 * i] = low ? either.weights : 0;
      weights[0][2 * i + 1] = 0;
      weights[1][2 * (1 - i)] = lower.weights;
      weights[1][2 * (1 - i) + 1] = diagonal ? upper.weights : low ? 0 : either.weights;
    }
    StoreColumns(columns, 16 * part, Floats(Memory::kWarpColumns) + warp_ * kSsdRows);
  }

  __device__ void AddColumns(int u) {
    if (thread_ >= kSsdRows) return;
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < 8; ++warp) sum += Floats(Memory::kWarpColumns)[warp * kSsdRows + thread_];
    OfHead(Memory::kColumns, u)[thread_] += sum;
  }

  // ---- The first pass, through the state: by the second pair.

  // Starts the copies of unit u that fall to a thread of the pair.
  __device__ void FirstLoad(int u) {
    Refresh();
    const auto thread = static_cast<uint32_t>(thread_);
    place_.x.Load<4, 32>(CopyAt(X(u), thread), thread, u, FoldedRow(thread_ / 8), FoldedStep(thread), Rows());
    place_.dy.Load<4, 32>(CopyAt(Dy(u), thread), thread, u, MirroredRow(thread_ / 8), MirroredStep(thread),
                          Rows());
    StateLoad<kState>::StartCopy(Gradient(u), *GradientSlots(), u, thread);
  }
  // The chunk's rows of the CTA's units.
  __device__ CtaPlace::Values ValuesFrom(const StridedRows<const Bf16>& x) const {
    return {x.data + rows_.begin * x.row_stride + units_.item * x.batch_stride + Column(0), x.row_stride};
  }

  __device__ void ThroughState() {
    float db[kState / 8][4] = {};
    FinishFirstLoad(0);
    for (int u = 0; u < units_.count; ++u) {
      NamedBarrier(kSecondPair, kSsdThreads);  // what the other stage held has been read
      Refresh();
      RowPair rows = RowsOf(u);
      const float last = OfHead(Memory::kSums, u)[kSsdRows - 1];
      const float to_end[2] = {Exp2(last - rows.sum[0]), Exp2(last - rows.sum[1])};
      StartKeyGradient(u, to_end[0] * rows.dt[0], to_end[1] * rows.dt[1], db);
      if (u + 1 < units_.count) {
        FirstLoad(u + 1);
      } else {
        LoadRows<kState>(memory_ + Memory::kC, mma_.ssd.c, rows_, units_.item, units_.group * kState,
                         thread_);  // for the second pass
      }
      CopyAsyncCommit();
      Refresh();
      GroupWait<0>();
      GroupUse(db);
      float dx[8][4];
      StateGradient(u, to_end, &rows, dx);
      if (u + 1 < units_.count) FinishFirstLoad(u + 1);
      Phases().Wait(UnitPhases::kInsideIsThere, u);
      Refresh();
      StoreInputGradient(u, rows, dx);
    }
    StartBetweenPasses();
    FinishFirstPass();
    AddProducts(db);
    StoreKeys(out_.db, partial_.db, db, FirstRow(0), FirstRow(1), 0);
  }
  // Unit u is there for both pairs.
  __device__ void FinishFirstLoad(int u) {
    CopyAsyncWait<0>();
    StateLoad<kState>::AddSuper(Gradient(u), *GradientSlots(), u, Again(threadIdx.x % kSsdThreads),
                                GradientKept(u));
    BulkFence();
    Phases().Arrive(UnitPhases::kUnitIsThere + u % 2);
    NamedBarrier(kSecondPair, kSsdThreads);
  }

  // dx~ = to_end (B G), and its energies.
  __device__ void StateGradient(int u, const float (&to_end)[2], RowPair* rows, float (&dx)[8][4]) {
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
    ScaleRows(dx, to_end[0], to_end[1]);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t x[4];
      LoadMatrices(x, ValueTile::At(LaneAtPlaces(X(u)), 0, k));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = UnpackBf16(x[i]);
        const float* d = dx[2 * k + i / 2] + i % 2 * 2;
        rows->energy[i % 2] += pair.x * d[0] + pair.y * d[1];
      }
    }
  }
  // With what the first pair found: dx, and the rows' ddt, of which each element belongs to one lane.
  __device__ void StoreInputGradient(int u, const RowPair& rows, float (&dx)[8][4]) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float4 inside = *InsideAt(n);
      dx[n][0] = rows.dt[0] * (dx[n][0] + inside.x);
      dx[n][1] = rows.dt[0] * (dx[n][1] + inside.y);
      dx[n][2] = rows.dt[1] * (dx[n][2] + inside.z);
      dx[n][3] = rows.dt[1] * (dx[n][3] + inside.w);
    }
    const float2 energies = *InsideEnergies();
    if (u + 1 < units_.count) Phases().Arrive(UnitPhases::kInsideIsRead);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float ddt = rows.energy[half] + (half == 0 ? energies.x : energies.y);
      ddt += __shfl_xor_sync(~0u, ddt, 1);
      ddt += __shfl_xor_sync(~0u, ddt, 2);
      if (thread_ % 4 == 0) OfHead(Memory::kEnds, u)[FirstRow(half)] += ddt;
    }
    if (mma_.ssd.skip != nullptr) {
      AddFolded<Order::kMirrored>(Dy(u), warp_, 0, Floats(Memory::kFactors)[2 * kBackwardMostHeads + Head(u)],
                                  dx);
    }
    StoreFragment(dx, [&](int half) -> Bf16* {
      const int64_t row = rows_.begin + FirstRow(half);
      if (row >= rows_.end) return nullptr;
      return out_.dx.data + row * out_.dx.row_stride + units_.item * out_.dx.batch_stride + Column(u);
    });
  }
  // What this lane passes to ldmatrix for its warp's places of a tile of folded rows.
  __device__ uint32_t LaneAtPlaces(uint32_t tile) const {
    return tile + ValueTile::LaneOffset(static_cast<int>(Again(threadIdx.x) % 32), 16 * warp_);
  }

  // dB += (factor X) G^T   factor: of the rows
  __device__ void StartKeyGradient(int u, float lower, float upper, float (&db)[kState / 8][4]) {
    uint32_t x[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      LoadMatrices(x[k], ValueTile::At(LaneAtPlaces(X(u)), 0, k));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = UnpackBf16(x[k][i]);
        const float factor = i % 2 == 0 ? lower : upper;
        x[k][i] = PackBf16(pair.x * factor, pair.y * factor);
      }
    }
    GroupUse(db);
    GroupFence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      MultiplyRegisters<Major::kDepthInRow>(db, x[k], OperandAt<kState>(Gradient(u), 0, 2 * k), 1);
    }
    GroupCommit();
  }

  // ---- Between the passes and the second: all warpgroups.

  // Starts the copies of unit u in the second pass.
  __device__ void SecondLoad(int u) {
    Refresh();
    const uint32_t thread = Again(threadIdx.x);
    place_.dy.Load<2, 64>(CopyAt(SecondDy(u), thread), thread, u, static_cast<int>(thread / 8), 64, Rows());
    Second::StartCopy(State(u), *HiddenSlots(), u, thread);
    if (Reaches(u)) Second::StartCopy(SecondGradient(u), *GradientSlots(), u, thread);
  }
  // Whether the state before the chunk reaches the one after it.
  __device__ bool Reaches(int u) const { return Exp2(OfHead(Memory::kSums, u)[kSsdRows - 1]) > kNegligible; }

  // Before it all warps are done with the units of the first pass.
  __device__ void StartBetweenPasses() {
    BarrierOfRoles(kUnitsAreDone, kBackwardThreads);
    SecondLoad(units_.count - 1);
    CopyAsyncCommit();
    for (int i = static_cast<int>(threadIdx.x); i < 2 * Memory::kArray / 4; i += kBackwardThreads)
      Floats(Memory::kStarts)[i] = 0;
  }
  __device__ void FinishFirstPass() {
    CopyAsyncWait<1>();  // c
    BulkFence();
    BarrierOfRoles(kProductsAreThere, kBackwardThreads);
  }

  // dS^T, rounded: [s folded, t]
  __device__ uint32_t ProductTile() const { return memory_ + Memory::kProducts; }
  __device__ void StoreProductGradients(const ProductGradients& ds) {
    const int place = 16 * warp_ + thread_ % 32 / 4;
#pragma unroll
    for (int m = 0; m < 16; ++m) {
      uint32_t lower = 0, upper = 0;
      if (m >= 8 || m >= warp_) lower = PackBf16(ds[m][0], ds[m][1]);
      if (m > 15 - warp_) upper = PackBf16(ds[15 - m][0], ds[15 - m][1]);
      if (m >= 8 && m == 15 - warp_) upper = PackBf16(ds[kPieces - 1][0], ds[kPieces - 1][1]);
      StoreShared(ProductTile() + KeyTile<128>::Offset(place, m) + thread_ % 4 * 4, lower);
      StoreShared(ProductTile() + KeyTile<128>::Offset(place + 8, m) + thread_ % 4 * 4, upper);
    }
  }
  // dB += dS^T C
  __device__ void AddProducts(float (&db)[kState / 8][4]) {
    GroupUse(db);
    GroupFence();
#pragma unroll
    for (int k = 0; k < kSsdRows / 16; ++k) {
      MultiplyShared<Major::kDepthInRow, Major::kDepthAcrossRows>(
          db, OperandAt<kSsdRows>(ProductTile(), 64 * wg_, 2 * k),
          OperandAt<kSsdRows>(memory_ + Memory::kC, 16 * k, 0), 1);
    }
    GroupCommit();
    GroupWait<0>();
    GroupUse(db);
  }
  // dC = dS B
  __device__ void ProductQueryGradient(float (&dc)[kState / 16][4]) {
    GroupFence();
#pragma unroll
    for (int k = 0; k < kSsdRows / 16; ++k) {
      MultiplyShared<Major::kDepthAcrossRows, Major::kDepthAcrossRows>(
          dc, OperandAt<kSsdRows>(ProductTile(), 16 * k, 8 * wg_),
          OperandAt<kSsdRows>(memory_ + Memory::kB, 16 * k, kState / 16 * pair_), k > 0);
    }
    GroupCommit();
    GroupWait<0>();
    GroupUse(dc);
  }

  // While a unit's product is added, the next one's is on its way.
  __device__ void SecondPass(float (&dc)[kState / 16][4]) {
    const int last = units_.count - 1;
    float even[kState / 16][4], odd[kState / 16][4];
    CopyAsyncWait<0>();
    FinishSecondLoad(last);
    // Only now all that the other stages need is free.
    if (last > 0) SecondLoad(last - 1);
    CopyAsyncCommit();
    if (last > 1) SecondLoad(last - 2);
    CopyAsyncCommit();
    StartStateProduct(last, even);
    for (int u = last; u >= 0; u -= 2) {
      NextStateProduct(u, even, odd);
      AddStateProduct(u, even, dc);
      if (u == 0) break;
      NextStateProduct(u - 1, odd, even);
      AddStateProduct(u - 1, odd, dc);
    }
    GroupWait<0>();
  }
  // Completes that of unit u and starts that of the unit before.
  __device__ void NextStateProduct(int u, float (&product)[kState / 16][4], float (&next)[kState / 16][4]) {
    GroupWait<0>();
    GroupUse(product);
    if (u > 0) {
      CopyAsyncWait<1>();
      FinishSecondLoad(u - 1);
      if (u > 2) SecondLoad(u - 3);  // to where unit u was
      CopyAsyncCommit();
    }
    StartStateProduct(max(u - 1, 0), next);  // of which the last is not used
  }
  // Behind it unit u is there for all, and all products before it are complete.
  __device__ void FinishSecondLoad(int u) {
    Refresh();
    Second::AddSuper(State(u), *HiddenSlots(), u, Again(threadIdx.x), HiddenKept(u));
    if (Reaches(u)) ThroughChunk(u);
    BulkFence();
    __syncthreads();
    Refresh();
  }

  // <G, h_in>
  __device__ void ThroughChunk(int u) {
    const uint32_t thread = Again(threadIdx.x);
    const StateSlots slots = *GradientSlots();
    const float kept = slots.own != slots.super ? GradientKept(u) : 0;
    uint4 supers[Second::kChunks] = {};
    if (kept != 0) Second::LoadSuper(slots, u, thread, supers);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < Second::kChunks; ++i) {
      const uint4 h = LoadShared16(Second::At(State(u), i, thread));
      const uint4 g = LoadShared16(Second::At(SecondGradient(u), i, thread));
      const auto dot = [&](uint32_t hidden, uint32_t own, uint32_t of_super) {
        const float2 a = UnpackBf16(hidden), b = Combine(own, kept, of_super);
        return a.x * b.x + a.y * b.y;
      };
      sum += (dot(h.x, g.x, supers[i].x) + dot(h.y, g.y, supers[i].y)) +
             (dot(h.z, g.z, supers[i].z) + dot(h.w, g.w, supers[i].w));
    }
    sum = WarpSum(sum);
    if (thread_ % 32 == 0) {
      Floats(Memory::kThrough)[(8 * pair_ + warp_) * kBackwardMostHeads + Head(u)] += sum;
    }
  }

  // dY h_in^T, left in flight.
  __device__ void StartStateProduct(int u, float (&product)[kState / 16][4]) {
    GroupFence();
#pragma unroll
    for (int k = 0; k < kSsdColumns / 16; ++k) {
      MultiplyShared<Major::kDepthInRow, Major::kDepthInRow>(
          product, OperandAt<kSsdRows>(SecondDy(u), 64 * wg_, 2 * k),
          OperandAt<kState>(State(u), kState / 2 * pair_, 2 * k), k > 0);
    }
    GroupCommit();
  }
  // dC += from_start product
  __device__ void AddStateProduct(int u, const float (&product)[kState / 16][4],
                                  float (&dc)[kState / 16][4]) {
    Refresh();
    const int row = SecondRow(), lane = thread_ % 32;
    const float* sums = OfHead(Memory::kSums, u);
    const float from_start[2] = {Exp2(sums[row]), Exp2(sums[row + 8])};
    const uint32_t c_at = memory_ + Memory::kC + KeyTile<kState>::LaneOffset(lane, 16 * warp_);
    float gathered[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < kState / 32; ++k) {
      uint32_t c[4];
      LoadMatrices(c, KeyTile<kState>::At(c_at, 0, kState / 32 * pair_ + k));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = 2 * k + i / 2, half = i % 2;
        const float2 pair = UnpackBf16(c[i]);
        const float* p = product[n] + 2 * half;
        float* to = dc[n] + 2 * half;
        gathered[half] += pair.x * p[0] + pair.y * p[1];
        to[0] = fmaf(from_start[half], p[0], to[0]);
        to[1] = fmaf(from_start[half], p[1], to[1]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = gathered[half] * from_start[half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (thread_ % 4 == 0) OfHead(Memory::kStarts + pair_ * Memory::kArray, u)[row + 8 * half] += sum;
    }
  }

  // Rows `lower` and `upper` of the chunk of columns [column, column + 8 kN) of db or dc.
  template <int kN>
  __device__ void StoreKeys(const StridedRows<Bf16>& to, float* partial, const float (&value)[kN][4],
                            int lower, int upper, int column) {
    if (partial_.parts == 1) {
      StoreFragment(value, [&](int half) -> Bf16* {
        const int64_t row = rows_.begin + (half == 0 ? lower : upper);
        if (row >= rows_.end) return nullptr;
        return to.data + row * to.row_stride + units_.item * to.batch_stride + units_.group * kState + column;
      });
      return;
    }
    const CudaSsd<Bf16>& ssd = mma_.ssd;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = rows_.begin + (half == 0 ? lower : upper);
      if (row >= rows_.end) continue;
      const int64_t key =
          ((units_.part * ssd.rows + row) * ssd.batch + units_.item) * ssd.groups + units_.group;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        *reinterpret_cast<float2*>(partial + key * kState + column + 8 * n + thread_ % 4 * 2) = {
            value[n][2 * half], value[n][2 * half + 1]};
      }
    }
  }

  const MmaSsd& mma_;
  const CudaSsdStates& states_;
  const CudaSsdGradients<Bf16>& out_;
  const PartialGradients& partial_;
  float* const dskip_;
  char* const shared_;
  const uint32_t memory_;  // its address
  CtaPlace& place_;        // in shared memory
  const GroupUnits& units_;
  const ChunkRows& rows_;
  int thread_, pair_, wg_, warp_;  // thread, warpgroup and warp of the pair
  const int per_block_;
};

}  // namespace annulus::kernels
