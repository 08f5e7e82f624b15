#include "cuda/attention_hopper/op_reference.h"

namespace annulus::testing {
namespace {

constexpr int kThreads = 192, kWarps = kThreads / 32;  // a thread per column of the widest head

__device__ double Bf16(double x) { return __bfloat162float(__float2bfloat16(static_cast<float>(x))); }

// How a solution rounds in between.
struct Exactly {
  __device__ explicit Exactly(uint32_t, int64_t) {}
  __device__ double operator()(double x) const { return x; }
};
class Naively {
 public:
  __device__ Naively(uint32_t realization, int64_t row) {
    const uint64_t h = (static_cast<uint64_t>(row) + (uint64_t{realization} << 40)) * 0x9E3779B97F4A7C15ull;
    multiple_ = realization == 0 ? 1 : 1 + static_cast<double>((h ^ (h >> 29)) >> 40) * 0x1p-24;
  }
  __device__ double operator()(double x) const { return Bf16(x * multiple_) / multiple_; }

 private:
  double multiple_;  // from 1 to 2
};

__device__ double WarpSum(double x) {
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  return x;
}

template <typename Op>
__device__ double BlockReduce(double x, Op op) {
  __shared__ double of_thread[kThreads];
  __syncthreads();
  of_thread[threadIdx.x] = x;
  __syncthreads();
  double all = of_thread[0];
  for (int i = 1; i < kThreads; ++i) all = op(all, of_thread[i]);
  return all;
}

__device__ const bf16* Head(const CudaHeads<const bf16>& x, int64_t row, int64_t item, int64_t head,
                            int64_t dim) {
  return x.data + row * x.row_stride + item * x.batch_stride + head * dim;
}

// The warp's lanes share the columns.
__device__ double Dot(const bf16* x, const bf16* y, int64_t n) {
  double sum = 0;
  for (int64_t d = threadIdx.x % 32; d < n; d += 32)
    sum += static_cast<double>(__bfloat162float(x[d])) * static_cast<double>(__bfloat162float(y[d]));
  return WarpSum(sum);
}

template <typename Rounding>
__global__ void SolveRow(OpProblem p, uint32_t realization, ResultArrays to) {
  extern __shared__ double weights[];  // [k_rows], and of their gradients
  double* const dscores = weights + p.k_rows;
  const int64_t row = blockIdx.x, item = blockIdx.y / p.heads, head = blockIdx.y % p.heads;
  const int64_t kv_head = head / (p.heads / p.kv_heads), token = row * p.batch + item;
  const int64_t lo = p.lo[token], hi = p.hi[token], stat = token * p.heads + head, d = threadIdx.x;
  const Rounding rounded(realization, stat);
  if (lo >= hi) {
    if (d == 0) to.of[kLse][stat] = -INFINITY;
    return;
  }
  const bf16 *const q = Head(p.q, row, item, head, p.dim), *const dout =
                                                               Head(p.dout, row, item, head, p.v_dim);
  const auto k = [&](int64_t j) { return Head(p.k, j, item, kv_head, p.dim); };
  const auto v = [&](int64_t j) { return Head(p.v, j, item, kv_head, p.v_dim); };
  const int64_t gradient_head = p.keys_by_query_head ? head : kv_head;
  const auto key = [&](int64_t j) { return (j * p.batch + item) * p.gradient_heads() + gradient_head; };
  const auto column = [](const bf16* x, int64_t at) { return static_cast<double>(__bfloat162float(x[at])); };

  for (int64_t j = lo + d / 32; j < hi; j += kWarps) weights[j] = p.scale * Dot(q, k(j), p.dim);
  __syncthreads();
  double largest = -INFINITY, sum = 0;
  for (int64_t j = lo + d; j < hi; j += kThreads) largest = fmax(largest, weights[j]);
  largest = BlockReduce(largest, [](double x, double y) { return fmax(x, y); });
  for (int64_t j = lo + d; j < hi; j += kThreads) sum += exp(weights[j] - largest);
  const auto plus = [](double x, double y) { return x + y; };
  const double lse = largest + log(BlockReduce(sum, plus));
  for (int64_t j = lo + d; j < hi; j += kThreads) weights[j] = exp(weights[j] - lse);
  __syncthreads();

  double out = 0;
  for (int64_t j = lo; j < hi && d < p.v_dim; ++j) out += rounded(weights[j]) * column(v(j), d);
  out = rounded(out);
  if (d < p.v_dim) to.of[kOut][stat * p.v_dim + d] = out;
  if (d == 0) to.of[kLse][stat] = lse;
  const double delta = BlockReduce(d < p.v_dim ? out * column(dout, d) : 0, plus);

  for (int64_t j = lo + d / 32; j < hi; j += kWarps)
    dscores[j] = p.scale * rounded(weights[j] * (Dot(dout, v(j), p.v_dim) - delta));
  __syncthreads();
  double dq = 0;
  for (int64_t j = lo; j < hi; ++j) {
    if (d < p.dim) {
      dq += dscores[j] * column(k(j), d);
      atomicAdd(&to.of[kDk][key(j) * p.dim + d], dscores[j] * column(q, d));
    }
    if (d < p.v_dim) atomicAdd(&to.of[kDv][key(j) * p.v_dim + d], rounded(weights[j]) * column(dout, d));
  }
  if (d < p.dim) to.of[kDq][stat * p.dim + d] = dq;
}

__global__ void SumRoundedHeadsKernel(const double* of_heads, int64_t group, int64_t dim, double* sums,
                                      int64_t n) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= n) return;
  double sum = 0;
  for (int64_t head = 0; head < group; ++head) sum += Bf16(of_heads[(i / dim * group + head) * dim + i % dim]);
  sums[i] = sum;
}

