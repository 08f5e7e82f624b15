// The state of the gated delta rule from chunk to chunk, forward and backward: the part of it that cannot go
// in parallel. A CTA takes 32 columns of one head through all chunks of a slice, two products a chunk on
// tensor cores, while what the next product reads is on its way.
//
// What takes the time is this chain: 10 us a chunk of 64 rows and 128 keys on H200, for the latency of two
// products and their reads, with 64 of its SMs at work for 16 heads of 128 values.

#include "kernels/delta_rule/delta_slice.cuh"

namespace annulus::kernels {
namespace {

// Matrices have whole tiles of 16 rows and of 16 keys, zeros where there are none.
//   shared memory: matrix [rows, K + 8], state [K, 40], panel [rows, 40]
constexpr int kScanColumns = 32, kScanWarps = 8, kProductTileSide = 16;
// From a row to the next one, such that a warp's fragments are on all banks: of a right operand, and beyond
// the row's length of a left operand as it is and transposed.
constexpr int kScanStride = kScanColumns + 8, kLeftPad = 4, kTransposedPad = 8;

__host__ __device__ constexpr int WholeTiles(int64_t n) {
  return static_cast<int>((n + kProductTileSide - 1) / kProductTileSide * kProductTileSide);
}

template <typename T>
class ScanColumns {
 public:
  __device__ ScanColumns(const DeltaSlice<T>& slice, const DeltaScan<T>& scan, float* memory)
      : slice_(slice),
        scan_(scan),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32),
        keys_(static_cast<int>(slice.rule.state)),
        key_tiles_(WholeTiles(keys_)),
        first_column_(scan.begin + int64_t{blockIdx.y} * kScanColumns),
        matrix_(memory),
        state_(memory + WholeTiles(slice.Side()) * (key_tiles_ + kTransposedPad)),
        panel_(state_ + key_tiles_ * kScanStride) {}

  __device__ void Run() {
    for (int e = static_cast<int>(threadIdx.x); e < key_tiles_ * kScanStride; e += 32 * kScanWarps)
      state_[e] = 0;
    __syncthreads();
    const int64_t heads = slice_.rule.batch * slice_.rule.heads;
    for (int64_t i = 0; i < slice_.chunks; ++i) {
      const int64_t chunk = scan_.order == ScanOrder::kForward ? i : slice_.chunks - 1 - i;
      const DeltaBlock<T> block(slice_, chunk * heads + blockIdx.x);
      const bool forward = scan_.order == ScanOrder::kForward;
      if (forward ? block.at.rows.first : block.at.rows.last) {
        Begin(block);
      } else if (i == 0) {
        ForState([&](int k, float* s) { *s = slice_.carry[CarryAt(k)]; });
      }
      Keep(block);
      if (forward) {
        Forward(block);
      } else {
        Backward(block);
      }
      if (forward ? block.at.rows.last : block.at.rows.first) Summarise(block);
      if (i + 1 == slice_.chunks) ForState([&](int k, float* s) { slice_.carry[CarryAt(k)] = *s; });
    }
  }

 private:
  // Of states, not of transitions.
  __device__ bool IsValue(int64_t column) const { return column < slice_.rule.dim; }
  // fn(row of the state, its element in this lane's column)
  template <typename Fn>
  __device__ void ForState(const Fn& fn) {
    if (Column() >= scan_.end) return;
    for (int k = warp_; k < keys_; k += kScanWarps) fn(k, state_ + k * kScanStride + lane_);
  }
  __device__ int64_t Column() const { return first_column_ + lane_; }
  __device__ int64_t CarryAt(int k) const {
    return (int64_t{blockIdx.x} * keys_ + k) * (slice_.rule.dim + keys_) + Column();
  }
  // Of [segments or chunks, batch * heads, K, V].
  __device__ int64_t StateAt(int64_t outer, int k) const {
    const int64_t heads = slice_.rule.batch * slice_.rule.heads;
    return ((outer * heads + blockIdx.x) * keys_ + k) * slice_.rule.dim + Column();
  }
  __device__ void Begin(const DeltaBlock<T>& block) {
    ForState([&](int k, float* s) {
      if (!IsValue(Column())) {
        *s = Column() - slice_.rule.dim == k ? 1 : 0;
      } else {
        *s = scan_.initial != nullptr ? scan_.initial[StateAt(block.at.rows.segment, k)] : 0;
      }
    });
  }
  __device__ void Keep(const DeltaBlock<T>& block) {
    if (!IsValue(Column())) return;
    ForState([&](int k, float* s) {
      if (scan_.states != nullptr) scan_.states[StateAt(block.at.chunk, k)] = *s;
      if (scan_.slice_states != nullptr) {
        scan_.slice_states[StateAt(block.at.chunk - slice_.first_chunk, k)] = *s;
      }
    });
  }
  __device__ void Summarise(const DeltaBlock<T>& block) {
    const int64_t heads = slice_.rule.batch * slice_.rule.heads, segment = block.at.rows.segment;
    const bool value = IsValue(Column());
    ForState([&](int k, float* s) {
      if (value && scan_.summary.state != nullptr) scan_.summary.state[StateAt(segment, k)] = *s;
      if (!value && scan_.summary.transition != nullptr) {
        scan_.summary
            .transition[((segment * heads + blockIdx.x) * keys_ + k) * keys_ + Column() - slice_.rule.dim] =
            *s;
      }
    });
  }

