// Times of the ops of recurrent layers in a layer of Nemotron-H's or Mamba-2's size: 131,072 tokens, 80 heads
// of 64, states of 128, 8 groups. Bytes are those that the kernels' headers count, shares are of the speed at
// which the device copies.

#include "cuda/harness.h"
#include "kernels/conv1d/conv1d_cuda.h"
#include "kernels/delta_rule/delta_rule_cuda.h"
#include "kernels/gated_norm/gated_norm_cuda.h"
#include "kernels/mamba_gates/mamba_gates_cuda.h"
#include "kernels/ssd/ssd_mma.h"

namespace annulus::testing {
namespace {

using namespace annulus::kernels;

constexpr int64_t kTokens = 131072, kHeads = 80, kHeadDim = 64, kState = 128, kGroups = 8, kChunk = 128;
constexpr int64_t kInner = kHeads * kHeadDim, kKeys = kGroups * kState, kColumns = kInner + 2 * kKeys;

double g_copy = 0;  // GB/s

template <typename Fn>
double Time(const std::string& name, double bytes, Fn&& fn) {
  const double ms = Milliseconds(9, [&] { Must(fn(), name.c_str()); });
  const double rate = bytes / ms * 1e-6;
  if (g_copy == 0) g_copy = rate;
  std::printf("time  %-42s %8.3f ms %7.0f GB/s  %5.1f%% of copy\n", name.c_str(), ms, rate,
              100 * rate / g_copy);
  return ms;
}

template <typename T>
class Filled : public Array<T> {
 public:
  explicit Filled(int64_t n, float scale = 1) : Array<T>(n) { FillNormal(this->data(), n, scale, 1); }
};

// dt log-uniform in [0.001, 0.1), a = -rate dt with rates in [1, 16), as models begin.
struct Gates {
  Gates() : dt(kTokens * kHeads), a(kTokens * kHeads) {
    std::vector<double> dts(static_cast<size_t>(kTokens * kHeads)), as(dts.size());
    for (size_t i = 0; i < dts.size(); ++i) {
      const double u = static_cast<double>(Rng()() >> 11) * 0x1p-53;
      dts[i] = 1e-3 * std::pow(100, u);
      as[i] = -dts[i] * (1 + 15 * static_cast<double>(i % kHeads) / kHeads);
    }
    dt.Upload(dts);
    a.Upload(as);
  }
  Array<float> dt, a;
};

SegmentTable OneSegment(int64_t rows, int64_t chunk) {
  SegmentTable table{.count = 1, .chunk = chunk};
  table.begin[1] = rows;
  table.first_chunk[1] = (rows + chunk - 1) / chunk;
  return table;
}

std::vector<double> AgesOfOneDocument(int64_t rows) {
  std::vector<double> ages(static_cast<size_t>(rows));
  for (size_t i = 0; i < ages.size(); ++i) ages[i] = static_cast<double>(i) + 7;
  return ages;
}

// x, b and c lie in one tensor, as a mixer has them.
void TimeScan() {
  const Gates gates;
  const Filled<Bf16> xbc(kTokens * kColumns), dy(kTokens * kInner);
  const Array<Bf16> y(kTokens * kInner), dxbc(kTokens * kColumns);
  const Filled<float> skip(kHeads);
  const Array<int32_t> ages(AgesOfOneDocument(kTokens));
  const StridedRows<const Bf16> x{xbc.data() + 2 * kKeys, kColumns, kColumns},
      b{xbc.data(), kColumns, kColumns}, c{xbc.data() + kKeys, kColumns, kColumns},
      dys{dy.data(), kInner, kInner};
  const CudaSsd<Bf16> ssd{.rows = kTokens,
                          .batch = 1,
                          .heads = kHeads,
                          .groups = kGroups,
                          .dim = kHeadDim,
                          .state = kState,
                          .chunks = OneSegment(kTokens, kChunk),
                          .x = x,
                          .b = b,
                          .c = c,
                          .dt = gates.dt.data(),
                          .a = gates.a.data(),
                          .skip = skip.data(),
                          .ages = ages.data()};
  const int64_t chunks = kTokens / kChunk, state = kState * kHeadDim;
  const Array<float> states(chunks * kHeads * state), gradients(chunks * kHeads * state),
      decays(chunks * kHeads), transition(kHeads), end(kHeads * state), dskip(kHeads), ddt(kTokens * kHeads),
      da(kTokens * kHeads);
  const Array<char> scratch(MmaSsdBackwardScratchBytes(ssd));
  const CudaSsdStates of_states{states.data(), decays.data()}, of_gradients{gradients.data(), decays.data()};
  const CudaSsdSummary summary{transition.data(), end.data()};
  const CudaSsdGradients<Bf16> out{.dy = dys,
                                   .dx = {dxbc.data() + 2 * kKeys, kColumns, kColumns},
                                   .db = {dxbc.data(), kColumns, kColumns},
                                   .dc = {dxbc.data() + kKeys, kColumns, kColumns},
                                   .ddt = ddt.data(),
                                   .da = da.data(),
                                   .dskip = dskip.data()};
  const double token_heads = static_cast<double>(kTokens * kHeads);
  double total = Time("ssd chunk states", 282 * token_heads,
                      [&] { return MmaSsdChunkStates(ssd, of_states, summary, g_stream); });
  // In place: each is timed on what the one before it left, and the second time on what it left itself.
  total += Time("ssd forward", 435 * token_heads,
                [&] { return MmaSsdForward(ssd, nullptr, of_states, {y.data(), kInner, kInner}, g_stream); });
  total += Time("ssd backward chunk states", 282 * token_heads,
                [&] { return MmaSsdBackwardChunkStates(ssd, dys, of_gradients, summary, g_stream); });
  total += Time("ssd backward", 742 * token_heads, [&] {
    return MmaSsdBackward(ssd, of_states, gradients.data(), out, scratch.data(), g_stream);
  });
  std::printf("time  %-42s %8.3f ms\n", "ssd forward and backward", total);
}

void TimeConv() {
  constexpr int64_t kTaps = 4;
  const Filled<Bf16> x(kTokens * kColumns), dy(kTokens * kColumns), w(kColumns * kTaps), bias(kColumns),
      halo((kTaps - 1) * kColumns);
  const Array<Bf16> y(kTokens * kColumns), dhalo((kTaps - 1) * kColumns);
  const Array<float> dw(kColumns * kTaps), dbias(kColumns);
  const Array<int32_t> ages(AgesOfOneDocument(kTokens));
  const ConvTileRows tiles = CudaConv1dTileRows(kTokens, 1, kColumns);
  CudaConv1dArgs<Bf16> args{.rows = kTokens,
                            .batch = 1,
                            .channels = kColumns,
                            .k = kTaps,
                            .tiles = OneSegment(kTokens, tiles.forward),
                            .w = w.data(),
                            .bias = bias.data(),
                            .ages = ages.data(),
                            .halo = halo.data(),
                            .x = {x.data(), kColumns, kColumns}};
  const double bytes = 2 * static_cast<double>(kTokens * kColumns);
  Time("conv1d forward", 2 * bytes,
       [&] { return CudaConv1dForward(args, {y.data(), kColumns, kColumns}, g_stream); });
  args.tiles = OneSegment(kTokens, tiles.backward);
  const Array<float> scratch(CudaConv1dScratch(args));
  Time("conv1d backward", 3 * bytes, [&] {
    return CudaConv1dBackward<Bf16>(args,
                                    {.dy = {dy.data(), kColumns, kColumns},
                                     .dx = {y.data(), kColumns, kColumns},
                                     .dhalo = dhalo.data(),
                                     .dw = dw.data(),
                                     .dbias = dbias.data(),
                                     .scratch = scratch.data()},
                                    g_stream);
  });
}

void TimeGatedNorm(int64_t groups) {
  const Filled<Bf16> x(kTokens * kInner), gate(kTokens * kInner), dy(kTokens * kInner), w(kInner);
  const Array<Bf16> y(kTokens * kInner), dgate(kTokens * kInner);
  const Array<float> dw(kInner), scratch(CudaGatedNormScratch(groups, kInner / groups));
  const CudaGatedNormArgs<Bf16> args{.tokens = kTokens,
                                     .groups = groups,
                                     .columns = kInner / groups,
                                     .group_columns = kInner / groups,
                                     .weight_step = kInner / groups,
                                     .eps = 1e-5,
                                     .x = x.data(),
                                     .gate = gate.data(),
                                     .w = w.data(),
                                     .x_stride = kInner,
                                     .gate_stride = kInner};
  const double bytes = 2 * static_cast<double>(kTokens * kInner);
  const std::string of = ", " + std::to_string(groups) + " groups";
  Time("gated norm forward" + of, 3 * bytes,
       [&] { return CudaGatedNormForward(args, y.data(), kInner, g_stream); });
  Time("gated norm backward" + of, 5 * bytes, [&] {
    return CudaGatedNormBackward<Bf16>(args,
                                       {.dy = dy.data(),
                                        .dx = y.data(),
                                        .dgate = dgate.data(),
                                        .dy_stride = kInner,
                                        .dx_stride = kInner,
                                        .dgate_stride = kInner,
                                        .dw = dw.data(),
                                        .scratch = scratch.data()},
                                       g_stream);
  });
}

void TimeMambaGates() {
  const Filled<Bf16> raw(kTokens * kHeads);
  const Filled<float> bias(kHeads), a_log(kHeads);
  const Array<float> dt(kTokens * kHeads), a(kTokens * kHeads), dbias(kHeads), da_log(kHeads),
      scratch(CudaMambaGatesScratch(kTokens, kHeads));
  const Array<Bf16> draw(kTokens * kHeads);
  const CudaMambaGatesArgs<Bf16> args{.tokens = kTokens,
                                      .heads = kHeads,
                                      .stride = kHeads,
                                      .high = HUGE_VALF,
                                      .raw = raw.data(),
                                      .bias = bias.data(),
                                      .a_log = a_log.data()};
  const double n = static_cast<double>(kTokens * kHeads);
  Time("mamba gates forward", 10 * n,
       [&] { return CudaMambaGatesForward(args, dt.data(), a.data(), g_stream); });
  Time("mamba gates backward", 12 * n, [&] {
    return CudaMambaGatesBackward<Bf16>(args,
                                        {.ddt = dt.data(),
                                         .da = a.data(),
                                         .draw = draw.data(),
                                         .draw_stride = kHeads,
                                         .dbias = dbias.data(),
                                         .da_log = da_log.data(),
                                         .scratch = scratch.data()},
                                        g_stream);
  });
}

// Bytes: forward q, k, v, o and states; backward q, k, v, do, dq, dk, dv and states.
void TimeDeltaRule() {
  constexpr int64_t kRows = 8192, kOfHeads = 16, kDim = 128, kRowsOfChunk = 64;
  constexpr int64_t kWidth = kOfHeads * kDim, kElements = kRows * kWidth;
  const Filled<Bf16> q(kElements, 0.09f), k(kElements, 0.09f), v(kElements), dout(kElements);
  const Array<Bf16> o(kElements), dq(kElements), dk(kElements), dv(kElements);
  const Array<float> beta(std::vector<double>(kRows * kOfHeads, 0.5)),
      a(std::vector<double>(kRows * kOfHeads, -0.01)), states(kRows / kRowsOfChunk * kOfHeads * kDim * kDim),
      dbeta(kRows * kOfHeads), da(kRows * kOfHeads);
  const Array<int32_t> ages(AgesOfOneDocument(kRows));
  const auto of = [&](auto* data) {
    return StridedRows<std::remove_pointer_t<decltype(data)>>{data, kWidth, kWidth};
  };
  const auto in = [&](const Bf16* data) { return of(data); };
  const CudaSsd<Bf16> rule{.rows = kRows,
                           .batch = 1,
                           .heads = kOfHeads,
                           .groups = kOfHeads,
                           .dim = kDim,
                           .state = kDim,
                           .chunks = OneSegment(kRows, kRowsOfChunk),
                           .x = in(v.data()),
                           .b = in(k.data()),
                           .c = in(q.data()),
                           .dt = beta.data(),
                           .a = a.data(),
                           .ages = ages.data()};
  const Array<char> scratch(CudaDeltaScratchBytes(rule));
  const double states_bytes = 4.0 * kDim / kRowsOfChunk;  // of each element of o
  const std::string at = ", 8192 tokens x 16 heads";
  Time("delta rule forward" + at, kElements * (8 + states_bytes), [&] {
    return CudaDeltaForward<Bf16>(rule, nullptr, states.data(), of(o.data()), scratch.data(), g_stream);
  });
  Time("delta rule backward" + at, kElements * (14 + states_bytes), [&] {
    return CudaDeltaBackward<Bf16>(rule,
                                   {.dout = in(dout.data()),
                                    .states = states.data(),
                                    .dq = of(dq.data()),
                                    .dk = of(dk.data()),
                                    .dv = of(dv.data()),
                                    .dbeta = dbeta.data(),
                                    .da = da.data()},
                                   scratch.data(), g_stream);
  });
}

}  // namespace

void TimeStateSpace() {
  {
    const int64_t n = kTokens * kColumns;
    const Filled<Bf16> from(n);
    const Array<Bf16> to(n);
    Time("copy (cudaMemcpyAsync)", 4 * static_cast<double>(n),
         [&] { return cudaMemcpyAsync(to.data(), from.data(), n * 2, cudaMemcpyDeviceToDevice, g_stream); });
  }
  TimeScan();
  TimeConv();
  TimeGatedNorm(kGroups);
  TimeGatedNorm(1);
  TimeMambaGates();
  TimeDeltaRule();
}

}  // namespace annulus::testing
