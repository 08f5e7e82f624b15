// Times of what is bound by memory, as a share of the speed at which the device copies. Bytes are those that
// have to move: each input read once, each output written once.

#include "annulus/ops/rope.h"
#include "cuda/harness.h"
#include "kernels/adamw/adamw_cuda.h"
#include "kernels/attention/attention_merge_cuda.h"
#include "kernels/attention/attention_partial_cuda.h"
#include "kernels/columns/columns_cuda.h"
#include "kernels/cross_entropy/cross_entropy_cuda.h"
#include "kernels/elementwise/elementwise_cuda.h"
#include "kernels/embedding/embedding_cuda.h"
#include "kernels/rms_norm/rms_norm_cuda.h"
#include "kernels/rope/rope_cuda.h"
#include "kernels/swiglu/swiglu_cuda.h"

namespace annulus::testing {
namespace {

using namespace annulus::kernels;

constexpr int64_t kTokens = 32768, kWidth = 4096, kFf = 14336, kVocab = 128256;
constexpr int64_t kElements = kTokens * kWidth;

double g_copy = 0;  // GB/s

template <typename Fn>
void Time(const std::string& name, double bytes, Fn&& fn) {
  const double ms = Milliseconds(15, [&] { Must(fn(), name.c_str()); });
  const double rate = bytes / ms * 1e-6;
  if (g_copy == 0) g_copy = rate;
  std::printf("time  %-42s %8.3f ms %7.0f GB/s  %5.1f%% of copy\n", name.c_str(), ms, rate,
              100 * rate / g_copy);
}

template <typename T>
class Filled : public Array<T> {
 public:
  explicit Filled(int64_t n) : Array<T>(n) { FillNormal(this->data(), n, 1, 1); }
};

template <typename T>
class Uploaded : public Array<T> {
 public:
  explicit Uploaded(const std::vector<T>& values) : Array<T>(static_cast<int64_t>(values.size())) {
    Must(cudaMemcpy(this->data(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "copy");
  }
};

void TimeCopies() {
  const int64_t n = 2 * kTokens * kFf;
  const double bytes = 4.0 * static_cast<double>(n), some = static_cast<double>(kElements);
  const Filled<Bf16> x(n);
  const Array<Bf16> y(n);
  const Filled<float> f(kElements);
  Time("copy (cudaMemcpyAsync)", bytes,
       [&] { return cudaMemcpyAsync(y.data(), x.data(), n * 2, cudaMemcpyDeviceToDevice, g_stream); });
  Time("copy (our kernel)", bytes, [&] { return CudaCast<Bf16, Bf16>(x.data(), n, y.data(), g_stream); });
  Time("cast f32 to bf16", 6 * some,
       [&] { return CudaCast<float, Bf16>(f.data(), kElements, y.data(), g_stream); });
  Time("cast bf16 to f32", 6 * some,
       [&] { return CudaCast<Bf16, float>(x.data(), kElements, f.data(), g_stream); });
  Time("add f32 += bf16", 10 * some,
       [&] { return CudaAdd<Bf16, float>(x.data(), kElements, f.data(), g_stream); });
  Time("add rows f32 += bf16 (KV slice)", 10 * some / 4, [&] {
    return CudaAddRows<Bf16, float>({kTokens, 1, kWidth / 4}, {x.data(), kWidth, kWidth},
                                    {f.data(), kWidth / 4, kWidth / 4}, g_stream);
  });
}

void TimeOptimizer() {
  const double n = static_cast<double>(kElements);
  const Filled<float> param(kElements), m(kElements), grad(kElements);
  const Array<float> v(kElements);
  const Filled<Bf16> copy(kElements);
  const Array<double> sums(kSumOfSquaresScratch + 1);
  Must(CudaZero(v.data(), kElements * 4, g_stream), "zero");
  const Uploaded<double> scale({0.5});
  Time("sum of squares f32", 4 * n, [&] {
    return CudaSumOfSquares<float>(grad.data(), kElements, sums.data() + 1, sums.data(), g_stream);
  });
  Time("sum of squares bf16", 2 * n, [&] {
    return CudaSumOfSquares<Bf16>(copy.data(), kElements, sums.data() + 1, sums.data(), g_stream);
  });
  Time("adamw, bf16 copy", 30 * n, [&] {
    return CudaAdamW<Bf16>({.elements = kElements,
                            .lr = 1e-4,
                            .gradient_scale = scale.data(),
                            .param = param.data(),
                            .m = m.data(),
                            .v = v.data(),
                            .grad = grad.data(),
                            .copy = copy.data()},
                           g_stream);
  });
}

template <typename T>
void TimeNorm(int64_t d) {
  const int64_t tokens = kElements / d;
  const double bytes = static_cast<double>(kElements * static_cast<int64_t>(sizeof(T)));
  const std::string name = std::string("rms_norm ") + NameOf<T>() + " d " + std::to_string(d) + " ";
  const Filled<T> x(kElements), y(kElements), residual(kElements), sum(kElements), w(d);
  const Array<float> dw(d), scratch(CudaRmsNormScratch(d));
  CudaRmsNormForwardArgs<T> forward{
      .tokens = tokens, .d = d, .eps = 1e-5, .x = x.data(), .w = w.data(), .y = y.data()};
  Time(name + "forward", 2 * bytes, [&] { return CudaRmsNormForward(forward, g_stream); });
  forward.residual = residual.data(), forward.sum = sum.data();
  Time(name + "forward + residual", 4 * bytes, [&] { return CudaRmsNormForward(forward, g_stream); });
  const CudaRmsNormBackwardArgs<T> backward{.tokens = tokens,
                                            .d = d,
                                            .eps = 1e-5,
                                            .x = x.data(),
                                            .w = w.data(),
                                            .dy = residual.data(),
                                            .dx = y.data(),
                                            .dw = dw.data(),
                                            .scratch = scratch.data()};
  Time(name + "backward", 4 * bytes, [&] { return CudaRmsNormBackward(backward, g_stream); });
}

// `columns`: of the rows in which the heads lie.
void TimeRopeOf(const std::string& name, int64_t rows, int64_t heads, int64_t columns) {
  const Filled<Bf16> x(rows * columns);
  std::vector<int64_t> at(static_cast<size_t>(rows));
  for (size_t i = 0; i < at.size(); ++i) at[i] = static_cast<int64_t>(i) * 8;
  const Uploaded<int64_t> positions(at);
  const RopeFrequencies frequencies = MakeRopeFrequencies(1e4, 128);
  Time("rope bf16, " + name, 4 * static_cast<double>(rows * heads * 128), [&] {
    return CudaRope<Bf16>({.rows = rows,
                           .heads = heads,
                           .dim = 128,
                           .pairs = frequencies.pairs(),
                           .row_stride = columns,
                           .batch_stride = columns,
                           .x = x.data(),
                           .positions = positions.data(),
                           .radians = frequencies.radians.data()},
                          g_stream);
  });
}

void TimeSwiglu() {
  const double n = static_cast<double>(kTokens * kFf);
  const Filled<Bf16> gate_up(2 * kTokens * kFf), h(kTokens * kFf);
  const Array<Bf16> gradient(2 * kTokens * kFf);
  Time("swiglu forward bf16", 6 * n,
       [&] { return CudaSwigluForward<Bf16>(kTokens, kFf, gate_up.data(), h.data(), g_stream); });
  Time("swiglu backward bf16", 10 * n, [&] {
    return CudaSwigluBackward<Bf16>(kTokens, kFf, gate_up.data(), h.data(), gradient.data(), g_stream);
  });
}

// Zipf-like: one token in ten is the same, a quarter occur once.
std::vector<int32_t> SomeTokens(int64_t count, int64_t* distinct) {
  std::vector<int32_t> ids(static_cast<size_t>(count));
  std::vector<char> seen(kVocab);
  for (int32_t& t : ids) {
    const double u = static_cast<double>(Rng()() >> 11) * 0x1p-53;
    t = u < 0.05 ? 0 : static_cast<int32_t>(std::pow(static_cast<double>(kVocab), u)) - 1;
    t = std::min(t, static_cast<int32_t>(kVocab) - 1);
    *distinct += !seen[static_cast<size_t>(t)];
    seen[static_cast<size_t>(t)] = 1;
  }
  return ids;
}

void TimeEmbedding() {
  int64_t distinct = 0;
  const Uploaded<int32_t> tokens(SomeTokens(kTokens, &distinct));
  const double n = static_cast<double>(kElements), rows = static_cast<double>(distinct * kWidth);
  const Filled<Bf16> table(kVocab * kWidth), y(kElements);
  const Filled<float> dtable(kVocab * kWidth);
  const Array<char> scratch(CudaEmbeddingBackwardScratchBytes(kTokens, kWidth));
  Time("embedding forward bf16", 2 * n + 2 * rows, [&] {
    return CudaEmbeddingForward<Bf16>(kTokens, kWidth, tokens.data(), table.data(), y.data(), g_stream);
  });
  Time("embedding backward bf16", 2 * n + 8 * rows, [&] {
    return CudaEmbeddingBackward<Bf16>({.token_count = kTokens,
                                        .d = kWidth,
                                        .vocab = kVocab,
                                        .tokens = tokens.data(),
                                        .dy = y.data(),
                                        .dtable = dtable.data(),
                                        .scratch = scratch.data()},
                                       g_stream);
  });
}

void TimeLoss(int64_t vocab) {
  const int64_t tokens = 4096;
  const double logits_of_all = static_cast<double>(tokens * vocab);
  const Filled<float> logits(tokens * vocab);
  const Array<float> row_loss(tokens);
  std::vector<int32_t> ids(static_cast<size_t>(tokens));
  for (int32_t& t : ids) t = static_cast<int32_t>(Rng()() % static_cast<uint64_t>(vocab));
  const Uploaded<int32_t> targets(ids);
  const CudaCrossEntropyArgs args{.tokens = tokens,
                                  .vocab = vocab,
                                  .stride = vocab,
                                  .scale = 1.0 / 8192,
                                  .targets = targets.data(),
                                  .logits = logits.data(),
                                  .row_loss = row_loss.data()};
  const std::string of = ", vocabulary " + std::to_string(vocab);
  Time("loss alone" + of, 4 * logits_of_all, [&] { return CudaCrossEntropyLoss(args, g_stream); });
  Time("loss and gradient" + of, 6 * logits_of_all, [&] { return CudaCrossEntropy<Bf16>(args, g_stream); });
}

template <typename Block>
void TimeMerge(int64_t rows, int64_t heads, int64_t dim) {
  const int64_t n = rows * heads * dim, stats = rows * heads;
  const Filled<float> out(n), lse(stats), block_lse(stats);
  const Filled<Block> block(n);
  const std::string name = std::string("merge ") + NameOf<Block>() + ", " + std::to_string(heads) +
                           " heads of " + std::to_string(dim);
  Time(name, static_cast<double>((sizeof(Block) + 8) * n + 12 * stats), [&] {
    return CudaMergeBlock(
        MergeBlockArgs<Block>{.rows = rows,
                              .heads = heads,
                              .dim = dim,
                              .block_out = {block.data(), heads * dim, 0},
                              .block_lse = RowsLast<const float>(block_lse.data(), rows, heads),
                              .out = {out.data(), heads * dim, 0},
                              .lse = RowsFirst(lse.data(), 1, heads)},
        g_stream);
  });
}

void TimePartial() {
  const int64_t heads = 32, dim = 128, stats = kTokens * heads;
  const Filled<float> sum(kElements), lse(stats);
  const Filled<Bf16> out(kElements), dout(kElements);
  Time("reset of a partial result", static_cast<double>(4 * (kElements + stats)), [&] {
    return CudaResetPartial({.rows = kTokens,
                             .batch = 1,
                             .heads = heads,
                             .v_dim = dim,
                             .out = {sum.data(), kWidth, kWidth},
                             .lse = lse.data()},
                            g_stream);
  });
  Time("attention delta bf16", static_cast<double>(4 * (kElements + stats)), [&] {
    return CudaAttentionDelta<Bf16>({.rows = kTokens,
                                     .batch = 1,
                                     .heads = heads,
                                     .v_dim = dim,
                                     .out = {out.data(), kWidth, kWidth},
                                     .dout = {dout.data(), kWidth, kWidth},
                                     .delta = lse.data()},
                                    g_stream);
  });
}

void TimeColumns(ColumnWrite write, double bytes, const char* name) {
  const int64_t from = 6144, to = 2048;  // K and V out of packed qkv
  const Filled<Bf16> x(kTokens * from), y(kTokens * to);
  const ColumnRuns runs = {
      .count = 2, .begin = {0, 1024}, .from = {4096, 5120}, .to = {0, 1024}, .columns = 2048};
  Time(name, bytes * static_cast<double>(kTokens * to), [&] {
    return CudaMoveColumns<Bf16, Bf16>({.rows = kTokens,
                                        .x = x.data(),
                                        .y = y.data(),
                                        .x_columns = from,
                                        .y_columns = to,
                                        .runs = runs,
                                        .write = write},
                                       g_stream);
  });
}

}  // namespace

void TimeElementwise() {
  TimeCopies();
  TimeOptimizer();
  TimeNorm<Bf16>(kWidth);
  TimeNorm<Bf16>(1024);
  TimeNorm<float>(kWidth);
  TimeRopeOf("32 heads of 128", kTokens, 32, kWidth);
  TimeRopeOf("32 heads in packed qkv", kTokens, 32, 6144);
  TimeRopeOf("8 heads of K in KV rows", 4 * kTokens, 8, 2048);
  TimeRopeOf("8 heads of K in packed qkv", kTokens, 8, 6144);
  TimeSwiglu();
  TimeEmbedding();
  for (const int64_t vocab : {32000, 50304, 128256, 256000}) TimeLoss(vocab);
  TimeMerge<Bf16>(16384, 32, 128);
  TimeMerge<Bf16>(16384, 16, 64);
  TimeMerge<float>(16384, 32, 128);
  TimePartial();
  TimeColumns(ColumnWrite::kOverwrite, 4, "columns moved bf16");
  TimeColumns(ColumnWrite::kAdd, 6, "columns added bf16");
}

}  // namespace annulus::testing
