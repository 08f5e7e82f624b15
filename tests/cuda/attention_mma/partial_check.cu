#include <random>

#include "cuda/attention_mma/comparison.h"
#include "cuda/attention_mma/device_arrays.h"
#include "cuda/attention_mma/partial_check.h"
#include "kernels/attention/attention_partial_cuda.h"

namespace annulus::testing {
namespace {

struct Shape {
  int64_t rows, batch, heads, v_dim;
};

bool Report(const char* what, const Shape& s, const Comparison& comparison) {
  std::printf("%s %s %ld x %ld x %ld x %ld%s\n", comparison.ok ? "ok  " : "FAIL", what, long(s.rows),
              long(s.batch), long(s.heads), long(s.v_dim), comparison.text.c_str());
  return comparison.ok;
}

bool CheckReset(const Shape& s) {
  const size_t stats = Size(s.rows * s.batch * s.heads);
  StridedHeads<float> out(s.rows, s.batch, s.heads * s.v_dim, false);
  out.Upload(std::vector<float>(stats * Size(s.v_dim), NAN));
  const GuardedArray<float> lse(std::vector<float>(stats, NAN));
  CUDA(kernels::CudaResetPartial({s.rows, s.batch, s.heads, s.v_dim, out.Heads<float>(), lse.data()},
                                 nullptr));
  CUDA(cudaDeviceSynchronize());
  Comparison comparison;
  bool intact = true;
  comparison.Require(out.Download(&intact) == std::vector<float>(stats * Size(s.v_dim), 0), "out");
  comparison.Require(lse.Download(&intact) == std::vector<float>(stats, -INFINITY), "lse");
  comparison.Require(intact, "guards");
  return Report("reset", s, comparison);
}

template <typename T>
bool CheckDelta(const char* name, const Shape& s) {
  const size_t stats = Size(s.rows * s.batch * s.heads), v_dim = Size(s.v_dim);
  std::mt19937 rng(7);
  std::normal_distribution<double> normal;
  std::vector<double> x(stats * v_dim), y(x.size()), want(stats), naive(stats);
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = RoundTo<T>(normal(rng));
    y[i] = RoundTo<T>(normal(rng));
    want[i / v_dim] += x[i] * y[i];
  }
  for (size_t i = 0; i < stats; ++i) {
    float sum = 0;
    for (size_t d = i * v_dim; d < (i + 1) * v_dim; ++d) sum += static_cast<float>(x[d] * y[d]);
    naive[i] = sum;
  }
  StridedHeads<T> out(s.rows, s.batch, s.heads * s.v_dim, false),
      dout(s.rows, s.batch, s.heads * s.v_dim, false);
  out.Upload(Convert<T>(x));
  dout.Upload(Convert<T>(y));
  const GuardedArray<float> delta(std::vector<float>(stats, NAN));
  CUDA(kernels::CudaAttentionDelta<T>({s.rows, s.batch, s.heads, s.v_dim, out.template Heads<const T>(),
                                       dout.template Heads<const T>(), delta.data()},
                                      nullptr));
  CUDA(cudaDeviceSynchronize());
  Comparison comparison;
  bool intact = true;
  comparison.Compare(name, Doubles(delta.Download(&intact)), want, naive);
  comparison.Require(intact, "guards");
  return Report("delta", s, comparison);
}

}  // namespace

bool CheckPartialPasses() {
  bool ok = true;
  // Vectors of 16 bytes and not, heads of less than a vector, fewer and more than a warp's 32 vectors.
  for (const Shape& s : {Shape{0, 2, 3, 64},
                         {1, 1, 1, 1},
                         {33, 2, 3, 128},
                         {7, 3, 2, 40},
                         {129, 1, 5, 192},
                         {10, 2, 3, 5},
                         {9, 2, 1, 300}}) {
    ok = CheckReset(s) && ok;
    ok = CheckDelta<float>("f32", s) && ok;
    ok = CheckDelta<bf16>("bf16", s) && ok;
  }
  return ok;
}

}  // namespace annulus::testing
