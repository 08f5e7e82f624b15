#include "cuda/harness.h"
#include "kernels/adamw/adamw_cuda.h"
#include "kernels/cross_entropy/cross_entropy_cuda.h"
#include "kernels/elementwise/elementwise_cuda.h"
#include "kernels/embedding/embedding_cuda.h"
#include "kernels/rms_norm/rms_norm_cuda.h"
#include "kernels/rope/rope_cuda.h"
#include "kernels/swiglu/swiglu_cuda.h"

namespace annulus::testing {
namespace {

using namespace annulus::kernels;

std::string Text(std::initializer_list<int64_t> numbers) {
  std::string text;
  for (int64_t n : numbers) text += std::to_string(n) + " ";
  return text;
}

template <typename From, typename To>
void CheckPair() {
  const std::string pair = std::string(NameOf<From>()) + "->" + NameOf<To>();
  for (int64_t n : {0, 1, 7, 8, 9, 4095, 4096, 12293}) {
    for (int64_t shift : {0, 1}) {
      const Doubles a = Random<From>(n), b = Random<To>(n);
      Array<From> x(a, shift);
      Array<To> y(n, shift), sum(b, shift);
      Must(CudaCast(static_cast<const From*>(x.data()), n, y.data(), g_stream), "cast");
      Compare("cast " + pair, Text({n, shift}), y.Get("cast"), a, kRounding<To>);
      Must(CudaAdd(static_cast<const From*>(x.data()), n, sum.data(), g_stream), "add");
      Doubles want(b);
      for (size_t i = 0; i < want.size(); ++i) want[i] += a[i];
      Compare("add " + pair, Text({n, shift}), sum.Get("add"), want, kRounding<To>);
    }
  }
  struct Case {
    int64_t rows, batch, columns, pad;
  };
  for (const Case& c : {Case{5, 3, 64, 16}, Case{33, 1, 520, 8}, Case{7, 2, 10, 3}}) {
    const int64_t batch_stride = c.columns + c.pad, row_stride = c.batch * batch_stride + c.pad;
    const Doubles a = Random<From>(c.rows * row_stride), b = Random<To>(c.rows * c.batch * c.columns);
    Array<From> x(a);
    Array<To> y(b);
    Doubles want(b);
    for (int64_t r = 0; r < c.rows; ++r)
      for (int64_t i = 0; i < c.batch; ++i)
        for (int64_t j = 0; j < c.columns; ++j)
          want[static_cast<size_t>((r * c.batch + i) * c.columns + j)] +=
              a[static_cast<size_t>(r * row_stride + i * batch_stride + j)];
    Must((CudaAddRows<From, To>({c.rows, c.batch, c.columns}, {x.data(), row_stride, batch_stride},
                                {y.data(), c.batch * c.columns, c.columns}, g_stream)),
         "add rows");
    Compare("add rows " + pair, Text({c.rows, c.batch, c.columns}), y.Get("add rows"), want, kRounding<To>);
  }
}

template <typename T>
void CheckReductions() {
  for (int64_t n : {1, 9, 100003, 3000001}) {
    for (int64_t shift : {0, 1}) {
      const Doubles a = Random<T>(n);
      Array<T> x(a, shift);
      Array<double> scratch(kSumOfSquaresScratch), sum(Doubles{2.5});
      Must(CudaSumOfSquares(static_cast<const T*>(x.data()), n, scratch.data(), sum.data(), g_stream),
           "squares");
      double want = 2.5;
      for (double v : a) want += v * v;
      Compare(std::string("sum of squares ") + NameOf<T>(), Text({n, shift}), sum.Get("squares"), {want},
              1e-7);
      Array<float> factor(1);
      Must(CudaClipFactor(sum.data(), 10.0, factor.data(), g_stream), "clip");
      Compare("clip factor", Text({n}), factor.Get("clip"), {std::min(1.0, 10 / std::sqrt(want))}, 2e-7);
      Must(CudaScale(0.37, n, x.data(), g_stream), "scale");
      Doubles scaled(a);
      for (double& v : scaled) v *= 0.37;
      Compare(std::string("scale ") + NameOf<T>(), Text({n}), x.Get("scale"), scaled, 2 * kRounding<T>);
    }
  }
}

template <typename T>
void CheckRmsNorm() {
  const std::string type = NameOf<T>();
  struct Case {
    int64_t tokens, d;
  };
  for (const Case& c : {Case{0, 64}, Case{1, 8}, Case{3, 12}, Case{37, 100}, Case{301, 128}, Case{70, 512},
                        Case{700, 1024}, Case{1000, 4096}, Case{33, 5120}, Case{9, 8192}, Case{5, 2047}}) {
    for (bool with_residual : {false, true}) {
      const int64_t n = c.tokens * c.d;
      const double eps = 1e-5;
      const Doubles x = Random<T>(n, 2), r = Random<T>(n), w = Random<T>(c.d), dy = Random<T>(n),
                    dx = Random<T>(n);
      Doubles sum(x), y(x), want_dx(dx), want_dw(static_cast<size_t>(c.d), 0.5);
      for (int64_t t = 0; t < c.tokens; ++t) {
        double squares = 0, dot = 0;
        const auto at = [&](int64_t i) { return static_cast<size_t>(t * c.d + i); };
        for (int64_t i = 0; i < c.d; ++i) {
          if (with_residual) sum[at(i)] = Value(Round<T>(x[at(i)] + r[at(i)]));
          squares += sum[at(i)] * sum[at(i)];
          dot += w[static_cast<size_t>(i)] * dy[at(i)] * sum[at(i)];
        }
        const double d = static_cast<double>(c.d), inverse = 1 / std::sqrt(squares / d + eps);
        for (int64_t i = 0; i < c.d; ++i) {
          const double wi = w[static_cast<size_t>(i)];
          y[at(i)] = wi * sum[at(i)] * inverse;
          want_dx[at(i)] += inverse * (wi * dy[at(i)] - dot * inverse * inverse / d * sum[at(i)]);
          want_dw[static_cast<size_t>(i)] += dy[at(i)] * sum[at(i)] * inverse;
        }
      }
      Array<T> gx(x), gr(r), gw(w), gsum(n), gy(n), gdy(dy), gdx(dx), gs(sum);
      CudaRmsNormForwardArgs<T> forward{
          .tokens = c.tokens, .d = c.d, .eps = eps, .x = gx.data(), .w = gw.data(), .y = gy.data()};
      if (with_residual) forward.residual = gr.data(), forward.sum = gsum.data();
      Must(CudaRmsNormForward(forward, g_stream), "rms forward");
      Compare("rms_norm forward " + type, Text({c.tokens, c.d}), gy.Get("rms y"), y,
              kRounding<T> * (sizeof(T) == 2 ? 1 : 8));
      if (with_residual)
        Compare("rms_norm sum " + type, Text({c.tokens, c.d}), gsum.Get("rms sum"), sum,
                1e-12 + kRounding<float>);
      Array<float> gdw(Doubles(static_cast<size_t>(c.d), 0.5)), scratch(CudaRmsNormScratch(c.d));
      const CudaRmsNormBackwardArgs<T> backward{.tokens = c.tokens,
                                                .d = c.d,
                                                .eps = eps,
                                                .x = gs.data(),
                                                .w = gw.data(),
                                                .dy = gdy.data(),
                                                .dx = gdx.data(),
                                                .dw = gdw.data(),
                                                .scratch = scratch.data()};
      const cudaError_t error = CudaRmsNormBackward(backward, g_stream);
      if (error == cudaErrorInvalidValue && c.d == 2047) continue;
      Must(error, "rms backward");
      Compare("rms_norm dx " + type, Text({c.tokens, c.d}), gdx.Get("rms dx"), want_dx,
              kRounding<T> * (sizeof(T) == 2 ? 1 : 8));
      Compare("rms_norm dw " + type, Text({c.tokens, c.d}), gdw.Get("rms dw"), want_dw, 2e-6);
    }
  }
}

template <typename T>
void CheckRope() {
  struct Case {
    int64_t rows, batch, heads, dim, pad;
  };
  for (const Case& c : {Case{65, 2, 8, 128, 32}, Case{33, 1, 5, 64, 0}, Case{5, 3, 2, 6, 1},
                        Case{17, 1, 3, 256, 8}, Case{3, 2, 2, 512, 8}, Case{9, 1, 2, 2, 0}}) {
    const int64_t batch_stride = c.heads * c.dim + c.pad, row_stride = c.batch * batch_stride;
    const int64_t n = c.rows * row_stride;
    const double theta = 500000;
    std::vector<int64_t> positions(static_cast<size_t>(c.rows));
    for (int64_t r = 0; r < c.rows; ++r) positions[static_cast<size_t>(r)] = r < 4 ? r : 1000000 + 77 * r;
    const Doubles x = Random<T>(n);
    Doubles want(x);
    for (int64_t r = 0; r < c.rows; ++r)
      for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t h = 0; h < c.heads; ++h)
          for (int64_t i = 0; i < c.dim / 2; ++i) {
            const double angle = static_cast<double>(positions[static_cast<size_t>(r)]) *
                                 std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(c.dim));
            const auto lo = static_cast<size_t>(r * row_stride + b * batch_stride + h * c.dim + i);
            const size_t hi = lo + static_cast<size_t>(c.dim / 2);
            want[lo] = x[lo] * std::cos(angle) - x[hi] * std::sin(angle);
            want[hi] = x[lo] * std::sin(angle) + x[hi] * std::cos(angle);
          }
    Array<T> gx(x);
    int64_t* gp = nullptr;
    Must(cudaMalloc(&gp, positions.size() * 8), "malloc");
    Must(cudaMemcpy(gp, positions.data(), positions.size() * 8, cudaMemcpyHostToDevice), "copy");
    CudaRopeArgs<T> args{.rows = c.rows,
                         .batch = c.batch,
                         .heads = c.heads,
                         .dim = c.dim,
                         .row_stride = row_stride,
                         .batch_stride = batch_stride,
                         .x = gx.data(),
                         .positions = gp,
                         .theta = theta};
    Must(CudaRope(args, g_stream), "rope");
    const std::string detail = Text({c.rows, c.batch, c.heads, c.dim});
    Compare(std::string("rope ") + NameOf<T>(), detail, gx.Get("rope"), want,
            kRounding<T> * (sizeof(T) == 2 ? 1 : 8));
    args.inverse = true;
    Must(CudaRope(args, g_stream), "rope");
    Compare(std::string("rope and back ") + NameOf<T>(), detail, gx.Get("rope"), x,
            kRounding<T> * (sizeof(T) == 2 ? 2 : 8));
    cudaFree(gp);
  }
}

