#include "cuda/harness.h"
#include "kernels/cross_entropy/cross_entropy_cuda.h"
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

template <typename T>
constexpr CudaElement kElement = sizeof(T) == 2 ? CudaElement::kBf16 : CudaElement::kF32;

// c[m, n] = sum_k a(i, l) b(l, j)
Doubles Multiply(int64_t m, int64_t n, int64_t k, const std::function<double(int64_t, int64_t)>& a,
                 const std::function<double(int64_t, int64_t)>& b) {
  Doubles c(static_cast<size_t>(m * n));
  ParallelFor(m, [&](int64_t i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += a(i, l) * b(l, j);
      c[static_cast<size_t>(i * n + j)] = sum;
    }
  });
  return c;
}

// Columns [0, cols) of rows `stride` apart; the rest must still be what it was before.
Doubles Columns(const Doubles& x, const Doubles& before, int64_t rows, int64_t cols, int64_t stride,
                const std::string& what) {
  Doubles out;
  bool kept = true;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < stride; ++c) {
      const auto i = static_cast<size_t>(r * stride + c);
      if (c < cols)
        out.push_back(x[i]);
      else
        kept = kept && x[i] == before[i];
    }
  Expect(kept, what + ": wrote between rows");
  return out;
}

template <typename T>
void CheckProducts(Library& library, const char* label) {
  struct Case {
    int64_t tokens, in, out, pad;
  };
  for (const Case& c : {Case{64, 128, 96, 8}, Case{1, 8, 8, 0}, Case{33, 72, 40, 3}, Case{130, 7, 5, 1},
                        Case{0, 8, 8, 0}, Case{257, 512, 384, 64}}) {
    const int64_t si = c.in + c.pad, so = c.out + c.pad;
    const Doubles x = Random<T>(c.tokens * si), w = Random<T>(c.out * si), dy = Random<T>(c.tokens * so);
    const Doubles y0 = Random<T>(c.tokens * so), dx0 = Random<T>(c.tokens * si),
                  dw0 = Random<float>(c.out * si);
    Array<T> gx(x), gw(w), gdy(dy), gy(y0), gdx(dx0), gdx2(dx0);
    Array<float> gdw(dw0);
    const CudaLinearShape shape{c.tokens, c.in, c.out};
    Ok(CudaLinearForward(library.call, {.shape = shape,
                                        .operands = kElement<T>,
                                        .result = kElement<T>,
                                        .x = {gx.data(), si},
                                        .w = {gw.data(), si},
                                        .y = gy.data(),
                                        .y_stride = so}));
    for (auto [write, out] :
         {std::pair{CudaWrite::kOverwrite, &gdx}, std::pair{CudaWrite::kAccumulate, &gdx2}}) {
      Ok(CudaLinearBackwardInput(library.call, {.shape = shape,
                                                .operands = kElement<T>,
                                                .result = kElement<T>,
                                                .dy = {gdy.data(), so},
                                                .w = {gw.data(), si},
                                                .write = write,
                                                .dx = out->data(),
                                                .dx_stride = si}));
    }
    Ok(CudaLinearBackwardWeight(library.call, {.shape = shape,
                                               .operands = kElement<T>,
                                               .dy = {gdy.data(), so},
                                               .x = {gx.data(), si},
                                               .dw = gdw.data(),
                                               .dw_stride = si}));
    const auto at = [](const Doubles& v, int64_t stride) {
      return [&v, stride](int64_t i, int64_t j) { return v[static_cast<size_t>(i * stride + j)]; };
    };
    const auto X = at(x, si), W = at(w, si), DY = at(dy, so);
    const std::string name = std::string("linear ") + label + NameOf<T>(),
                      detail =
                          std::to_string(c.tokens) + " " + std::to_string(c.in) + " " + std::to_string(c.out);
    const double tolerance = sizeof(T) == 2 ? kRounding<T> : 1e-6;
    Compare(name + " y", detail, Columns(gy.Get(name), y0, c.tokens, c.out, so, name),
            Multiply(c.tokens, c.out, c.in, X, [&](int64_t l, int64_t j) { return W(j, l); }), tolerance);
    Doubles dx = Multiply(c.tokens, c.in, c.out, DY, W);
    Compare(name + " dx", detail, Columns(gdx.Get(name), dx0, c.tokens, c.in, si, name), dx, tolerance);
    for (int64_t t = 0; t < c.tokens; ++t)
      for (int64_t i = 0; i < c.in; ++i)
        dx[static_cast<size_t>(t * c.in + i)] += dx0[static_cast<size_t>(t * si + i)];
    Compare(name + " dx +=", detail, Columns(gdx2.Get(name), dx0, c.tokens, c.in, si, name), dx, tolerance);
    Doubles dw = Multiply(
        c.out, c.in, c.tokens, [&](int64_t i, int64_t l) { return DY(l, i); }, X);
    for (int64_t o = 0; o < c.out; ++o)
      for (int64_t i = 0; i < c.in; ++i)
        dw[static_cast<size_t>(o * c.in + i)] += dw0[static_cast<size_t>(o * si + i)];
    Compare(name + " dw", detail, Columns(gdw.Get(name), dw0, c.out, c.in, si, name), dw,
            sizeof(T) == 2 ? 1e-5 : 1e-6);
  }
}

