// Backward of the scan in f32. With L the decays between rows of a chunk, S = C B^T, G the gradient of the
// state at its end:
//
//   E = dY X^T o S o L       dx~ = (S o L)^T dY + to_end (B G)        dx = dt dx~ + skip dY
//   dS = dY X^T o L dt       ddt_s = sum over t of E_ts + to_end_s x_s . (B G)_s
//   dB = dS^T C + (to_end dt X) G^T      dC = dS B + (from_start dY) h_in^T       both summed over heads
//
// A decay is e^(sum_t - sum_s): what it gets goes to sum_t and is taken from sum_s, and a_t gets all that
// later rows of its document got. These terms cancel where a row lies outside of [s, t], so they are
// multiplied and summed in double: a term that is rounded on one side is felt by all rows before.

#include "kernels/common/parts.cuh"
#include "kernels/ssd/ssd_plain.cuh"

namespace annulus::kernels {
namespace {

template <typename T>
struct StateGradients {
  CudaSsd<T> ssd;
  RowDecays decays;
  StridedRows<const T> dy;
  float* gradients;
  struct Block {
    HeadChunk<T> at;
    StridedRows<const T> dy;
    float* gradient;
    int64_t m, n, k;
    __device__ float Left(int64_t i, int64_t l) const {
      return at.decays.from_start[at.Gate(l)] * at.C(l, i);
    }
    __device__ float Right(int64_t l, int64_t j) const { return at.Of(dy, l, j); }
    __device__ void Store(int64_t i, int64_t j, float sum) const { gradient[i * n + j] = sum; }
  };
  __device__ Block At(int64_t index) const {
    const int64_t heads = ssd.batch * ssd.heads;
    const HeadChunk<T> at(ssd, decays, index / heads, index % heads);
    return {at, dy, gradients + index * ssd.state * ssd.dim, ssd.state, ssd.dim, at.size()};
  }
};

// Of a slice of chunks. squares: [slice, batch * heads, chunk, chunk]   panels: [.., chunk, dim]
template <typename T>
struct Slice {
  CudaSsd<T> ssd;
  RowDecays decays;
  CudaSsdGradients<T> out;
  const float* states;
  const float* gradients;  // of states at the ends of chunks
  int64_t first_chunk;
  float* scores;      // S o L
  float* dproducts;   // dS
  float* energies;    // E
  float* from_end;    // B G
  float* from_state;  // C h_in
};

template <typename T>
struct SliceHead {
  const Slice<T>& slice;
  HeadChunk<T> at;
  int64_t side, square, panel, state;
  __device__ SliceHead(const Slice<T>& s, int64_t index)
      : SliceHead(s, index / (s.ssd.batch * s.ssd.heads), index % (s.ssd.batch * s.ssd.heads)) {}
  __device__ SliceHead(const Slice<T>& s, int64_t chunk, int64_t head)
      : slice(s),
        at(s.ssd, s.decays, s.first_chunk + chunk, head),
        side(min(s.ssd.chunks.chunk, s.ssd.rows)),
        square((chunk * s.ssd.batch * s.ssd.heads + head) * side * side),
        panel((chunk * s.ssd.batch * s.ssd.heads + head) * side * s.ssd.dim),
        state(at.Index() * s.ssd.state * s.ssd.dim) {}
  __device__ float ToEnd(int64_t row) const { return slice.decays.to_end[at.Gate(row)]; }
  __device__ float FromStart(int64_t row) const { return slice.decays.from_start[at.Gate(row)]; }
};

// dY X^T, and from it dS and E.
template <typename T>
struct Energies {
  Slice<T> slice;
  struct Block {
    SliceHead<T> of;
    int64_t m, n, k;
    __device__ float Left(int64_t i, int64_t l) const { return of.at.Of(of.slice.out.dy, i, l); }
    __device__ float Right(int64_t l, int64_t j) const { return of.at.X(j, l); }
    __device__ void Store(int64_t i, int64_t j, float sum) const {
      const int64_t to = of.square + i * of.side + j;
      const float decay = of.at.Decay(i, j);
      of.slice.dproducts[to] = decay == 0 ? 0 : sum * decay * of.at.Dt(j);
      of.slice.energies[to] = decay == 0 ? 0 : sum * of.slice.scores[to];
    }
  };
  __device__ Block At(int64_t index) const {
    const SliceHead<T> of(slice, index);
    return {of, of.at.size(), of.at.size(), slice.ssd.dim};
  }
};

// B G or C h_in
enum class Through { kEnd, kStart };
template <typename T, Through kThrough>
struct Panels {
  Slice<T> slice;
  struct Block {
    SliceHead<T> of;
    int64_t m, n, k;
    __device__ float Left(int64_t i, int64_t l) const {
      return kThrough == Through::kEnd ? of.at.B(i, l) : of.at.C(i, l);
    }
    __device__ float Right(int64_t l, int64_t j) const {
      return (kThrough == Through::kEnd ? of.slice.gradients : of.slice.states)[of.state + l * n + j];
    }
    __device__ void Store(int64_t i, int64_t j, float sum) const {
      (kThrough == Through::kEnd ? of.slice.from_end : of.slice.from_state)[of.panel + i * n + j] = sum;
    }
  };
  __device__ Block At(int64_t index) const {
    const SliceHead<T> of(slice, index);
    return {of, of.at.size(), slice.ssd.dim, slice.ssd.state};
  }
};

template <typename T>
struct InputGradients {
  Slice<T> slice;
  struct Block {
    SliceHead<T> of;
    int64_t m, n, k;
    __device__ float Left(int64_t i, int64_t l) const { return of.slice.scores[of.square + l * of.side + i]; }
    __device__ float Right(int64_t l, int64_t j) const { return of.at.Of(of.slice.out.dy, l, j); }
    __device__ void Store(int64_t i, int64_t j, float sum) const {
      const HeadChunk<T>& at = of.at;
      sum = at.Dt(i) * (sum + of.ToEnd(i) * of.slice.from_end[of.panel + i * n + j]);
      if (at.ssd.skip != nullptr) sum += at.ssd.skip[at.head] * at.Of(of.slice.out.dy, i, j);
      at.At(of.slice.out.dx, i, at.head, n)[j] = FromFloat<T>(sum);
    }
  };
  __device__ Block At(int64_t index) const {
    const SliceHead<T> of(slice, index);
    return {of, of.at.size(), slice.ssd.dim, of.at.size()};
  }
};

// dB or dC of a group: one product over all that its heads add, head after head: rows of the chunk, then
// columns of the state.
enum class GroupSide { kB, kC };
template <typename T, GroupSide kSide>
struct GroupGradients {
  Slice<T> slice;
  struct Block {
    const Slice<T>& slice;
    int64_t chunk, item, group, rows;
    int64_t m, n, k;
    __device__ SliceHead<T> Head(int64_t l) const {
      const int64_t heads = slice.ssd.heads, of_group = heads / slice.ssd.groups;
      return {slice, chunk, item * heads + group * of_group + l / (rows + slice.ssd.dim)};
    }
    __device__ float Left(int64_t i, int64_t l) const {
      const SliceHead<T> of = Head(l);
      const int64_t within = l % (rows + slice.ssd.dim), p = within - rows;
      if (p < 0) {
        return slice
            .dproducts[of.square + (kSide == GroupSide::kB ? within * of.side + i : i * of.side + within)];
      }
      if (kSide == GroupSide::kB) return of.ToEnd(i) * of.at.Dt(i) * of.at.X(i, p);
      return of.FromStart(i) * of.at.Of(slice.out.dy, i, p);
    }
    __device__ float Right(int64_t l, int64_t j) const {
      const SliceHead<T> of = Head(l);
      const int64_t within = l % (rows + slice.ssd.dim), p = within - rows;
      if (p < 0) return kSide == GroupSide::kB ? of.at.C(within, j) : of.at.B(within, j);
      return (kSide == GroupSide::kB ? slice.gradients : slice.states)[of.state + j * slice.ssd.dim + p];
    }
    __device__ void Store(int64_t i, int64_t j, float sum) const {
      const SliceHead<T> of = Head(0);
      of.at.At(kSide == GroupSide::kB ? slice.out.db : slice.out.dc, i, group, n)[j] = FromFloat<T>(sum);
    }
  };
  __device__ Block At(int64_t index) const {
    const CudaSsd<T>& ssd = slice.ssd;
    const int64_t chunk = index / (ssd.batch * ssd.groups), item = index / ssd.groups % ssd.batch;
    const ChunkRows rows = ChunkAt(ssd.chunks, slice.first_chunk + chunk);
    const int64_t size = rows.end - rows.begin;
    return {slice, chunk, item,      index % ssd.groups,
            size,  size,  ssd.state, ssd.heads / ssd.groups * (size + ssd.dim)};
  }
};

constexpr int kGateThreads = 128;

// Sum over the CTA, in thread 0.
__device__ double CtaSum(double x, double* part) {
  x = WarpSum(x);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kGateThreads / 32; ++w) sum += part[w];
  __syncthreads();
  return sum;
}

// ddt, da and dskip of one head of one chunk.   shared memory: dsum, [rows] doubles
template <typename T>
__global__ void __launch_bounds__(kGateThreads)
    GateGradientsKernel(const __grid_constant__ Slice<T> slice, float* dskip) {
  extern __shared__ double dsum[];
  __shared__ double part[kGateThreads / 32];
  const SliceHead<T> of(slice, blockIdx.x);
  const HeadChunk<T>& at = of.at;
  const int64_t rows = at.size(), dim = slice.ssd.dim;
  double to_end = 0, skip = 0;
  for (int64_t r = threadIdx.x; r < rows; r += kGateThreads) {
    double own = 0, column = 0, end = 0, start = 0;
    for (int64_t s = 0; s <= r; ++s) {
      own += static_cast<double>(slice.energies[of.square + r * of.side + s]) * at.Dt(s);
    }
    for (int64_t t = r; t < rows; ++t) column += slice.energies[of.square + t * of.side + r];
    for (int64_t p = 0; p < dim; ++p) {
      end += at.X(r, p) * slice.from_end[of.panel + r * dim + p];
      start += at.Of(slice.out.dy, r, p) * slice.from_state[of.panel + r * dim + p];
      skip += at.X(r, p) * at.Of(slice.out.dy, r, p);
    }
    const double dt = at.Dt(r), ddt = column + of.ToEnd(r) * end;
    dsum[r] = own - ddt * dt + of.FromStart(r) * start;
    to_end += of.ToEnd(r) * end * dt;
    if (slice.out.ddt != nullptr) slice.out.ddt[at.Gate(r)] = static_cast<float>(ddt);
  }
  double through = 0;
  for (int64_t e = threadIdx.x; e < slice.ssd.state * dim; e += kGateThreads) {
    through += slice.states[of.state + e] * slice.gradients[of.state + e];
  }
  through = CtaSum(through, part);
  to_end = CtaSum(to_end, part);
  skip = CtaSum(skip, part);
  if (threadIdx.x != 0) return;
  if (dskip != nullptr) dskip[at.Index()] = static_cast<float>(skip);
  double later = to_end + of.FromStart(rows - 1) * through;
  for (int64_t r = rows - 1; r >= 0; --r) {
    later += dsum[r];
    const bool starts = at.Age(r) == 0;
    slice.out.da[at.Gate(r)] = starts ? 0 : static_cast<float>(later);
    if (starts) later = 0;
  }
}

template <typename T>
cudaError_t BackwardSlice(const Slice<T>& slice, int64_t chunks, float* dskip, cudaStream_t stream) {
  const CudaSsd<T>& ssd = slice.ssd;
  const int64_t heads = chunks * ssd.all_heads(), groups = chunks * ssd.batch * ssd.groups;
  const int64_t side = PlainScratch<T>::Chunk(ssd);
  cudaError_t error =
      FillScores(ssd, slice.decays, TimesDt::kNo, slice.first_chunk, chunks, slice.scores, stream);
  const auto then = [&](const auto& op, int64_t count, int64_t m, int64_t n) {
    if (error == cudaSuccess) error = LaunchProducts(op, 0, count, m, n, stream);
  };
  then(Energies<T>{slice}, heads, side, side);
  then(Panels<T, Through::kEnd>{slice}, heads, side, ssd.dim);
  then(Panels<T, Through::kStart>{slice}, heads, side, ssd.dim);
  then(InputGradients<T>{slice}, heads, side, ssd.dim);
  then(GroupGradients<T, GroupSide::kB>{slice}, groups, side, ssd.state);
  then(GroupGradients<T, GroupSide::kC>{slice}, groups, side, ssd.state);
  if (error != cudaSuccess || heads == 0) return error;
  const auto shared = static_cast<int>(side * int64_t{sizeof(double)});
  error = cudaFuncSetAttribute(GateGradientsKernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  GateGradientsKernel<<<static_cast<uint32_t>(heads), kGateThreads, static_cast<size_t>(shared), stream>>>(
      slice, dskip);
  return cudaGetLastError();
}

}  // namespace

template <typename T>
cudaError_t PlainSsdBackwardChunkStates(const CudaSsd<T>& ssd, StridedRows<const T> dy,
                                        const CudaSsdStates& gradients, const CudaSsdSummary& summary,
                                        void* scratch, cudaStream_t stream) {
  const PlainScratch<T> own(ssd, scratch);
  cudaError_t error = FillRowDecays<T>(ssd, own.decays, nullptr, stream);
  if (error == cudaSuccess) {
    error = LaunchProducts(StateGradients<T>{ssd, own.decays, dy, gradients.states}, 0,
                           ssd.chunks.chunks() * ssd.all_heads(), ssd.state, ssd.dim, stream);
  }
  if (error != cudaSuccess) return error;
  return ScanChunks(ScanOrder::kBackward, ScanMode::kSummarise,
                    {.chunks = ssd.chunks,
                     .heads = ssd.all_heads(),
                     .elements = ssd.state_elements(),
                     .decays = gradients.decays,
                     .states = gradients.states,
                     .transition = summary.transition,
                     .state = summary.state},
                    stream);
}

template <typename T>
cudaError_t PlainSsdBackward(const CudaSsd<T>& ssd, const CudaSsdStates& states, float* gradients,
                             const CudaSsdGradients<T>& out, void* scratch, cudaStream_t stream) {
  const PlainScratch<T> own(ssd, scratch);
  cudaError_t error = FillRowDecays<T>(ssd, own.decays, nullptr, stream);
  if (error == cudaSuccess) {
    error = ScanChunks(ScanOrder::kBackward, ScanMode::kReplace,
                       {.chunks = ssd.chunks,
                        .heads = ssd.all_heads(),
                        .elements = ssd.state_elements(),
                        .decays = states.decays,
                        .states = gradients,
                        .initial = out.final_gradient},
                       stream);
  }
  const int64_t all = ssd.chunks.chunks();
  for (int64_t first = 0; first < all && error == cudaSuccess; first += own.slice) {
    const Slice<T> slice{.ssd = ssd,
                         .decays = own.decays,
                         .out = out,
                         .states = states.states,
                         .gradients = gradients,
                         .first_chunk = first,
                         .scores = own.squares[0],
                         .dproducts = own.squares[1],
                         .energies = own.squares[2],
                         .from_end = own.panels[0],
                         .from_state = own.panels[1]};
    error = BackwardSlice(slice, std::min(own.slice, all - first), out.dskip != nullptr ? own.dskip : nullptr,
                          stream);
  }
  if (error != cudaSuccess || out.dskip == nullptr) return error;
  return AddParts(own.dskip, all * ssd.batch, ssd.heads, out.dskip, stream);
}

#define ANNULUS_INSTANTIATE(T)                                                                         \
  template cudaError_t PlainSsdBackwardChunkStates(const CudaSsd<T>&, StridedRows<const T>,            \
                                                   const CudaSsdStates&, const CudaSsdSummary&, void*, \
                                                   cudaStream_t);                                      \
  template cudaError_t PlainSsdBackward(const CudaSsd<T>&, const CudaSsdStates&, float*,               \
                                        const CudaSsdGradients<T>&, void*, cudaStream_t)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(__nv_bfloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
