// Times blocks as an exchange makes them: chunks of a sequence with documents, and few KV heads.

#include <cmath>
#include <random>

#include "cuda/attention_mma/timing.cuh"
#include "cuda/attention_mma/timing.h"
#include "kernels/attention/attention_mma.h"

namespace annulus::testing {
namespace {

using kernels::MmaQueryGradient;

constexpr int64_t kDim = 128;

// Where the document of each row starts; lengths up to twice the mean.
std::vector<int64_t> DocumentStarts(int64_t rows, int64_t mean) {
  std::mt19937 rng(1);
  std::vector<int64_t> starts(Size(rows));
  int64_t start = 0, end = 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (mean > 0 && i == end) start = i, end = i + 1 + static_cast<int64_t>(rng() % Size(2 * mean));
    starts[Size(i)] = start;
  }
  return starts;
}

// Documents of that mean length, 0: one.
void TimeBlock(int64_t rows, int64_t heads, int64_t kv_heads, int64_t mean) {
  const int64_t q_size = rows * heads * kDim, k_size = rows * kv_heads * kDim;
  const int64_t q_stride = heads * kDim, k_stride = kv_heads * kDim;
  const DeviceArray<bf16> q(q_size), k(k_size), v(k_size), dout(q_size);
  const DeviceArray<float> out(q_size), dq(q_size), dk(k_size), dv(k_size);
  const DeviceArray<float> lse(std::vector<float>(Size(rows * heads), -INFINITY)),
      delta(std::vector<float>(Size(rows * heads), 0));
  for (const auto* x : {&q, &dout}) FillRandom<<<1024, 256>>>(x->data, q_size, 1);
  for (const auto* x : {&k, &v}) FillRandom<<<1024, 256>>>(x->data, k_size, 2);
  for (const auto* x : {&dk, &dv}) CUDA(cudaMemset(x->data, 0, Size(k_size) * sizeof(float)));
  CUDA(cudaMemset(dq.data, 0, Size(q_size) * sizeof(float)));
  const std::vector<int64_t> lo = DocumentStarts(rows, mean);
  std::vector<int64_t> hi(Size(rows));
  double pairs = 0;
  for (int64_t i = 0; i < rows; ++i) {
    hi[Size(i)] = i + 1;
    pairs += static_cast<double>((i + 1 - lo[Size(i)]) * heads);
  }
  const DeviceArray<int64_t> dlo(lo), dhi(hi);
  const kernels::MmaAttentionBlock block{.q = {q.data, q_stride, q_stride},
                                         .k = {k.data, k_stride, k_stride},
                                         .v = {v.data, k_stride, k_stride},
                                         .q_rows = rows,
                                         .k_rows = rows,
                                         .batch = 1,
                                         .heads = heads,
                                         .kv_heads = kv_heads,
                                         .dim = kDim,
                                         .v_dim = kDim,
                                         .lo = dlo.data,
                                         .hi = dhi.data,
                                         .scale = 0.09f};
  const double forward = MedianSeconds(
      [&] { CUDA(MmaAttentionForward(block, {{out.data, q_stride, q_stride}, lse.data, {}}, nullptr)); }, 5);
  const kernels::MmaAttentionGradients gradients{{dout.data, q_stride, q_stride},
                                                 lse.data,
                                                 delta.data,
                                                 {dq.data, q_stride, q_stride},
                                                 {dk.data, k_stride, k_stride},
                                                 {dv.data, k_stride, k_stride}};
  double backward[2];
  for (const MmaQueryGradient mode : {MmaQueryGradient::kAtomic, MmaQueryGradient::kOrdered}) {
    const DeviceArray<char> workspace(MmaAttentionBackwardWorkspaceBytes(block, mode));
    backward[mode == MmaQueryGradient::kOrdered] = MedianSeconds(
        [&] { CUDA(MmaAttentionBackward(block, gradients, mode, workspace.data, nullptr)); }, 5);
  }
  const auto tflops = [&](int products, double seconds) {
    return 2e-12 * static_cast<double>(products * kDim) * pairs / seconds;
  };
  std::printf(
      "%6ld rows, heads %2ld/%-2ld, documents %5ld: forward %8.3f ms %5.0f TFLOP/s, backward %8.3f ms "
      "%5.0f, ordered %8.3f ms %5.0f\n",
      long(rows), long(heads), long(kv_heads), long(mean), forward * 1e3, tflops(2, forward),
      backward[0] * 1e3, tflops(5, backward[0]), backward[1] * 1e3, tflops(5, backward[1]));
}

}  // namespace

void TimeHeads() {
  for (const auto& [rows, mean] :
       {std::pair<int64_t, int64_t>{2048, 1024}, {4096, 0}, {4096, 4096}, {16384, 0}, {16384, 4096}}) {
    for (const auto& [heads, kv_heads] :
         {std::pair<int64_t, int64_t>{16, 16}, {32, 8}, {16, 4}, {16, 1}, {4, 4}}) {
      TimeBlock(rows, heads, kv_heads, mean);
    }
  }
}

}  // namespace annulus::testing