template <typename T, typename Logit>
void CheckLoss(Library& library) {
  struct Case {
    int64_t tokens, d, vocab, chunk;
  };
  for (const Case& c : {Case{100, 64, 1000, 32}, Case{37, 24, 517, 8192}, Case{9, 8, 50, 1}}) {
    const Doubles x = Random<T>(c.tokens * c.d), w = Random<T>(c.vocab * c.d, 0.3),
                  dw0 = Random<float>(c.vocab * c.d, 0.1);
    std::vector<int32_t> targets(static_cast<size_t>(c.tokens));
    for (int32_t& t : targets)
      t = Rng()() % 5 == 0 ? -1 : static_cast<int32_t>(Rng()() % static_cast<uint64_t>(c.vocab));
    const double scale = 0.125;
    double loss = 3;
    Doubles p = Multiply(
        c.tokens, c.vocab, c.d, [&](int64_t i, int64_t l) { return x[static_cast<size_t>(i * c.d + l)]; },
        [&](int64_t l, int64_t j) { return w[static_cast<size_t>(j * c.d + l)]; });
    for (int64_t t = 0; t < c.tokens; ++t) {
      double* row = p.data() + t * c.vocab;
      double sum = 0;
      for (int64_t i = 0; i < c.vocab; ++i) sum += std::exp(row[i]);
      const int32_t target = targets[static_cast<size_t>(t)];
      if (target >= 0) loss += std::log(sum) - row[target];
      for (int64_t i = 0; i < c.vocab; ++i)
        row[i] = target < 0 ? 0 : scale * (std::exp(row[i]) / sum - (i == target));
    }
    const Doubles dx = Multiply(
        c.tokens, c.d, c.vocab, [&](int64_t i, int64_t l) { return p[static_cast<size_t>(i * c.vocab + l)]; },
        [&](int64_t l, int64_t j) { return w[static_cast<size_t>(l * c.d + j)]; });
    Doubles dw = Multiply(
        c.vocab, c.d, c.tokens, [&](int64_t i, int64_t l) { return p[static_cast<size_t>(l * c.vocab + i)]; },
        [&](int64_t l, int64_t j) { return x[static_cast<size_t>(l * c.d + j)]; });
    for (size_t i = 0; i < dw.size(); ++i) dw[i] += dw0[i];
    int32_t* gt = nullptr;
    Must(cudaMalloc(&gt, targets.size() * 4), "malloc");
    Must(cudaMemcpy(gt, targets.data(), targets.size() * 4, cudaMemcpyHostToDevice), "copy");
    Array<T> gx(x), gw(w), gdx(c.tokens * c.d);
    Array<float> gdw(dw0);
    Array<double> gloss(Doubles{3.0}), gloss2(Doubles{3.0});
    CudaLinearCrossEntropyArgs args{.tokens = c.tokens,
                                    .d = c.d,
                                    .vocab = c.vocab,
                                    .chunk_tokens = c.chunk,
                                    .operands = kElement<T>,
                                    .logits = kElement<Logit>,
                                    .scale = scale,
                                    .x = gx.data(),
                                    .w = gw.data(),
                                    .targets = gt,
                                    .dx = gdx.data(),
                                    .dw = gdw.data(),
                                    .loss = gloss.data()};
    Array<char> scratch(CudaLinearCrossEntropyScratchBytes(args));
    args.scratch = scratch.data();
    Ok(CudaLinearCrossEntropy(library.call, args));
    args.dx = nullptr, args.loss = gloss2.data();
    Ok(CudaLinearCrossEntropy(library.call, args));
    const std::string name = std::string("linear+loss ") + NameOf<T>() + "/" + NameOf<Logit>(),
                      detail = std::to_string(c.tokens) + " " + std::to_string(c.vocab);
    // bf16 logits of size up to 8 are off by up to 1/64, dlogits by their rounding and by that of the logits.
    const bool exact = sizeof(T) == 4;
    Compare(name + " loss", detail, gloss.Get(name), {loss}, exact ? 1e-6 : sizeof(Logit) == 2 ? 1e-3 : 1e-5);
    Compare(name + " loss only", detail, gloss2.Get(name), gloss.Get(name), 1e-12);
    Compare(name + " dx", detail, gdx.Get(name), dx, exact ? 2e-6 : sizeof(Logit) == 2 ? 8e-3 : 3e-3);
    Compare(name + " dw", detail, gdw.Get(name), dw, exact ? 2e-6 : sizeof(Logit) == 2 ? 8e-3 : 3e-3);
    scratch.Get(name);
    cudaFree(gt);
  }
}

