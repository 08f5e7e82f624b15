// Forward of the scan in f32: with L the decays between rows of a chunk,
//   end state of a chunk   B^T (to_end dt X)
//   y                      ((C B^T) o L dt) X + from_start C h_in + skip X

#include "kernels/ssd/ssd_plain.cuh"

namespace annulus::kernels {
namespace {

// A thread for each head of each chunk walks along its rows.
template <typename T>
__global__ void __launch_bounds__(128) RowDecaysKernel(const __grid_constant__ CudaSsd<T> ssd,
                                                       const __grid_constant__ RowDecays to, float* decays) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, heads = ssd.batch * ssd.heads;
  if (thread >= ssd.chunks.first_chunk[ssd.chunks.count] * heads) return;
  const HeadChunk<T> at(ssd, to, thread / heads, thread % heads);
  const int64_t last = at.size() - 1;
  double sum = 0;
  for (int64_t r = 0; r <= last; ++r) {
    sum = at.Age(r) == 0 ? 0 : sum + ssd.a[at.Gate(r)];
    to.sums[at.Gate(r)] = sum;
    to.from_start[at.Gate(r)] = at.Age(r) > r ? expf(static_cast<float>(sum)) : 0;
  }
  for (int64_t r = 0; r <= last; ++r) to.to_end[at.Gate(r)] = at.Decay(last, r);
  if (decays == nullptr) return;
  decays[at.Index()] = at.Age(last) > last ? static_cast<float>(sum) : -__builtin_huge_valf();
}

// A thread for each element of a segment's state.
template <ScanOrder kOrder, ScanMode kMode>
__global__ void __launch_bounds__(256) ScanKernel(const __grid_constant__ ScanArgs args) {
  const int64_t index = blockIdx.x, segment = index / args.heads, head = index % args.heads;
  const int64_t element = int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
  const int64_t first = args.chunks.first_chunk[segment], end = args.chunks.first_chunk[segment + 1];
  const int64_t own = index * args.elements + element;
  const bool inside = element < args.elements;
  float state = inside && kMode == ScanMode::kReplace && args.initial != nullptr ? args.initial[own] : 0;
  float transition = 1;
  for (int64_t i = first; i < end; ++i) {
    const int64_t chunk = kOrder == ScanOrder::kForward ? i : first + end - 1 - i;
    const float decay = expf(args.decays[chunk * args.heads + head]);
    transition *= decay;
    if (!inside) continue;
    float* of_chunk = args.states + (chunk * args.heads + head) * args.elements + element;
    const float before = state;
    state = decay * before + *of_chunk;
    if (kMode == ScanMode::kReplace) *of_chunk = before;
  }
  if (kMode == ScanMode::kReplace) return;
  if (inside) args.state[own] = state;
  if (element == 0) args.transition[index] = transition;
}

template <typename T>
struct ChunkStates {
  CudaSsd<T> ssd;
  RowDecays decays;
  float* states;
  struct Block {
    HeadChunk<T> at;
    float* states;
    int64_t m, n, k;
    __device__ float Left(int64_t i, int64_t l) const {
      return at.decays.to_end[at.Gate(l)] * at.Dt(l) * at.B(l, i);
    }
    __device__ float Right(int64_t l, int64_t j) const { return at.X(l, j); }
    __device__ void Store(int64_t i, int64_t j, float sum) const { states[i * n + j] = sum; }
  };
  __device__ Block At(int64_t index) const {
    const int64_t heads = ssd.batch * ssd.heads;
    const HeadChunk<T> at(ssd, decays, index / heads, index % heads);
    return {at, states + index * ssd.state * ssd.dim, ssd.state, ssd.dim, at.size()};
  }
};

template <typename T>
struct Scores {
  CudaSsd<T> ssd;
  RowDecays decays;
  int64_t first_chunk;
  TimesDt times_dt;
  float* scores;
  struct Block {
    HeadChunk<T> at;
    TimesDt times_dt;
    float* scores;
    int64_t stride, m, n, k;
    __device__ float Left(int64_t i, int64_t l) const { return at.C(i, l); }
    __device__ float Right(int64_t l, int64_t j) const { return at.B(j, l); }
    __device__ void Store(int64_t i, int64_t j, float sum) const {
      const float decay = at.Decay(i, j);
      scores[i * stride + j] = decay == 0 ? 0 : sum * decay * (times_dt == TimesDt::kYes ? at.Dt(j) : 1.0f);
    }
  };
  __device__ Block At(int64_t index) const {
    const int64_t heads = ssd.batch * ssd.heads, stride = min(ssd.chunks.chunk, ssd.rows);
    const HeadChunk<T> at(ssd, decays, first_chunk + index / heads, index % heads);
    return {at, times_dt, scores + index * stride * stride, stride, at.size(), at.size(), ssd.state};
  }
};

template <typename T>
struct Outputs {
  CudaSsd<T> ssd;
  RowDecays decays;
  int64_t first_chunk;
  const float* scores;
  const float* states;
  StridedRows<T> y;
  struct Block {
    HeadChunk<T> at;
    const float* scores;
    const float* state;
    StridedRows<T> y;
    int64_t stride, rows, m, n, k;
    __device__ float Left(int64_t i, int64_t l) const {
      return l < rows ? scores[i * stride + l] : at.decays.from_start[at.Gate(i)] * at.C(i, l - rows);
    }
    __device__ float Right(int64_t l, int64_t j) const {
      return l < rows ? at.X(l, j) : state[(l - rows) * n + j];
    }
    __device__ void Store(int64_t i, int64_t j, float sum) const {
      if (at.ssd.skip != nullptr) sum += at.ssd.skip[at.head] * at.X(i, j);
      at.At(y, i, at.head, n)[j] = FromFloat<T>(sum);
    }
  };
  __device__ Block At(int64_t index) const {
    const int64_t heads = ssd.batch * ssd.heads, stride = min(ssd.chunks.chunk, ssd.rows);
    const HeadChunk<T> at(ssd, decays, first_chunk + index / heads, index % heads);
    return {at,
            scores + index * stride * stride,
            states + at.Index() * ssd.state * ssd.dim,
            y,
            stride,
            at.size(),
            at.size(),
            ssd.dim,
            at.size() + ssd.state};
  }
};

}  // namespace

