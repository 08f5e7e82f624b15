#pragma once

// What the kernels of delta_rule_cuda.h share: matrices of a slice of chunks in scratch memory, and the steps
// of forward that backward takes again.

#include "kernels/delta_rule/delta_product.cuh"
#include "kernels/delta_rule/delta_rule_cuda.h"
#include "kernels/ssd/ssd_plain.cuh"

namespace annulus::kernels {

// Matrices of each head of each chunk of a slice: [slice, batch * heads, rows, columns].
template <typename T>
struct DeltaSlice {
  static constexpr int64_t kSliceBytes = int64_t{256} << 20;

  CudaSsd<T> rule;
  RowDecays decays = {};
  float* carry = nullptr;  // [batch * heads, K, V + K]: states between slices, then transitions
  int64_t first_chunk = 0, chunks = 0;
  // [chunk, chunk]
  float* gram = nullptr;    // B
  float* scores = nullptr;  // P
  float* dgram = nullptr;   // dB o L
  float* dscores = nullptr;
  float* energies = nullptr;
  // [chunk, V]
  float* delta = nullptr;   // first U
  float* ddelta = nullptr;  // then Z = T^T ddelta
  float* residual = nullptr;
  // [chunk, K]
  float* w = nullptr;
  float* dkeys_start = nullptr;  // what the state before the chunk gives to dk
  float* dkeys_end = nullptr;    // what the state after it gives to dk
  float* dqueries = nullptr;     // what the state before the chunk gives to dq
  // [K, V]
  float* gradients = nullptr;  // of states at the ends of chunks

  int64_t most_chunks = 0;  // of a slice
  int64_t bytes = 0;

  DeltaSlice(const CudaSsd<T>& r, void* memory) : rule(r) {
    const int64_t heads = r.all_heads(), side = Side(), k = r.state, v = r.dim;
    const int64_t of_head = 5 * side * side + 3 * side * v + 4 * side * k + k * v;
    most_chunks = std::clamp<int64_t>(kSliceBytes / std::max<int64_t>(4 * heads * of_head, 1), 1,
                                      std::max<int64_t>(r.chunks.chunks(), 1));
    char* next = static_cast<char*>(memory);
    const auto take = [&](auto** to, int64_t elements) {
      *to = reinterpret_cast<std::remove_pointer_t<decltype(to)>>(next + bytes);
      bytes += CeilDiv(elements * static_cast<int64_t>(sizeof(**to)), 256) * 256;
    };
    take(&decays.sums, r.rows * heads);
    take(&decays.from_start, r.rows * heads);
    take(&decays.to_end, r.rows * heads);
    take(&carry, heads * k * (v + k));
    for (float** square : {&gram, &scores, &dgram, &dscores, &energies}) {
      take(square, most_chunks * heads * side * side);
    }
    for (float** panel : {&delta, &ddelta, &residual}) take(panel, most_chunks * heads * side * v);
    for (float** panel : {&w, &dkeys_start, &dkeys_end, &dqueries})
      take(panel, most_chunks * heads * side * k);
    take(&gradients, most_chunks * heads * k * v);
  }
  // Rows of the longest chunk.
  __host__ __device__ int64_t Side() const {
    return rule.chunks.chunk < rule.rows ? rule.chunks.chunk : rule.rows;
  }
};

// One head of one chunk of a slice as one product of DeltaProductKernel: a part of that product derives
// from it and says what is multiplied.
template <typename T>
struct DeltaBlock {
  const DeltaSlice<T>& slice;
  int64_t index;  // chunk of the slice * batch * heads + head
  HeadChunk<T> at;
  int64_t m, n, k;