template <typename T>
void CheckSwiglu() {
  struct Case {
    int64_t tokens, d;
  };
  for (const Case& c :
       {Case{1, 1}, Case{5, 7}, Case{40, 1024}, Case{13, 14336}, Case{0, 64}, Case{9, 2056}}) {
    const Doubles in = Random<T>(c.tokens * 2 * c.d, 4), dh = Random<T>(c.tokens * c.d);
    Doubles h(dh), din(in);
    for (int64_t t = 0; t < c.tokens; ++t)
      for (int64_t i = 0; i < c.d; ++i) {
        const auto g = static_cast<size_t>(t * 2 * c.d + i), u = g + static_cast<size_t>(c.d),
                   o = static_cast<size_t>(t * c.d + i);
        const double s = 1 / (1 + std::exp(-in[g])), silu = in[g] * s;
        h[o] = silu * in[u];
        din[g] = dh[o] * in[u] * (s + silu * (1 - s));
        din[u] = dh[o] * silu;
      }
    Array<T> gin(in), gdh(dh), gh(c.tokens * c.d), gdin(c.tokens * 2 * c.d);
    Must(CudaSwigluForward<T>(c.tokens, c.d, gin.data(), gh.data(), g_stream), "swiglu");
    Must(CudaSwigluBackward<T>(c.tokens, c.d, gin.data(), gdh.data(), gdin.data(), g_stream), "swiglu");
    const double tolerance = kRounding<T> * (sizeof(T) == 2 ? 1 : 8);
    Compare(std::string("swiglu forward ") + NameOf<T>(), Text({c.tokens, c.d}), gh.Get("swiglu"), h,
            tolerance);
    Compare(std::string("swiglu backward ") + NameOf<T>(), Text({c.tokens, c.d}), gdin.Get("swiglu"), din,
            tolerance);
  }
}