template <typename T>
cudaError_t FillRowDecays(const CudaSsd<T>& ssd, const RowDecays& to, float* decays, cudaStream_t stream) {
  const int64_t threads = ssd.chunks.chunks() * ssd.all_heads();
  if (threads == 0) return cudaSuccess;
  RowDecaysKernel<<<static_cast<uint32_t>(CeilDiv(threads, 128)), 128, 0, stream>>>(ssd, to, decays);
  return cudaGetLastError();
}

cudaError_t ScanChunks(ScanOrder order, ScanMode mode, const ScanArgs& args, cudaStream_t stream) {
  if (args.chunks.count * args.heads * args.elements == 0) return cudaSuccess;
  const dim3 grid(static_cast<uint32_t>(args.chunks.count * args.heads),
                  static_cast<uint32_t>(CeilDiv(args.elements, 256)));
  if (order == ScanOrder::kForward && mode == ScanMode::kSummarise) {
    ScanKernel<ScanOrder::kForward, ScanMode::kSummarise><<<grid, 256, 0, stream>>>(args);
  } else if (order == ScanOrder::kForward) {
    ScanKernel<ScanOrder::kForward, ScanMode::kReplace><<<grid, 256, 0, stream>>>(args);
  } else if (mode == ScanMode::kSummarise) {
    ScanKernel<ScanOrder::kBackward, ScanMode::kSummarise><<<grid, 256, 0, stream>>>(args);
  } else {
    ScanKernel<ScanOrder::kBackward, ScanMode::kReplace><<<grid, 256, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t FillScores(const CudaSsd<T>& ssd, const RowDecays& decays, TimesDt times_dt, int64_t first_chunk,
                       int64_t chunks, float* scores, cudaStream_t stream) {
  const int64_t side = PlainScratch<T>::Chunk(ssd);
  return LaunchProducts(Scores<T>{ssd, decays, first_chunk, times_dt, scores}, 0, chunks * ssd.all_heads(),
                        side, side, stream);
}

template <typename T>
int64_t PlainSsdScratchBytes(const CudaSsd<T>& ssd) {
  return PlainScratch<T>(ssd, nullptr).bytes;
}

template <typename T>
cudaError_t PlainSsdChunkStates(const CudaSsd<T>& ssd, const CudaSsdStates& states,
                                const CudaSsdSummary& summary, void* scratch, cudaStream_t stream) {
  const PlainScratch<T> own(ssd, scratch);
  cudaError_t error = FillRowDecays(ssd, own.decays, states.decays, stream);
  if (error == cudaSuccess) {
    error = LaunchProducts(ChunkStates<T>{ssd, own.decays, states.states}, 0,
                           ssd.chunks.chunks() * ssd.all_heads(), ssd.state, ssd.dim, stream);
  }
  if (error != cudaSuccess) return error;
  return ScanChunks(ScanOrder::kForward, ScanMode::kSummarise,
                    {.chunks = ssd.chunks,
                     .heads = ssd.all_heads(),
                     .elements = ssd.state_elements(),
                     .decays = states.decays,
                     .states = states.states,
                     .transition = summary.transition,
                     .state = summary.state},
                    stream);
}

template <typename T>
cudaError_t PlainSsdForward(const CudaSsd<T>& ssd, const float* initial, const CudaSsdStates& states,
                            StridedRows<T> y, void* scratch, cudaStream_t stream) {
  const PlainScratch<T> own(ssd, scratch);
  cudaError_t error = FillRowDecays<T>(ssd, own.decays, nullptr, stream);
  if (error == cudaSuccess) {
    error = ScanChunks(ScanOrder::kForward, ScanMode::kReplace,
                       {.chunks = ssd.chunks,
                        .heads = ssd.all_heads(),
                        .elements = ssd.state_elements(),
                        .decays = states.decays,
                        .states = states.states,
                        .initial = initial},
                       stream);
  }
  for (int64_t first = 0; first < ssd.chunks.chunks() && error == cudaSuccess; first += own.slice) {
    const int64_t chunks = std::min(own.slice, ssd.chunks.chunks() - first);
    error = FillScores(ssd, own.decays, TimesDt::kYes, first, chunks, own.squares[0], stream);
    if (error != cudaSuccess) break;
    error = LaunchProducts(Outputs<T>{ssd, own.decays, first, own.squares[0], states.states, y}, 0,
                           chunks * ssd.all_heads(), PlainScratch<T>::Chunk(ssd), ssd.dim, stream);
  }
  return error;
}

#define ANNULUS_INSTANTIATE(T)                                                                             \
  template cudaError_t FillRowDecays(const CudaSsd<T>&, const RowDecays&, float*, cudaStream_t);           \
  template cudaError_t FillScores(const CudaSsd<T>&, const RowDecays&, TimesDt, int64_t, int64_t, float*,  \
                                  cudaStream_t);                                                           \
  template int64_t PlainSsdScratchBytes(const CudaSsd<T>&);                                                \
  template cudaError_t PlainSsdChunkStates(const CudaSsd<T>&, const CudaSsdStates&, const CudaSsdSummary&, \
                                           void*, cudaStream_t);                                           \
  template cudaError_t PlainSsdForward(const CudaSsd<T>&, const float*, const CudaSsdStates&,              \
                                       StridedRows<T>, void*, cudaStream_t)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(__nv_bfloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