  __device__ DeltaBlock(const DeltaSlice<T>& s, int64_t i)
      : slice(s),
        index(i),
        at(s.rule, s.decays, s.first_chunk + i / (s.rule.batch * s.rule.heads),
           i % (s.rule.batch * s.rule.heads)),
        m(at.size()),
        n(at.size()),
        k(at.size()) {}
  __device__ float FromStart(int64_t row) const { return at.decays.from_start[at.Gate(row)]; }
  __device__ float ToEnd(int64_t row) const { return at.decays.to_end[at.Gate(row)]; }
  __device__ float Beta(int64_t row) const { return at.Dt(row); }
  __device__ float Q(int64_t row, int64_t i) const { return at.C(row, i); }
  __device__ float K(int64_t row, int64_t i) const { return at.B(row, i); }
  __device__ float V(int64_t row, int64_t j) const { return at.X(row, j); }
  __device__ float& Square(float* squares, int64_t t, int64_t s) const {
    return squares[(index * slice.Side() + t) * slice.Side() + s];
  }
  __device__ float& OfValues(float* panels, int64_t t, int64_t j) const {
    return panels[(index * slice.Side() + t) * slice.rule.dim + j];
  }
  __device__ float& OfKeys(float* panels, int64_t t, int64_t i) const {
    return panels[(index * slice.Side() + t) * slice.rule.state + i];
  }
  // Element (i, j) of the state at the chunk's start, out of those of all chunks.
  __device__ float State(const float* states, int64_t i, int64_t j) const {
    return states[(at.Index() * slice.rule.state + i) * slice.rule.dim + j];
  }
  // Of the slice's.
  __device__ float Gradient(int64_t i, int64_t j) const {
    return slice.gradients[(index * slice.rule.state + i) * slice.rule.dim + j];
  }
};

template <typename Part, typename T, typename Extra>
struct DeltaOp {
  DeltaSlice<T> slice;
  Extra extra;
  using Block = Part;
  __device__ Part At(int64_t index) const { return Part(slice, index, extra); }
};

// Launches Part(slice, index, extra) for every head of every chunk of the slice, of at most m x n each.
template <typename Part, typename T, typename Extra>
cudaError_t LaunchDelta(const DeltaSlice<T>& slice, const Extra& extra, int64_t m, int64_t n,
                        cudaStream_t stream) {
  return LaunchDeltaProducts(DeltaOp<Part, T, Extra>{slice, extra}, slice.chunks * slice.rule.all_heads(), m,
                             n, stream);
}

// The slice's B and P; with B known its W and U.
template <typename T>
cudaError_t FillGramAndScores(const DeltaSlice<T>& slice, cudaStream_t stream);
template <typename T>
cudaError_t SolveKeys(const DeltaSlice<T>& slice, cudaStream_t stream);
template <typename T>
cudaError_t SolveValues(const DeltaSlice<T>& slice, cudaStream_t stream);
// delta = T residual, and ddelta = T^T ddelta in place.
template <typename T>
cudaError_t SolveResidual(const DeltaSlice<T>& slice, cudaStream_t stream);
template <typename T>
cudaError_t SolveTransposed(const DeltaSlice<T>& slice, cudaStream_t stream);

// The state from chunk to chunk of a slice. Columns [begin, end) of [V | K]: the first are those of states,
// the others of transitions, which start from the identity. Forward reads U from `delta` and leaves delta
// there; backward reads P^T do from `ddelta` and leaves the gradient of delta. Where a pointer is null
// nothing is written.
template <typename T>
struct DeltaScan {
  ScanOrder order = ScanOrder::kForward;
  int64_t begin = 0, end = 0;
  const float* initial = nullptr;  // [segments, batch * heads, K, V], null: 0
  float* states = nullptr;         // [chunks, batch * heads, K, V], before each chunk in the scan's order
  float* slice_states = nullptr;   // the same for the slice's chunks
  CudaSsdSummary summary = {};
  StridedRows<const T> dout = {};  // backward
};
template <typename T>
cudaError_t ScanDelta(const DeltaSlice<T>& slice, const DeltaScan<T>& scan, cudaStream_t stream);

// Calls step(slice) for slices of chunks in the order of the scan.
template <typename T, typename Step>
cudaError_t ForEachSlice(DeltaSlice<T> slice, ScanOrder order, const Step& step) {
  const int64_t all = slice.rule.chunks.chunks(), slices = CeilDiv(all, slice.most_chunks);
  for (int64_t i = 0; i < slices; ++i) {
    slice.first_chunk = (order == ScanOrder::kForward ? i : slices - 1 - i) * slice.most_chunks;
    slice.chunks = std::min(slice.most_chunks, all - slice.first_chunk);
    const cudaError_t error = step(slice);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// P^T do into ddelta.
template <typename T>
cudaError_t FillDeltaGradient(const DeltaSlice<T>& slice, StridedRows<const T> dout, cudaStream_t stream);

}  // namespace annulus::kernels
