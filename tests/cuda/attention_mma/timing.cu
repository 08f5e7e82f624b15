// Times the passes of block attention, on tensor cores and in f32.

#include <cmath>
#include <string>

#include "cuda/attention_mma/device_arrays.h"
#include "cuda/attention_mma/timing.cuh"
#include "cuda/attention_mma/timing.h"
#include "cuda/attention_mma/variants.h"
#include "kernels/attention/attention_f32_cuda.h"
#include "kernels/attention/attention_mma.h"
#include "kernels/attention/attention_partial_cuda.h"

namespace annulus::testing {
namespace {

using kernels::MmaAttentionBlock;
using kernels::MmaAttentionGradients;
using kernels::MmaAttentionPartial;
using kernels::MmaQueryGradient;

template <typename T>
std::vector<double> DownloadRow(const T* data, int64_t at, int64_t n) {
  std::vector<T> host(Size(n));
  CUDA(cudaMemcpy(host.data(), data + at, Size(n) * sizeof(T), cudaMemcpyDeviceToHost));
  return Doubles(host);
}

}  // namespace

void Time(int64_t rows, int64_t heads, int64_t dim, int64_t v_dim, bool variants) {
  DeviceArray<bf16> q(rows * heads * dim), k(rows * heads * dim), v(rows * heads * v_dim),
      dout(rows * heads * v_dim), result(rows * heads * v_dim);
  FillRandom<<<1024, 256>>>(q.data, rows * heads * dim, 1);
  FillRandom<<<1024, 256>>>(k.data, rows * heads * dim, 2);
  FillRandom<<<1024, 256>>>(v.data, rows * heads * v_dim, 3);
  FillRandom<<<1024, 256>>>(dout.data, rows * heads * v_dim, 4);
  std::vector<int64_t> lo(Size(rows)), hi(Size(rows));
  for (int64_t i = 0; i < rows; ++i) hi[Size(i)] = i + 1;
  DeviceArray<int64_t> dlo(lo), dhi(hi);
  DeviceArray<float> out(rows * heads * v_dim), dq(rows * heads * dim), dk(rows * heads * dim),
      dv(rows * heads * v_dim), delta(rows * heads);
  const std::vector<float> nothing(Size(rows * heads), -INFINITY);
  DeviceArray<float> lse(nothing), no_keys(nothing);
  MmaAttentionBlock block{.q = {q.data, heads * dim, heads * dim},
                          .k = {k.data, heads * dim, heads * dim},
                          .v = {v.data, heads * v_dim, heads * v_dim},
                          .q_rows = rows,
                          .k_rows = rows,
                          .batch = 1,
                          .heads = heads,
                          .kv_heads = heads,
                          .dim = dim,
                          .v_dim = v_dim,
                          .lo = dlo.data,
                          .hi = dhi.data,
                          .scale = static_cast<float>(1 / std::sqrt(double(dim)))};
  const MmaAttentionPartial partial{{out.data, heads * v_dim, heads * v_dim}, lse.data, {}};
  const auto reset = [&] {
    CUDA(cudaMemcpyAsync(lse.data, no_keys.data, nothing.size() * sizeof(float), cudaMemcpyDeviceToDevice));
  };
  const double pairs = 0.5 * double(rows) * double(rows) * double(heads);
  const double forward_flop = pairs * 2 * double(dim + v_dim),
               backward_flop = pairs * 2 * double(3 * dim + 2 * v_dim);
  const auto report = [&](const std::string& name, double seconds, double flop) {
    std::printf("%-32s %6ld rows %3ld heads %3ld/%-3ld %8.3f ms %7.1f TFLOP/s\n", name.c_str(), long(rows),
                long(heads), long(dim), long(v_dim), seconds * 1e3, flop / seconds * 1e-12);
  };

  // The first block of a ring reads no carry; later ones do (here the same block again).
  report("forward, first block",
         MedianSeconds(
             [&] {
               reset();
               CUDA(kernels::MmaAttentionForward(block, partial, nullptr));
             },
             5),
         forward_flop);
  reset();
  const MmaAttentionPartial last{partial.out, partial.lse, {result.data, heads * v_dim, heads * v_dim}};
  CUDA(kernels::MmaAttentionForward(block, last, nullptr));
  CUDA(cudaDeviceSynchronize());
  const kernels::CudaAttentionDeltaArgs<bf16> delta_args{rows,
                                                         1,
                                                         heads,
                                                         v_dim,
                                                         {result.data, heads * v_dim, heads * v_dim},
                                                         {dout.data, heads * v_dim, heads * v_dim},
                                                         delta.data};
  const double delta_seconds =
      MedianSeconds([&] { CUDA(kernels::CudaAttentionDelta(delta_args, nullptr)); }, 5);
  std::printf("  delta: %.3f ms, %.0f GB/s read\n", delta_seconds * 1e3,
              4e-9 * double(rows * heads * v_dim) / delta_seconds);

  double error = 0;
  for (const int64_t row : {int64_t{77}, rows / 2 + 13, rows - 1}) {
    const int64_t head = row % heads;
    const std::vector<double> query = DownloadRow(q.data, (row * heads + head) * dim, dim),
                              keys = DownloadRow(k.data, 0, (row + 1) * heads * dim),
                              values = DownloadRow(v.data, 0, (row + 1) * heads * v_dim),
                              got = DownloadRow(out.data, (row * heads + head) * v_dim, v_dim);
    std::vector<double> want(Size(v_dim));
    double sum = 0;
    for (int64_t j = 0; j <= row; ++j) {
      double dot = 0;
      for (int64_t d = 0; d < dim; ++d) dot += query[Size(d)] * keys[Size((j * heads + head) * dim + d)];
      const double weight = std::exp(dot * block.scale);
      sum += weight;
      for (int64_t d = 0; d < v_dim; ++d)
        want[Size(d)] += weight * values[Size((j * heads + head) * v_dim + d)];
    }
    for (int64_t d = 0; d < v_dim; ++d) error = std::max(error, std::abs(got[Size(d)] - want[Size(d)] / sum));
  }
  std::printf("  three rows of O: max error %.1e\n", error);

  report("forward, carry",
         MedianSeconds([&] { CUDA(kernels::MmaAttentionForward(block, partial, nullptr)); }, 5),
         forward_flop);
  for (int i = 0; variants && i < kForwardVariantCount; ++i) {
    const ForwardVariant& variant = kForwardVariants[i];
    if (variant.dim != dim) continue;
    report(variant.name, MedianSeconds([&] { CUDA(variant.launch(block, partial, nullptr)); }, 5),
           forward_flop);
  }
  reset();
  CUDA(kernels::MmaAttentionForward(block, partial, nullptr));
  DeviceArray<char> workspace(kernels::MmaAttentionBackwardWorkspaceBytes(block, MmaQueryGradient::kOrdered));
  const MmaAttentionGradients gradients{{dout.data, heads * v_dim, heads * v_dim},
                                        lse.data,
                                        delta.data,
                                        {dq.data, heads * dim, heads * dim},
                                        {dk.data, heads * dim, heads * dim},
                                        {dv.data, heads * v_dim, heads * v_dim}};
  CUDA(cudaMemset(dq.data, 0, Size(rows * heads * dim) * 4));
  CUDA(cudaMemset(dk.data, 0, Size(rows * heads * dim) * 4));
  CUDA(cudaMemset(dv.data, 0, Size(rows * heads * v_dim) * 4));
  std::vector<double> sums[2];
  for (const MmaQueryGradient mode : {MmaQueryGradient::kAtomic, MmaQueryGradient::kOrdered}) {
    CUDA(cudaMemset(dq.data, 0, Size(rows * heads * dim) * 4));
    CUDA(kernels::MmaAttentionBackward(block, gradients, mode, workspace.data, nullptr));
    sums[mode == MmaQueryGradient::kOrdered] = DownloadRow(dq.data, 0, rows * heads * dim);
    report(
        mode == MmaQueryGradient::kAtomic ? "backward" : "backward, ordered",
        MedianSeconds(
            [&] { CUDA(kernels::MmaAttentionBackward(block, gradients, mode, workspace.data, nullptr)); }, 5),
        backward_flop);
  }
  double square = 0, norm = 0;
  for (size_t i = 0; i < sums[0].size(); ++i) {
    square += (sums[0][i] - sums[1][i]) * (sums[0][i] - sums[1][i]);
    norm += sums[1][i] * sums[1][i];
  }
  std::printf("  dQ atomic and ordered differ by %.1e of their norm\n", std::sqrt(square / norm));
  for (int i = 0; variants && i < kBackwardVariantCount; ++i) {
    const BackwardVariant& variant = kBackwardVariants[i];
    if (variant.dim != dim) continue;
    kernels::BackwardTables tables;
    CUDA(kernels::FillBackwardTables(block, gradients,
                                     {kernels::BackwardQueries(dim), MmaQueryGradient::kOrdered},
                                     workspace.data, &tables, nullptr));
    report(variant.name, MedianSeconds([&] { CUDA(variant.launch(block, gradients, tables, nullptr)); }, 5),
           backward_flop);
  }
}

void TimeF32(int64_t rows, int64_t heads, int64_t dim) {
  const int64_t n = rows * heads * dim, stride = heads * dim;
  const std::vector<float> some(Size(n), 0.01f);
  const DeviceArray<float> q(some), k(some), v(some), dout(some), out(n), dq(some), dk(some), dv(some);
  const DeviceArray<float> lse(std::vector<float>(Size(rows * heads), -INFINITY)),
      delta(std::vector<float>(Size(rows * heads), 0));
  std::vector<int64_t> lo(Size(rows)), hi(Size(rows));
  for (int64_t i = 0; i < rows; ++i) hi[Size(i)] = i + 1;
  const DeviceArray<int64_t> dlo(lo), dhi(hi);
  const kernels::CudaAttentionBlock<float> block{.q = {q.data, stride, stride},
                                                 .k = {k.data, stride, stride},
                                                 .v = {v.data, stride, stride},
                                                 .q_rows = rows,
                                                 .k_rows = rows,
                                                 .batch = 1,
                                                 .heads = heads,
                                                 .kv_heads = heads,
                                                 .dim = dim,
                                                 .v_dim = dim,
                                                 .lo = dlo.data,
                                                 .hi = dhi.data};
  const double pairs = 0.5 * double(rows) * double(rows) * double(heads) * double(dim);
  const double forward = MedianSeconds(
      [&] { CUDA(kernels::F32AttentionForward(block, {{out.data, stride, stride}, lse.data, {}}, nullptr)); },
      3);
  const double backward = MedianSeconds(
      [&] {
        CUDA(kernels::F32AttentionBackward(block,
                                           {{dout.data, stride, stride},
                                            lse.data,
                                            delta.data,
                                            {dq.data, stride, stride},
                                            {dk.data, stride, stride},
                                            {dv.data, stride, stride}},
                                           nullptr));
      },
      3);
  std::printf("f32 %ld rows %ld heads %ld: forward %.2f ms %.1f TFLOP/s, backward %.2f ms %.1f TFLOP/s\n",
              long(rows), long(heads), long(dim), forward * 1e3, 4 * pairs / forward * 1e-12, backward * 1e3,
              10 * pairs / backward * 1e-12);
}

}  // namespace annulus::testing