  // A matrix [t, k] = factor[t] row[t][k] on its way to shared memory. What a warp takes of it first, every
  // eighth row and a vector a lane, is all there is of most shapes: it is fetched when the matrix is made,
  // and other work goes on until it is placed.
  template <typename Element>
  struct Source {
    const Element* first;
    int64_t stride;
    const float* factors;  // null: 1
    int64_t factor_stride;
    __device__ float Factor(int t) const { return factors != nullptr ? factors[t * factor_stride] : 1.0f; }
  };
  template <typename Element>
  class Matrix {
   public:
    __device__ Matrix(ScanColumns& scan, int64_t rows, const Source<Element>& source)
        : scan_(scan), rows_(static_cast<int>(rows)), source_(source) {
      const bool aligned = reinterpret_cast<uintptr_t>(source.first) % (4 * sizeof(Element)) == 0;
      vectors_ = aligned && source.stride % 4 == 0 && scan.keys_ % 4 == 0;
      if (!vectors_) return;
#pragma unroll
      for (int i = 0; i < kFetched; ++i) {
        const int t = min(Row(i), rows_ - 1), k = min(4 * scan_.lane_, scan_.keys_ - 4);
        packs_[i] = LoadPack<4>(source_.first + t * source_.stride + k);
        factors_[i] = source_.Factor(t);
      }
    }
    // Rows `keys + pad` apart; between two barriers.
    __device__ void Place(int pad) const {
      __syncthreads();
      const int keys = scan_.key_tiles_, k = 4 * scan_.lane_;
      if (vectors_) {
#pragma unroll
        for (int i = 0; i < kFetched; ++i) {
          if (Row(i) >= WholeTiles(rows_) || k >= keys) continue;
          const bool inside = Row(i) < rows_ && k < scan_.keys_;
          float* to = scan_.matrix_ + Row(i) * (keys + pad) + k;
#pragma unroll
          for (int n = 0; n < 4; ++n) to[n] = inside ? factors_[i] * packs_[i][n] : 0;
        }
      }
      const int first_rows = vectors_ ? kFetched * kScanWarps : 0;  // of which the first 128 keys are placed
      for (int t = scan_.warp_; t < WholeTiles(rows_); t += kScanWarps) {
        for (int i = scan_.lane_ + (t < first_rows ? 128 : 0); i < keys; i += 32) {
          const bool inside = t < rows_ && i < scan_.keys_;
          scan_.matrix_[t * (keys + pad) + i] =
              inside ? source_.Factor(t) * ToFloat(source_.first[t * source_.stride + i]) : 0;
        }
      }
      __syncthreads();
    }

   private:
    static constexpr int kFetched = 8;
    __device__ int Row(int i) const { return scan_.warp_ + i * kScanWarps; }

    const ScanColumns& scan_;
    const int rows_;
    const Source<Element> source_;
    bool vectors_;
    Pack<Element, 4> packs_[kFetched];
    float factors_[kFetched];
  };

  // fn(row, column) with 16 x 16 of [rows, 32 columns] for each, spread over the warps.
  template <typename Fn>
  __device__ void ForTiles(int rows, const Fn& fn) const {
    for (int tile = warp_; tile < rows / kProductTileSide * 2; tile += kScanWarps) {
      fn(tile / 2 * kProductTileSide, tile % 2 * kProductTileSide);
    }
  }
  __device__ SharedMatrix Right(const float* data) const { return {data, kScanStride, 1}; }