void Report(const char* name, double flops, double ms) {
  std::printf("time  %-46s %8.3f ms %6.0f TFLOP/s\n", name, ms, flops / ms * 1e-9);
}

}  // namespace

void CheckLinear() {
  Library library, fewer(100);
  CheckProducts<float>(library, "");
  CheckProducts<Bf16>(library, "");
  CheckProducts<Bf16>(fewer, "on 100 SMs ");
  CheckLoss<float, float>(library);
  CheckLoss<Bf16, float>(library);
  CheckLoss<Bf16, Bf16>(library);
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
  for (int32_t& t : host) t = static_cast<int32_t>(Rng()() % vocab);
  int32_t* targets;
  double* loss;
  Must(cudaMalloc(&targets, chunk * 4), "malloc");
  Must(cudaMalloc(&loss, 8), "malloc");
  Must(cudaMemcpy(targets, host.data(), host.size() * 4, cudaMemcpyHostToDevice), "copy");
  cudaMemset(loss, 0, 8);
  for (CudaElement logits : {CudaElement::kBf16, CudaElement::kF32}) {
    CudaLinearCrossEntropyArgs args{.tokens = chunk,
                                    .d = in,
                                    .vocab = vocab,
                                    .chunk_tokens = chunk,
                                    .logits = logits,
                                    .scale = 1.0 / 8192,
                                    .x = x,
                                    .w = w,
                                    .targets = targets,
                                    .dx = y,
                                    .dw = dw,
                                    .loss = loss};
    Must(cudaMalloc(&scratch, CudaLinearCrossEntropyScratchBytes(args)), "malloc");
    args.scratch = scratch;
    Report(logits == CudaElement::kBf16 ? "linear + loss, 8192 x 4096 -> 128256, bf16"
                                        : "linear + loss, f32 logits",
           6.0 * chunk * in * vocab,
           Milliseconds(5, [&] { Ok(CudaLinearCrossEntropy(library.call, args)); }));
    float* rows = reinterpret_cast<float*>(scratch);
    void* at = scratch + chunk * 4;
    const double bytes = static_cast<double>(chunk * vocab);
    if (logits == CudaElement::kBf16) {
      FillNormal(static_cast<Bf16*>(at), chunk * vocab, 1, 9);
      const double ms = Milliseconds(5, [&] {
        CudaCrossEntropy<Bf16, Bf16>({.tokens = chunk,
                                      .vocab = vocab,
                                      .stride = vocab,
                                      .targets = targets,
                                      .logits = static_cast<Bf16*>(at),
                                      .row_loss = rows},
                                     g_stream);
      });
      std::printf("time  loss kernel alone bf16 %38.3f ms %6.0f GB/s of 4 B a logit\n", ms,
                  4 * bytes / ms * 1e-6);
    } else {
      FillNormal(static_cast<float*>(at), chunk * vocab, 1, 9);
      const double ms = Milliseconds(5, [&] {
        CudaCrossEntropy<float, Bf16>({.tokens = chunk,
                                       .vocab = vocab,
                                       .stride = vocab,
                                       .targets = targets,
                                       .logits = static_cast<float*>(at),
                                       .row_loss = rows},
                                      g_stream);
      });
      std::printf("time  loss kernel alone f32 -> bf16 %31.3f ms %6.0f GB/s of 6 B a logit\n", ms,
                  6 * bytes / ms * 1e-6);
    }
    cudaFree(scratch);
  }
  Must(cudaGetLastError(), "timed products");
  for (void* p : {(void*)x, (void*)w, (void*)y, (void*)dw, (void*)targets, (void*)loss}) cudaFree(p);
}

}  // namespace annulus::testing