template <typename T>
void CheckEmbedding() {
  struct Case {
    int64_t tokens, d, vocab;
  };
  for (const Case& c : {Case{1, 8, 3}, Case{63, 12, 50}, Case{64, 512, 1}, Case{65, 7, 1},
                        Case{1000, 264, 50}, Case{5000, 128, 7}, Case{3000, 1024, 3001}}) {
    std::vector<int32_t> tokens(static_cast<size_t>(c.tokens));
    for (int32_t& t : tokens)
      t = static_cast<int32_t>(Rng()() % 3 ? Rng()() % static_cast<uint64_t>(c.vocab) : 0);
    const Doubles table = Random<T>(c.vocab * c.d), dy = Random<T>(c.tokens * c.d),
                  before = Random<float>(c.vocab * c.d);
    Doubles y(dy), dtable(before);
    for (int64_t t = 0; t < c.tokens; ++t)
      for (int64_t i = 0; i < c.d; ++i) {
        const auto row = static_cast<size_t>(tokens[static_cast<size_t>(t)] * c.d + i),
                   o = static_cast<size_t>(t * c.d + i);
        y[o] = table[row];
        dtable[row] += dy[o];
      }
    int32_t* gt = nullptr;
    Must(cudaMalloc(&gt, tokens.size() * 4), "malloc");
    Must(cudaMemcpy(gt, tokens.data(), tokens.size() * 4, cudaMemcpyHostToDevice), "copy");
    Array<T> gtable(table), gdy(dy), gy(c.tokens * c.d);
    Array<float> gd(before), again(before);
    Array<char> scratch(CudaEmbeddingBackwardScratchBytes(c.tokens, c.d, c.vocab));
    Must(CudaEmbeddingForward<T>(c.tokens, c.d, gt, gtable.data(), gy.data(), g_stream), "embedding");
    CudaEmbeddingBackwardArgs<T> args{.token_count = c.tokens,
                                      .d = c.d,
                                      .vocab = c.vocab,
                                      .tokens = gt,
                                      .dy = gdy.data(),
                                      .dtable = gd.data(),
                                      .scratch = scratch.data()};
    Must(CudaEmbeddingBackward(args, g_stream), "embedding backward");
    args.dtable = again.data();
    Must(CudaEmbeddingBackward(args, g_stream), "embedding backward");
    const std::string detail = Text({c.tokens, c.d, c.vocab});
    Compare(std::string("embedding forward ") + NameOf<T>(), detail, gy.Get("embedding"), y, 0);
    const Doubles first = gd.Get("embedding backward");
    Compare(std::string("embedding backward ") + NameOf<T>(), detail, first, dtable, 4e-6);
    Expect(first == again.Get("embedding backward"), "embedding backward repeats bit by bit " + detail);
    scratch.Get("embedding scratch");
    cudaFree(gt);
  }
}

