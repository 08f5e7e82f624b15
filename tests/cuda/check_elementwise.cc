// Launchers that go beyond their op: sums of mixed types, strided rows, the norm with its residual addition.

#include "cuda/harness.h"
#include "kernels/elementwise/elementwise_cuda.h"
#include "kernels/rms_norm/rms_norm_cuda.h"

namespace annulus::testing {
namespace {

using namespace annulus::kernels;

std::string Text(std::initializer_list<int64_t> numbers) {
  std::string text;
  for (int64_t n : numbers) text += std::to_string(n) + " ";
  return text;
}

template <typename From, typename To>
std::string PairName() {
  return std::string(NameOf<From>()) + "->" + NameOf<To>();
}

template <typename From, typename To>
void CheckSums() {
  for (int64_t n : {0, 1, 7, 8, 9, 4095, 4096, 12293}) {
    for (int64_t shift : {0, 1}) {
      const Doubles a = Random<From>(n), b = Random<To>(n);
      Array<From> x(a, shift);
      Array<To> sum(b, shift);
      Must(CudaAdd(static_cast<const From*>(x.data()), n, sum.data(), g_stream), "add");
      Doubles want(b);
      for (size_t i = 0; i < want.size(); ++i) want[i] += a[i];
      Compare("add " + PairName<From, To>(), Text({n, shift}), sum.Get("add"), Rounded<To>(want), want);
    }
  }
}

template <typename From, typename To>
void CheckRows() {
  struct Case {
    int64_t rows, batch, columns, pad;
  };
  for (const Case& c : {Case{5, 3, 64, 16}, Case{33, 1, 520, 8}, Case{7, 2, 10, 3}, Case{0, 2, 8, 0}}) {
    const int64_t batch_stride = c.columns + c.pad, row_stride = c.batch * batch_stride + c.pad;
    const Doubles a = Random<From>(c.rows * row_stride), b = Random<To>(c.rows * c.batch * c.columns);
    Array<From> x(a);
    Array<To> sum(b), cast(static_cast<int64_t>(b.size()));
    Doubles want_cast, want_sum(b);
    for (int64_t r = 0; r < c.rows; ++r)
      for (int64_t i = 0; i < c.batch; ++i)
        for (int64_t j = 0; j < c.columns; ++j)
          want_cast.push_back(a[static_cast<size_t>(r * row_stride + i * batch_stride + j)]);
    for (size_t i = 0; i < want_sum.size(); ++i) want_sum[i] += want_cast[i];
    const RowsShape shape{c.rows, c.batch, c.columns};
    const StridedRows<const From> from{x.data(), row_stride, batch_stride};
    const int64_t to_row = c.batch * c.columns;
    Must((CudaAddRows<From, To>(shape, from, {sum.data(), to_row, c.columns}, g_stream)), "add rows");
    Must((CudaCastRows<From, To>(shape, from, {cast.data(), to_row, c.columns}, g_stream)), "cast rows");
    const std::string detail = Text({c.rows, c.batch, c.columns});
    Compare("add rows " + PairName<From, To>(), detail, sum.Get("add rows"), Rounded<To>(want_sum), want_sum);
    Compare("cast rows " + PairName<From, To>(), detail, cast.Get("cast rows"), Rounded<To>(want_cast),
            want_cast);
  }
}

struct NormCase {
  int64_t tokens, d;
};

// w * sum / sqrt(mean(sum^2) + eps) in arithmetic of type W.
template <typename W>
Doubles NormIn(const NormCase& c, const Doubles& sum, const Doubles& w, double eps) {
  Doubles y(sum);
  for (int64_t t = 0; t < c.tokens; ++t) {
    const auto at = [&](int64_t i) { return static_cast<size_t>(t * c.d + i); };
    W squares = 0;
    for (int64_t i = 0; i < c.d; ++i) squares += static_cast<W>(sum[at(i)]) * static_cast<W>(sum[at(i)]);
    const W inverse = W{1} / std::sqrt(squares / static_cast<W>(c.d) + static_cast<W>(eps));
    for (int64_t i = 0; i < c.d; ++i)
      y[at(i)] = static_cast<double>(static_cast<W>(w[static_cast<size_t>(i)]) * static_cast<W>(sum[at(i)]) *
                                     inverse);
  }
  return y;
}

template <typename T>
void CheckNormWithResidual() {
  const double eps = 1e-5;
  for (const NormCase& c : {NormCase{0, 64}, NormCase{1, 8}, NormCase{3, 12}, NormCase{301, 128},
                            NormCase{700, 1024}, NormCase{33, 5120}, NormCase{9, 16384}, NormCase{5, 4095}}) {
    const int64_t n = c.tokens * c.d;
    const Doubles x = Random<T>(n, 2), r = Random<T>(n), w = Random<T>(c.d);
    Doubles exact(x);
    for (size_t i = 0; i < exact.size(); ++i) exact[i] += r[i];
    const Doubles sum = Rounded<T>(exact);  // the norm is of the rounded sum
    Array<T> gx(x), gr(r), gw(w), gsum(n), gy(n);
    const CudaRmsNormForwardArgs<T> forward{.tokens = c.tokens,
                                            .d = c.d,
                                            .eps = eps,
                                            .x = gx.data(),
                                            .residual = gr.data(),
                                            .w = gw.data(),
                                            .sum = gsum.data(),
                                            .y = gy.data()};
    Must(CudaRmsNormForward(forward, g_stream), "rms_norm");
    const std::string type = NameOf<T>(), detail = Text({c.tokens, c.d});
    Compare("rms_norm residual sum " + type, detail, gsum.Get("sum"), sum, exact);
    Compare("rms_norm of the sum " + type, detail, gy.Get("y"), Rounded<T>(NormIn<float>(c, sum, w, eps)),
            NormIn<double>(c, sum, w, eps));
  }
}

template <typename From, typename To>
void CheckPair() {
  CheckSums<From, To>();
  CheckRows<From, To>();
}

}  // namespace

void CheckElementwise() {
  CheckPair<float, float>();
  CheckPair<float, Bf16>();
  CheckPair<Bf16, float>();
  CheckPair<Bf16, Bf16>();
  CheckNormWithResidual<float>();
  CheckNormWithResidual<Bf16>();
}

}  // namespace annulus::testing
