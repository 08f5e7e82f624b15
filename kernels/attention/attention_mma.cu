#include <limits>

#include "attention_mma.h"
#include "attention_mma_launch.cuh"
#include "mma_primitives.cuh"

namespace annulus::kernels {
namespace {

// Dimensions of grids besides the first, and rows in 32 bits.
constexpr int64_t kMaxGrid = 65535, kMaxRows = std::numeric_limits<int32_t>::max() - 1024;

template <typename T>
bool Aligned(const CudaHeads<T>& x) {
  constexpr int64_t kElements = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.row_stride % kElements == 0 &&
         x.batch_stride % kElements == 0;
}

bool Valid(const MmaAttentionBlock& block) {
  return MmaAttentionSupports(block.dim, block.v_dim) && 0 <= block.q_rows && block.q_rows <= kMaxRows &&
         0 <= block.k_rows && block.k_rows <= kMaxRows && 0 <= block.batch && block.batch <= kMaxGrid &&
         0 <= block.heads && block.heads <= kMaxGrid &&
         (block.heads == 0 || (block.kv_heads > 0 && block.heads % block.kv_heads == 0)) &&
         block.key_offset >= 0 && block.key_stride >= 1 && block.scale > 0 && Aligned(block.q) &&
         Aligned(block.k) && Aligned(block.v);
}

int64_t RoundUp(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

struct Workspace {
  int64_t padded_rows, query_tiles;
  int64_t ranges, bounds, bytes;  // where the tables after the stats begin, and the end

  explicit Workspace(const MmaAttentionBlock& block) {
    const int64_t queries = BackwardQueries(block.dim);
    padded_rows = RoundUp(block.q_rows, queries);
    query_tiles = padded_rows / queries;
    ranges = block.batch * block.heads * padded_rows * static_cast<int64_t>(sizeof(RowStats));
    bounds = ranges + block.batch * padded_rows * static_cast<int64_t>(sizeof(KeyRows));
    bytes = bounds + block.batch * query_tiles * static_cast<int64_t>(sizeof(TileBounds));
  }
};

// One thread per query row, one block per query tile.
template <int kQueries>
__global__ void FillRanges(const __grid_constant__ MmaAttentionBlock block, int64_t padded_rows,
                           KeyRows* ranges, TileBounds* bounds) {
  __shared__ KeyRows shared[kQueries];
  const int64_t first = int64_t{blockIdx.x} * kQueries, item = blockIdx.y;
  const TileBounds all = LoadKeyRows<kQueries, kQueries>(block, first, item, shared);
  ranges[item * padded_rows + first + threadIdx.x] = shared[threadIdx.x];
  if (threadIdx.x == 0) bounds[item * gridDim.x + blockIdx.x] = all;
}

// One thread per query row.
__global__ void FillStats(const __grid_constant__ MmaAttentionBlock block, const float* lse,
                          const float* delta, int64_t padded_rows, RowStats* stats) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, item = blockIdx.y;
  if (row >= padded_rows) return;
  for (int64_t head = 0; head < block.heads; ++head) {
    RowStats to{kInfinity, 0};
    if (row < block.q_rows) {
      const int64_t from = (row * block.batch + item) * block.heads + head;
      if (lse[from] != -kInfinity) to = {fmaf(lse[from], kLog2E, -kWeightExponent), delta[from]};
    }
    stats[(item * block.heads + head) * padded_rows + row] = to;
  }
}

cudaError_t FillTables(const MmaAttentionBlock& block, const MmaAttentionGradients& gradients,
                       char* workspace, BackwardTables* tables, cudaStream_t stream) {
  const Workspace layout(block);
  auto* stats = reinterpret_cast<RowStats*>(workspace);
  auto* ranges = reinterpret_cast<KeyRows*>(workspace + layout.ranges);
  auto* bounds = reinterpret_cast<TileBounds*>(workspace + layout.bounds);
  *tables = {stats, ranges, bounds, layout.padded_rows, static_cast<int>(layout.query_tiles)};
  const dim3 tiles(static_cast<unsigned>(layout.query_tiles), static_cast<unsigned>(block.batch));
  if (BackwardQueries(block.dim) == 32) {
    FillRanges<32><<<tiles, 32, 0, stream>>>(block, layout.padded_rows, ranges, bounds);
  } else {
    FillRanges<64><<<tiles, 64, 0, stream>>>(block, layout.padded_rows, ranges, bounds);
  }
  const dim3 rows(static_cast<unsigned>((layout.padded_rows + 127) / 128),
                  static_cast<unsigned>(block.batch));
  FillStats<<<rows, 128, 0, stream>>>(block, gradients.lse, gradients.delta, layout.padded_rows, stats);
  return cudaGetLastError();
}

}  // namespace

bool MmaAttentionSupports(int64_t dim, int64_t v_dim) {
  return (dim == 64 && v_dim == 64) || (dim == 128 && v_dim == 128) || (dim == 192 && v_dim == 128);
}

cudaError_t MmaAttentionForward(const MmaAttentionBlock& block, const MmaAttentionPartial& partial,
                                cudaStream_t stream) {
  if (!Valid(block) || !Aligned(partial.out) || !Aligned(partial.result)) return cudaErrorInvalidValue;
  if (block.q_rows == 0 || block.batch == 0 || block.heads == 0) return cudaSuccess;
  const auto launch = block.dim == 64 ? ForwardDim64 : block.dim == 128 ? ForwardDim128 : ForwardDim192;
  return launch(block, partial, stream);
}

int64_t MmaAttentionBackwardWorkspaceBytes(const MmaAttentionBlock& block) { return Workspace(block).bytes; }

cudaError_t MmaAttentionBackward(const MmaAttentionBlock& block, const MmaAttentionGradients& gradients,
                                 MmaQueryGradient query_gradient, void* workspace, cudaStream_t stream) {
  if (!Valid(block) || !Aligned(gradients.dout) || !Aligned(gradients.dq) || !Aligned(gradients.dk) ||
      !Aligned(gradients.dv) || reinterpret_cast<uintptr_t>(workspace) % 16 != 0) {
    return cudaErrorInvalidValue;
  }
  if (block.q_rows == 0 || block.k_rows == 0 || block.batch == 0 || block.heads == 0) return cudaSuccess;
  BackwardTables tables;
  const cudaError_t error = FillTables(block, gradients, static_cast<char*>(workspace), &tables, stream);
  if (error != cudaSuccess) return error;
  const bool ordered = query_gradient == MmaQueryGradient::kOrdered;
  switch (block.dim) {
    case 64:
      return (ordered ? BackwardOrderedDim64 : BackwardDim64)(block, gradients, tables, stream);
    case 128:
      return (ordered ? BackwardOrderedDim128 : BackwardDim128)(block, gradients, tables, stream);
    default:
      return (ordered ? BackwardOrderedDim192 : BackwardDim192)(block, gradients, tables, stream);
  }
}

}  // namespace annulus::kernels