void CheckAdamW() {
  for (int64_t n : {0, 1, 3, 4, 1023, 100001}) {
    Doubles p = Random<float>(n), m = Random<float>(n, 0.1), v = Random<float>(n, 0.1), g = Random<float>(n);
    for (double& x : v) x = Value(static_cast<float>(x * x));
    // Of one sign: where m and g cancel, the error relative to their sum has no bound.
    for (size_t i = 0; i < m.size(); ++i) m[i] = std::copysign(m[i], g[i]);
    Array<float> gp(p), gm(m), gv(v), gg(g), clip(Doubles{0.7});
    Array<Bf16> copy(n);
    const CudaAdamWArgs args{.elements = n,
                             .lr = 1e-2,
                             .beta1 = 0.9,
                             .beta2 = 0.95,
                             .eps = 1e-8,
                             .weight_decay = 0.1,
                             .gradient_scale = 0.5,
                             .step = 3,
                             .clip_factor = clip.data(),
                             .param = gp.data(),
                             .m = gm.data(),
                             .v = gv.data(),
                             .grad = gg.data(),
                             .param_bf16 = copy.data()};
    Must(CudaAdamW(args, g_stream), "adamw");
    for (size_t i = 0; i < p.size(); ++i) {
      const double s = 0.5 * Value(0.7f) * g[i];
      m[i] = 0.9 * m[i] + 0.1 * s;
      v[i] = 0.95 * v[i] + 0.05 * s * s;
      p[i] -= 1e-2 * (m[i] / (1 - std::pow(0.9, 3)) / (std::sqrt(v[i] / (1 - std::pow(0.95, 3))) + 1e-8) +
                      0.1 * p[i]);
    }
    Compare("adamw param", Text({n}), gp.Get("adamw"), p, 3e-7);
    Compare("adamw m", Text({n}), gm.Get("adamw"), m, 3e-7);
    Compare("adamw v", Text({n}), gv.Get("adamw"), v, 3e-7);
    Compare("adamw bf16 copy", Text({n}), copy.Get("adamw"), p, kRounding<Bf16>);
  }
}

