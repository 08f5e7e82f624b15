#include "cuda/harness.h"
#include "kernels/cross_entropy/linear_cross_entropy_cuda.h"

namespace annulus::testing {
namespace {

using namespace annulus::kernels;

struct Library {
  explicit Library(int sm_count = 0) {
    auto made = CublasLt::Create(sm_count);
    Ok(made.status());
    lt = std::move(made).value();
    Must(cudaMalloc(&space, kCublasLtWorkspaceBytes), "malloc");
    call = {lt.get(), {space, kCublasLtWorkspaceBytes}, g_stream};
  }
  ~Library() { cudaFree(space); }
  std::unique_ptr<CublasLt> lt;
  void* space = nullptr;
  CudaLinearCall call;
};

// y = x w^T in arithmetic of type W.
template <typename W>
Doubles ProductIn(const CudaLinearShape& s, const Doubles& x, const Doubles& w) {
  Doubles y;
  for (int64_t t = 0; t < s.tokens; ++t)
    for (int64_t o = 0; o < s.out; ++o) {
      W sum = 0;
      for (int64_t i = 0; i < s.in; ++i)
        sum += static_cast<W>(x[static_cast<size_t>(t * s.in + i)]) *
               static_cast<W>(w[static_cast<size_t>(o * s.in + i)]);
      y.push_back(static_cast<double>(sum));
    }
  return y;
}

// bf16 into f32, which the ops use for logits, on some of the device's SMs.
void CheckProducts(const char* name, int sm_count) {
  Library library(sm_count);
  for (const CudaLinearShape& s :
       {CudaLinearShape{64, 128, 96}, CudaLinearShape{1, 8, 8}, CudaLinearShape{257, 512, 384}}) {
    const Doubles x = Random<Bf16>(s.tokens * s.in), w = Random<Bf16>(s.out * s.in);
    Array<Bf16> gx(x), gw(w);
    Array<float> gy(s.tokens * s.out);
    Ok(CudaLinearForward(library.call, {.shape = s,
                                        .result = CudaElement::kF32,
                                        .x = {gx.data(), s.in},
                                        .w = {gw.data(), s.in},
                                        .y = gy.data(),
                                        .y_stride = s.out}));
    Compare(name, std::to_string(s.tokens), gy.Get(name), ProductIn<float>(s, x, w),
            ProductIn<double>(s, x, w));
  }
}

void Report(const char* name, double flops, double ms) {
  std::printf("time  %-46s %8.3f ms %6.0f TFLOP/s\n", name, ms, flops / ms * 1e-9);
}

}  // namespace

void CheckLinear() {
  CheckProducts("linear bf16->f32", 0);
  CheckProducts("linear bf16->f32 on 100 SMs", 100);
}

void TimeLinear() {
  Library library, fewer(116);
  const int64_t tokens = 16384, in = 4096, out = 14336, vocab = 128256, square = 8192, chunk = 8192;
  Bf16 *x, *w, *y;
  float* dw;
  char* scratch;
  Must(cudaMalloc(&x, tokens * out * 2), "malloc");
  Must(cudaMalloc(&w, vocab * in * 2), "malloc");
  Must(cudaMalloc(&y, tokens * out * 2), "malloc");
  Must(cudaMalloc(&dw, vocab * in * 4), "malloc");
  FillNormal(x, tokens * out, 1, 1), FillNormal(w, vocab * in, 0.02f, 2), FillNormal(y, tokens * out, 1, 3);
  cudaMemset(dw, 0, vocab * in * 4);
  const double cube = 2.0 * square * square * square;
  const auto gemm = [&](Library& l) {
    Ok(CudaLinearForward(
        l.call,
        {.shape = {square, square, square}, .x = {x, square}, .w = {w, square}, .y = y, .y_stride = square}));
  };
  Report("GEMM 8192^3 bf16", cube, Milliseconds(9, [&] { gemm(library); }));
  Report("GEMM 8192^3 bf16, SM target 116", cube, Milliseconds(9, [&] { gemm(fewer); }));
  const CudaLinearShape shape{tokens, in, out};
  const double flops = 2.0 * tokens * in * out;
  FillNormal(y, tokens * out, 1, 3);
  Report("linear y  16384 x 4096 -> 14336", flops, Milliseconds(9, [&] {
           Ok(CudaLinearForward(library.call,
                                {.shape = shape, .x = {x, in}, .w = {w, in}, .y = y, .y_stride = out}));
         }));
  Report("linear dx", flops, Milliseconds(9, [&] {
           Ok(CudaLinearBackwardInput(
               library.call, {.shape = shape, .dy = {y, out}, .w = {w, in}, .dx = x, .dx_stride = in}));
         }));
  FillNormal(x, tokens * out, 1, 1), FillNormal(y, tokens * out, 1, 3);
  Report("linear dw += f32", flops, Milliseconds(9, [&] {
           Ok(CudaLinearBackwardWeight(
               library.call, {.shape = shape, .dy = {y, out}, .x = {x, in}, .dw = dw, .dw_stride = in}));
         }));
  Report("linear dw += f32, SM target 116", flops, Milliseconds(9, [&] {
           Ok(CudaLinearBackwardWeight(
               fewer.call, {.shape = shape, .dy = {y, out}, .x = {x, in}, .dw = dw, .dw_stride = in}));
         }));
  const CudaLinearShape s1{4096, 1024, 1024};
  Report("linear f32 (no tf32) 4096 x 1024 -> 1024", 2.0 * 4096 * 1024 * 1024, Milliseconds(5, [&] {
           Ok(CudaLinearForward(library.call, {.shape = s1,
                                               .operands = CudaElement::kF32,
                                               .result = CudaElement::kF32,
                                               .x = {x, 1024},
                                               .w = {w, 1024},
                                               .y = y,
                                               .y_stride = 1024}));
         }));
  FillNormal(x, tokens * out, 1, 1);
  std::vector<int32_t> host(static_cast<size_t>(chunk));
  for (int32_t& t : host) t = static_cast<int32_t>(Rng()() % 32000);
  int32_t* targets;
  double* loss;
  Must(cudaMalloc(&targets, chunk * 4), "malloc");
  Must(cudaMalloc(&loss, 8), "malloc");
  Must(cudaMemcpy(targets, host.data(), host.size() * 4, cudaMemcpyHostToDevice), "copy");
  cudaMemset(loss, 0, 8);
  CudaLinearCrossEntropyArgs args{.tokens = chunk,
                                  .d = in,
                                  .vocab = vocab,
                                  .chunk_tokens = chunk,
                                  .part = CudaLossPart::kLossAndGradients,
                                  .scale = 1.0 / 8192,
                                  .x = x,
                                  .w = w,
                                  .targets = targets,
                                  .dx = y,
                                  .dw = dw,
                                  .loss = loss};
  Must(cudaMalloc(&scratch, CudaLinearCrossEntropyScratchBytes(args)), "malloc");
  args.scratch = scratch;
  Report("linear + loss, 8192 x 4096 -> 128256", 6.0 * chunk * in * vocab,
         Milliseconds(5, [&] { Ok(CudaLinearCrossEntropy(library.call, args)); }));
  cudaFree(scratch);
  Must(cudaGetLastError(), "timed products");
  for (void* p : {(void*)x, (void*)w, (void*)y, (void*)dw, (void*)targets, (void*)loss}) cudaFree(p);
}

}  // namespace annulus::testing
