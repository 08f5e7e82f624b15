#include "cuda/harness.h"
#include "kernels/adamw/adamw_cuda.h"
#include "kernels/elementwise/elementwise_cuda.h"
#include "kernels/embedding/embedding_cuda.h"
#include "kernels/rms_norm/rms_norm_cuda.h"
#include "kernels/rope/rope_cuda.h"
#include "kernels/swiglu/swiglu_cuda.h"

namespace annulus::testing {
namespace {

using namespace annulus::kernels;

double g_copy = 0;
void Report(const char* name, double bytes, double ms) {
  const double rate = bytes / ms * 1e-6;
  std::printf("time  %-34s %8.3f ms %7.0f GB/s  %5.1f%% of copy\n", name, ms, rate, 100 * rate / g_copy);
}

}  // namespace

void TimeElementwise() {
  const int64_t tokens = 32768, d = 4096, d_ff = 14336, heads = 32;
  const int64_t n = tokens * d, big = tokens * d_ff;
  Bf16 *a, *b, *c, *w;
  float *f, *g, *h, *k, *dw, *scratch;
  double* sums;
  Must(cudaMalloc(&a, 2 * big * 2), "malloc");
  Must(cudaMalloc(&b, 2 * big * 2), "malloc");
  Must(cudaMalloc(&c, big * 2), "malloc");
  Must(cudaMalloc(&w, d * 2), "malloc");
  for (float** p : {&f, &g, &h, &k}) Must(cudaMalloc(p, n * 4), "malloc");
  Must(cudaMalloc(&dw, 128256 * d * 4), "malloc");
  Must(cudaMalloc(&scratch, CudaRmsNormScratch(d) * 4), "malloc");
  Must(cudaMalloc(&sums, (kSumOfSquaresScratch + 1) * 8), "malloc");
  FillNormal(a, 2 * big, 1, 1), FillNormal(b, 2 * big, 1, 2), FillNormal(c, big, 1, 3),
      FillNormal(w, d, 1, 4);
  for (float* p : {f, g, h, k}) FillNormal(p, n, 1, 5);
  Must(CudaZero(h, n * 4, g_stream), "zero");
  const double N = static_cast<double>(n), B = static_cast<double>(big);
  double ms = Milliseconds(9, [&] { cudaMemcpyAsync(b, a, big * 4, cudaMemcpyDeviceToDevice, g_stream); });
  g_copy = 2 * B * 4 / ms * 1e-6;
  Report("copy (cudaMemcpyAsync)", 2 * B * 4, ms);
  ms = Milliseconds(9, [&] { CudaCast<Bf16, Bf16>(a, 2 * big, b, g_stream); });
  Report("copy (our kernel)", 2 * B * 4, ms);
  Report("cast f32 to bf16", 6 * N, Milliseconds(9, [&] { CudaCast<float, Bf16>(f, n, b, g_stream); }));
  Report("cast bf16 to f32", 6 * N, Milliseconds(9, [&] { CudaCast<Bf16, float>(a, n, g, g_stream); }));
  Report("add f32 += bf16", 10 * N, Milliseconds(9, [&] { CudaAdd<Bf16, float>(a, n, g, g_stream); }));
  Report("add rows f32 += bf16 (KV slice)", 10 * N / 4, Milliseconds(9, [&] {
           CudaAddRows<Bf16, float>({tokens, 1, d / 4}, {a, d, d}, {g, d / 4, d / 4}, g_stream);
         }));
  Report("sum of squares f32", 4 * N,
         Milliseconds(9, [&] { CudaSumOfSquares<float>(f, n, sums + 1, sums, g_stream); }));
  Report("sum of squares bf16", 2 * B,
         Milliseconds(9, [&] { CudaSumOfSquares<Bf16>(a, big, sums + 1, sums, g_stream); }));
  Report("adamw, bf16 copy", 30 * N, Milliseconds(9, [&] {
           CudaAdamW<Bf16>({.elements = n,
                            .lr = 1e-4,
                            .gradient_scale = sums,
                            .param = f,
                            .m = g,
                            .v = h,
                            .grad = k,
                            .copy = c},
                           g_stream);
         }));
  CudaRmsNormForwardArgs<Bf16> norm{.tokens = tokens, .d = d, .eps = 1e-5, .x = a, .w = w, .y = b};
  Report("rms_norm forward bf16", 4 * N, Milliseconds(9, [&] { CudaRmsNormForward(norm, g_stream); }));
  norm.residual = c, norm.sum = a + big;
  Report("rms_norm forward + residual bf16", 8 * N,
         Milliseconds(9, [&] { CudaRmsNormForward(norm, g_stream); }));
  const CudaRmsNormBackwardArgs<Bf16> back{
      .tokens = tokens, .d = d, .eps = 1e-5, .x = a, .w = w, .dy = b, .dx = c, .dw = dw, .scratch = scratch};
  Report("rms_norm backward bf16", 8 * N, Milliseconds(9, [&] { CudaRmsNormBackward(back, g_stream); }));
  const CudaRmsNormForwardArgs<float> norm32{.tokens = tokens, .d = d, .eps = 1e-5, .x = f, .w = k, .y = g};
  Report("rms_norm forward f32", 8 * N, Milliseconds(9, [&] { CudaRmsNormForward(norm32, g_stream); }));
  const CudaRmsNormBackwardArgs<float> back32{
      .tokens = tokens, .d = d, .eps = 1e-5, .x = f, .w = k, .dy = g, .dx = h, .dw = dw, .scratch = scratch};
  Report("rms_norm backward f32", 16 * N, Milliseconds(9, [&] { CudaRmsNormBackward(back32, g_stream); }));
  Report("rms_norm backward bf16, d 1024", 8 * N, Milliseconds(9, [&] {
           CudaRmsNormBackward<Bf16>({.tokens = tokens * 4,
                                      .d = 1024,
                                      .eps = 1e-5,
                                      .x = a,
                                      .w = w,
                                      .dy = b,
                                      .dx = c,
                                      .dw = dw,
                                      .scratch = scratch},
                                     g_stream);
         }));
  int64_t* positions;
  std::vector<int64_t> host(static_cast<size_t>(4 * tokens));
  for (size_t i = 0; i < host.size(); ++i) host[i] = static_cast<int64_t>(i) * 8;
  Must(cudaMalloc(&positions, 4 * tokens * 8), "malloc");
  Must(cudaMemcpy(positions, host.data(), host.size() * 8, cudaMemcpyHostToDevice), "copy");
  Report("rope bf16, 32 heads of 128", 4 * N, Milliseconds(9, [&] {
           CudaRope<Bf16>({.rows = tokens,
                           .heads = heads,
                           .dim = 128,
                           .row_stride = d,
                           .batch_stride = d,
                           .x = a,
                           .positions = positions},
                          g_stream);
         }));
  Report("rope bf16, 8 heads of K in KV rows", 4 * N, Milliseconds(9, [&] {
           CudaRope<Bf16>({.rows = 4 * tokens,
                           .heads = 8,
                           .dim = 128,
                           .row_stride = 2048,
                           .batch_stride = 2048,
                           .x = a,
                           .positions = positions},
                          g_stream);
         }));
  Report("swiglu forward bf16", 6 * B,
         Milliseconds(9, [&] { CudaSwigluForward<Bf16>(tokens, d_ff, a, c, g_stream); }));
  Report("swiglu backward bf16", 10 * B,
         Milliseconds(9, [&] { CudaSwigluBackward<Bf16>(tokens, d_ff, a, c, b, g_stream); }));
  std::vector<int32_t> ids(static_cast<size_t>(tokens));
  std::vector<char> seen(128256);
  int64_t distinct = 0;
  for (int32_t& t : ids) {  // Zipf-like: one token in 20 is the same
    const double u = static_cast<double>(Rng()() >> 11) * 0x1p-53;
    t = u < 0.05 ? 0 : static_cast<int32_t>(std::pow(128256.0, u)) - 1;
    t = std::min(t, 128255), distinct += !seen[static_cast<size_t>(t)], seen[static_cast<size_t>(t)] = 1;
  }
  int32_t* gi;
  char* space;
  Must(cudaMalloc(&gi, tokens * 4), "malloc");
  Must(cudaMemcpy(gi, ids.data(), ids.size() * 4, cudaMemcpyHostToDevice), "copy");
  Must(cudaMalloc(&space, CudaEmbeddingBackwardScratchBytes(tokens, d, 128256)), "malloc");
  Bf16* table = reinterpret_cast<Bf16*>(dw);
  Report("embedding forward bf16", 2 * N + 2.0 * static_cast<double>(distinct * d),
         Milliseconds(9, [&] { CudaEmbeddingForward<Bf16>(tokens, d, gi, table, b, g_stream); }));
  Report("embedding backward bf16", 2 * N + 8.0 * static_cast<double>(distinct * d), Milliseconds(9, [&] {
           CudaEmbeddingBackward<Bf16>({.token_count = tokens,
                                        .d = d,
                                        .vocab = 128256,
                                        .tokens = gi,
                                        .dy = a,
                                        .dtable = dw,
                                        .scratch = space},
                                       g_stream);
         }));
  Must(cudaGetLastError(), "timed kernels");
  for (void* p : {(void*)a, (void*)b, (void*)c, (void*)w, (void*)f, (void*)g, (void*)h, (void*)k, (void*)dw,
                  (void*)scratch, (void*)sums, (void*)positions, (void*)gi, (void*)space})
    cudaFree(p);
}

}  // namespace annulus::testing