template <typename Logit, typename Grad>
void CheckCrossEntropy() {
  const std::string type = std::string(NameOf<Logit>()) + "->" + NameOf<Grad>();
  struct Case {
    int64_t tokens, vocab;
  };
  for (const Case& c :
       {Case{3, 2}, Case{5, 7}, Case{20, 517}, Case{6, 50257}, Case{4, 128256}, Case{1, 4096}}) {
    const int64_t stride = (c.vocab + 7) / 8 * 8 + 8;
    Doubles logits = Random<Logit>(c.tokens * stride, 3);
    std::vector<int32_t> targets(static_cast<size_t>(c.tokens));
    Doubles loss(targets.size(), 0.0), gradient;
    const double scale = 0.25;
    for (int64_t t = 0; t < c.tokens; ++t) {
      int32_t& target = targets[static_cast<size_t>(t)];
      target = t % 4 == 3 ? -100 : static_cast<int32_t>(Rng()() % static_cast<uint64_t>(c.vocab));
      const double* row = logits.data() + t * stride;
      double sum = 0;
      for (int64_t i = 0; i < c.vocab; ++i) sum += std::exp(row[i]);
      if (target >= 0) loss[static_cast<size_t>(t)] = std::log(sum) - row[target];
      for (int64_t i = 0; i < c.vocab; ++i)
        gradient.push_back(target < 0 ? 0 : scale * (std::exp(row[i]) / sum - (i == target)));
    }
    int32_t* gt = nullptr;
    Must(cudaMalloc(&gt, targets.size() * 4), "malloc");
    Must(cudaMemcpy(gt, targets.data(), targets.size() * 4, cudaMemcpyHostToDevice), "copy");
    Array<Logit> gl(logits);
    Array<float> losses(c.tokens), only(c.tokens);
    Array<double> total(Doubles{1.0});
    CudaCrossEntropyArgs<Logit> args{.tokens = c.tokens,
                                     .vocab = c.vocab,
                                     .stride = stride,
                                     .scale = scale,
                                     .targets = gt,
                                     .logits = gl.data(),
                                     .row_loss = only.data()};
    Must(CudaCrossEntropyLoss(args, g_stream), "loss");
    args.row_loss = losses.data();
    Must((CudaCrossEntropy<Logit, Grad>(args, g_stream)), "cross entropy");
    Must(CudaAddSum(losses.data(), c.tokens, total.data(), g_stream), "sum");
    const std::string detail = Text({c.tokens, c.vocab});
    Compare("cross-entropy loss " + type, detail, losses.Get("loss"), loss, c.vocab == 1 ? 1e30 : 1e-6);
    Compare("cross-entropy loss only " + type, detail, only.Get("loss"), losses.Get("loss"), 0);
    double sum = 1;
    for (double l : loss) sum += l;
    Compare("cross-entropy sum", detail, total.Get("sum"), {sum}, 1e-6);
    // Gradients from the start of each row's memory.
    gl.Get("logits");
    std::vector<Grad> raw(static_cast<size_t>(c.tokens * stride) * sizeof(Logit) / sizeof(Grad));
    Must(cudaMemcpy(raw.data(), gl.data(), raw.size() * sizeof(Grad), cudaMemcpyDeviceToHost), "copy");
    Doubles got;
    const int64_t grad_stride = stride * static_cast<int64_t>(sizeof(Logit) / sizeof(Grad));
    for (int64_t t = 0; t < c.tokens; ++t)
      for (int64_t i = 0; i < c.vocab; ++i)
        got.push_back(Value(raw[static_cast<size_t>(t * grad_stride + i)]));
    Compare("cross-entropy gradient " + type, detail, got, gradient,
            c.vocab == 1 ? 1e30 : kRounding<Grad> * (sizeof(Grad) == 2 ? 1 : 32));
    cudaFree(gt);
  }
}

template <typename T>
void CheckAllOf() {
  CheckReductions<T>();
  CheckRmsNorm<T>();
  CheckRope<T>();
  CheckSwiglu<T>();
  CheckEmbedding<T>();
}

// GB/s of the bytes an operation must move, and their share of the copy's.

}  // namespace

void CheckElementwise() {
  CheckPair<float, float>();
  CheckPair<float, Bf16>();
  CheckPair<Bf16, float>();
  CheckPair<Bf16, Bf16>();
  CheckAllOf<float>();
  CheckAllOf<Bf16>();
  CheckAdamW();
  CheckCrossEntropy<float, float>();
  CheckCrossEntropy<float, Bf16>();
  CheckCrossEntropy<Bf16, Bf16>();
}

}  // namespace annulus::testing