// Of numbers that are not negative, by their bits.
__device__ void AtomicMax(double* to, double x) {
  atomicMax(reinterpret_cast<unsigned long long*>(to),
            static_cast<unsigned long long>(__double_as_longlong(x)));
}

template <typename T>
__global__ void CompareKernel(const T* got, Stored stored, const double* exact, int64_t n, Deviation* to) {
  double error = 0;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    double x;
    if constexpr (std::is_same_v<T, bf16>) x = __bfloat162float(got[i]);
    if constexpr (!std::is_same_v<T, bf16>) x = got[i];
    if (stored == Stored::kBf16) x = Bf16(x);
    const bool right = isinf(exact[i]) ? x == exact[i] : isfinite(x);
    if (!right) atomicAdd(&to->wrong, 1);
    if (right && !isinf(exact[i])) error = fmax(error, fabs(x - exact[i]));
  }
  AtomicMax(&to->error, error);
}

__global__ void FillNormalKernel(bf16* x, int64_t n, float deviation, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t h = (static_cast<uint64_t>(i) + (uint64_t{seed} << 36)) * 0x9E3779B97F4A7C15ull;
    h ^= h >> 29;
    h *= 0xBF58476D1CE4E5B9ull;
    h ^= h >> 32;
    const float u = (static_cast<float>(h & 0xFFFFFF) + 1) * 0x1p-24f,
                angle = static_cast<float>(h >> 40) * 0x1p-24f;
    x[i] = __float2bfloat16(deviation * sqrtf(-2 * logf(u)) * cospif(2 * angle));
  }
}

__global__ void CountKernel(const unsigned char* x, const unsigned char* y, int64_t n,
                            unsigned long long* count) {
  unsigned long long different = 0;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x)
    different += x[i] != y[i];
  if (different > 0) atomicAdd(count, different);
}

__global__ void TouchKernel(const int4* address, int4* to) { *to = *address; }

constexpr int kBlocks = 264;

using Kernel = void(OpProblem problem, uint32_t realization, ResultArrays results);
void Solve(Kernel* kernel, const OpProblem& p, uint32_t realization, const ResultArrays& results,
           cudaStream_t stream) {
  const std::array<int64_t, kResults> sizes = p.sizes();
  for (size_t i = 0; i < kResults; ++i) CUDA(cudaMemsetAsync(results.of[i], 0, Size(sizes[i]) * 8, stream));
  const dim3 grid(static_cast<unsigned>(p.q_rows), static_cast<unsigned>(p.batch * p.heads));
  kernel<<<grid, kThreads, 2 * Size(p.k_rows) * sizeof(double), stream>>>(p, realization, results);
  CUDA(cudaGetLastError());
}

}  // namespace

void SolveExactly(const OpProblem& problem, const ResultArrays& results, cudaStream_t stream) {
  Solve(SolveRow<Exactly>, problem, 0, results, stream);
}
void SolveNaively(const OpProblem& problem, uint32_t realization, const ResultArrays& results,
                  cudaStream_t stream) {
  Solve(SolveRow<Naively>, problem, realization, results, stream);
}

void SumRoundedHeads(const double* of_heads, int64_t group, int64_t dim, double* sums, int64_t n,
                     cudaStream_t stream) {
  SumRoundedHeadsKernel<<<static_cast<unsigned>((n + 255) / 256), 256, 0, stream>>>(of_heads, group, dim, sums,
                                                                                   n);
  CUDA(cudaGetLastError());
}

template <typename T>
Deviation Compare(const T* got, Stored stored, const double* exact, int64_t n, cudaStream_t stream) {
  const DeviceArray<Deviation> on_device(std::vector<Deviation>(1));
  CompareKernel<<<kBlocks, 256, 0, stream>>>(got, stored, exact, n, on_device.data);
  CUDA(cudaGetLastError());
  Deviation deviation;
  CUDA(cudaMemcpyAsync(&deviation, on_device.data, sizeof deviation, cudaMemcpyDeviceToHost, stream));
  CUDA(cudaStreamSynchronize(stream));
  return deviation;
}
template Deviation Compare(const float*, Stored, const double*, int64_t, cudaStream_t);
template Deviation Compare(const bf16*, Stored, const double*, int64_t, cudaStream_t);
template Deviation Compare(const double*, Stored, const double*, int64_t, cudaStream_t);

void FillNormal(bf16* x, int64_t n, double deviation, uint32_t seed, cudaStream_t stream) {
  FillNormalKernel<<<kBlocks, 256, 0, stream>>>(x, n, static_cast<float>(deviation), seed);
  CUDA(cudaGetLastError());
}

void CountDifferentBytes(const void* x, const void* y, int64_t n, unsigned long long* count,
                         cudaStream_t stream) {
  CountKernel<<<kBlocks, 256, 0, stream>>>(static_cast<const unsigned char*>(x),
                                           static_cast<const unsigned char*>(y), n, count);
  CUDA(cudaGetLastError());
}

void Touch(const void* address, cudaStream_t stream) {
  const DeviceArray<int4> to(1);
  TouchKernel<<<1, 1, 0, stream>>>(static_cast<const int4*>(address), to.data);
  cudaStreamSynchronize(stream);
}

}  // namespace annulus::testing