  // panel = values + sign matrix state, which becomes the values. values: [rows, V] in device memory;
  // transitions have none.
  __device__ void FillPanel(const DeltaBlock<T>& block, float sign, float* values) {
    const int rows = static_cast<int>(block.m), dim = static_cast<int>(slice_.rule.dim);
    const int first = static_cast<int>(first_column_), end = static_cast<int>(scan_.end);
    ForTiles(WholeTiles(rows), [&](int row, int column) {
      ProductPart own{};
      const auto is_value = [&](int i, int j) {
        return row + i < rows && first + column + j < min(dim, end);
      };
      const auto value = [&](int i, int j) { return values + (row + i) * dim + first + column + j; };
      own.ForEach([&](int i, int j, float& x) {
        if (is_value(i, j)) x = *value(i, j);
      });
      own.Add(sign, WarpProduct({matrix_, key_tiles_ + kLeftPad, 1}, Right(state_), row, column, key_tiles_));
      own.ForEach([&](int i, int j, float& x) {
        const bool inside = row + i < rows && first + column + j < end;
        panel_[(row + i) * kScanStride + column + j] = inside ? x : 0;
        if (is_value(i, j)) *value(i, j) = x;
      });
    });
    __syncthreads();
  }
  // state = factor state + sign matrix^T panel
  __device__ void AddToState(const DeltaBlock<T>& block, float factor, float sign) {
    ForTiles(key_tiles_, [&](int row, int column) {
      ProductPart product = WarpProduct({matrix_, 1, key_tiles_ + kTransposedPad}, Right(panel_), row, column,
                                        WholeTiles(block.m));
      product.ForEach([&](int i, int j, float& x) {
        float* s = state_ + (row + i) * kScanStride + column + j;
        *s = factor * *s + sign * x;
      });
    });
  }

  __device__ Matrix<float> StartW(const DeltaBlock<T>& block) {
    return {*this, block.m, {&block.OfKeys(slice_.w, 0, 0), keys_, nullptr, 0}};
  }
  // Keys or queries, each times how much of it is left at the chunk's end or start.
  __device__ Matrix<T> Start(const DeltaBlock<T>& block, const StridedRows<const T>& of,
                             const float* decays) {
    return {*this,
            block.m,
            {block.at.At(of, 0, block.at.group(), keys_), of.row_stride, decays + block.at.Gate(0),
             slice_.rule.batch * slice_.rule.heads}};
  }

  __device__ void Forward(const DeltaBlock<T>& block) {
    const Matrix<float> w = StartW(block);
    const Matrix<T> keys = Start(block, slice_.rule.b, slice_.decays.to_end);
    w.Place(kLeftPad);
    FillPanel(block, -1, &block.OfValues(slice_.delta, 0, 0));
    keys.Place(kTransposedPad);
    AddToState(block, block.FromStart(block.m - 1), 1);
    __syncthreads();
  }

  __device__ void Backward(const DeltaBlock<T>& block) {
    const Matrix<T> keys = Start(block, slice_.rule.b, slice_.decays.to_end);
    const Matrix<float> w = StartW(block);
    keys.Place(kLeftPad);
    FillPanel(block, 1, &block.OfValues(slice_.ddelta, 0, 0));
    const Matrix<T> queries = Start(block, slice_.rule.c, slice_.decays.from_start);
    w.Place(kTransposedPad);
    AddToState(block, block.FromStart(block.m - 1), -1);
    queries.Place(kTransposedPad);
    for (int t = warp_; t < WholeTiles(block.m); t += kScanWarps) {
      const bool inside = t < block.m && Column() < scan_.end;
      panel_[t * kScanStride + lane_] = inside ? block.at.Of(scan_.dout, t, Column()) : 0;
    }
    __syncthreads();
    AddToState(block, 1, 1);
    __syncthreads();
  }

  const DeltaSlice<T>& slice_;
  const DeltaScan<T>& scan_;
  const int lane_, warp_, keys_, key_tiles_;
  const int64_t first_column_;
  float* matrix_;
  float* state_;
  float* panel_;
};

template <typename T>
__global__ void __launch_bounds__(32 * kScanWarps, 1)
    ScanKernel(const __grid_constant__ DeltaSlice<T> slice, const __grid_constant__ DeltaScan<T> scan) {
  extern __shared__ float memory[];
  ScanColumns<T>(slice, scan, memory).Run();
}

}  // namespace

template <typename T>
cudaError_t ScanDelta(const DeltaSlice<T>& slice, const DeltaScan<T>& scan, cudaStream_t stream) {
  if (slice.rule.all_heads() == 0 || scan.end == scan.begin) return cudaSuccess;
  const int rows = WholeTiles(slice.Side()), keys = WholeTiles(slice.rule.state);
  const int shared = 4 * (rows * (keys + kTransposedPad) + (keys + rows) * kScanStride);
  const cudaError_t error =
      cudaFuncSetAttribute(ScanKernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<uint32_t>(slice.rule.all_heads()),
                  static_cast<uint32_t>(CeilDiv(scan.end - scan.begin, kScanColumns)));
  ScanKernel<T><<<grid, 32 * kScanWarps, static_cast<size_t>(shared), stream>>>(slice, scan);
  return cudaGetLastError();
}

template cudaError_t ScanDelta(const DeltaSlice<float>&, const DeltaScan<float>&, cudaStream_t);
template cudaError_t ScanDelta(const DeltaSlice<__nv_bfloat16>&, const DeltaScan<__nv_bfloat16>&,
                               cudaStream_t);

}  // namespace annulus::kernels
