#include "cuda/harness.h"
#include "kernels/attention/attention_merge_cuda.h"
#include "kernels/attention/cudnn_attention.h"
#include "kernels/elementwise/elementwise_cuda.h"

namespace annulus::testing {
namespace {

using namespace annulus::kernels;

struct Problem {
  int64_t rows, k_rows, batch, heads, kv_heads, dim, v_dim;
  bool causal;
  // q, k, v in one buffer: row = [q heads | k heads | v heads].
  int64_t Width() const { return heads * dim + kv_heads * (dim + v_dim); }
  double Scale() const { return 1 / std::sqrt(static_cast<double>(dim)); }
};
struct Reference {
  Doubles qkv, dout;  // [rows, batch, width], [rows, batch, heads, v_dim]
  Doubles out, lse;   // lse: [rows, batch, heads]
  Doubles dqkv;
};

Reference Compute(const Problem& p) {
  Reference r;
  const int64_t rows = std::max(p.rows, p.k_rows);
  r.qkv = Random<Bf16>(rows * p.batch * p.Width());
  r.dout = Random<Bf16>(p.rows * p.batch * p.heads * p.v_dim);
  r.out.resize(r.dout.size());
  r.lse.resize(static_cast<size_t>(p.rows * p.batch * p.heads));
  r.dqkv.assign(r.qkv.size(), 0.0);
  const int64_t group = p.heads / p.kv_heads;
  ParallelFor(
      p.batch * p.kv_heads, [&](int64_t task) {  // one KV head a task: its heads add to the same dK, dV
        const int64_t b = task / p.kv_heads, kh = task % p.kv_heads;
        Doubles s(static_cast<size_t>(p.k_rows));
        for (int64_t h = kh * group; h < (kh + 1) * group; ++h) {
          for (int64_t i = 0; i < p.rows; ++i) {
            const auto q = static_cast<size_t>((i * p.batch + b) * p.Width() + h * p.dim);
            const auto o = static_cast<size_t>(((i * p.batch + b) * p.heads + h) * p.v_dim);
            const int64_t keys = p.causal ? std::min(i + 1, p.k_rows) : p.k_rows;
            const auto key = [&](int64_t j) {
              return static_cast<size_t>((j * p.batch + b) * p.Width() + p.heads * p.dim + kh * p.dim);
            };
            const auto val = [&](int64_t j) {
              return static_cast<size_t>((j * p.batch + b) * p.Width() + (p.heads + p.kv_heads) * p.dim +
                                         kh * p.v_dim);
            };
            double top = -INFINITY, sum = 0, delta = 0;
            for (int64_t j = 0; j < keys; ++j) {
              double dot = 0;
              for (int64_t e = 0; e < p.dim; ++e)
                dot += r.qkv[q + static_cast<size_t>(e)] * r.qkv[key(j) + static_cast<size_t>(e)];
              s[static_cast<size_t>(j)] = dot * p.Scale();
              top = std::max(top, s[static_cast<size_t>(j)]);
            }
            for (int64_t j = 0; j < keys; ++j)
              sum += s[static_cast<size_t>(j)] = std::exp(s[static_cast<size_t>(j)] - top);
            for (int64_t j = 0; j < keys; ++j)
              for (int64_t e = 0; e < p.v_dim; ++e)
                r.out[o + static_cast<size_t>(e)] +=
                    s[static_cast<size_t>(j)] / sum * r.qkv[val(j) + static_cast<size_t>(e)];
            r.lse[static_cast<size_t>((i * p.batch + b) * p.heads + h)] = top + std::log(sum);
            for (int64_t e = 0; e < p.v_dim; ++e)
              delta += r.dout[o + static_cast<size_t>(e)] * r.out[o + static_cast<size_t>(e)];
            for (int64_t j = 0; j < keys; ++j) {
              const double w = s[static_cast<size_t>(j)] / sum;
              double dp = 0;
              for (int64_t e = 0; e < p.v_dim; ++e) {
                dp += r.dout[o + static_cast<size_t>(e)] * r.qkv[val(j) + static_cast<size_t>(e)];
                r.dqkv[val(j) + static_cast<size_t>(e)] += w * r.dout[o + static_cast<size_t>(e)];
              }
              const double ds = w * (dp - delta) * p.Scale();
              for (int64_t e = 0; e < p.dim; ++e) {
                r.dqkv[q + static_cast<size_t>(e)] += ds * r.qkv[key(j) + static_cast<size_t>(e)];
                r.dqkv[key(j) + static_cast<size_t>(e)] += ds * r.qkv[q + static_cast<size_t>(e)];
              }
            }
          }
        }
      });
  return r;
}

// dQ, dK, dV of [rows, batch, width], one after the other.
struct Parts {
  Doubles q, k, v;
};
Parts Split(const Problem& p, const Doubles& x) {
  Parts parts;
  const int64_t q = p.heads * p.dim, k = p.kv_heads * p.dim, rows = std::max(p.rows, p.k_rows);
  for (int64_t r = 0; r < rows * p.batch; ++r)
    for (int64_t c = 0; c < p.Width(); ++c) {
      const double value = x[static_cast<size_t>(r * p.Width() + c)];
      const int64_t row = r / p.batch;
      if (c < q) {
        if (row < p.rows) parts.q.push_back(value);
      } else if (row < p.k_rows)
        (c < q + k ? parts.k : parts.v).push_back(value);
    }
  return parts;
}

// Workspace that grows.
struct Workspace {
  void* data = nullptr;
  int64_t bytes = 0;
  CudnnCall Call(int64_t need) {
    if (need > bytes) {
      cudaFree(data);
      Must(cudaMalloc(&data, need), "cudnn workspace");
      bytes = need;
    }
    return {data, bytes, g_stream};
  }
  ~Workspace() { cudaFree(data); }
};
template <typename T>
T Take(absl::StatusOr<T> x) {
  Ok(x.status());
  return std::move(x).value();
}

CudnnBlock BlockOf(const Problem& p, int64_t rows, int64_t k_rows, CudnnMask mask) {
  const CudnnStrides qkv{p.batch * p.Width(), p.Width()}, out{p.batch * p.heads * p.v_dim, p.heads * p.v_dim};
  return {.batch = p.batch,
          .heads = p.heads,
          .kv_heads = p.kv_heads,
          .q_rows = rows,
          .k_rows = k_rows,
          .dim = p.dim,
          .v_dim = p.v_dim,
          .mask = mask,
          .scale = static_cast<float>(p.Scale()),
          .q = qkv,
          .k = qkv,
          .v = qkv,
          .out = out,
          .dout = out,
          .dq = qkv,
          .dk = qkv,
          .dv = qkv};
}

std::string NameOf(const Problem& p) {
  char text[96];
  std::snprintf(text, sizeof(text), "%ld/%ld x %ld, heads %ld/%ld of %ld/%ld %s", long(p.rows),
                long(p.k_rows), long(p.batch), long(p.heads), long(p.kv_heads), long(p.dim), long(p.v_dim),
                p.causal ? "causal" : "full");
  return text;
}

struct Errors {
  Error out, lse, dq, dk, dv;
};
void Print(const char* what, const Errors& e) {
  std::printf(
      "error %-26s l2: O %.2e LSE %.2e dQ %.2e dK %.2e dV %.2e   max: O %.2e dQ %.2e dK %.2e dV %.2e\n", what,
      e.out.l2, e.lse.l2, e.dq.l2, e.dk.l2, e.dv.l2, e.out.max, e.dq.max, e.dk.max, e.dv.max);
}

Errors OneCall(CudnnAttention& cudnn, Workspace& space, const Problem& p, const Reference& r) {
  Array<Bf16> qkv(r.qkv), dout(r.dout), out(static_cast<int64_t>(r.out.size())),
      dqkv(static_cast<int64_t>(r.qkv.size()));
  Array<float> lse(static_cast<int64_t>(r.lse.size())), order(static_cast<int64_t>(r.lse.size()));
  const CudnnBlock block = BlockOf(p, p.rows, p.k_rows, p.causal ? CudnnMask::kCausal : CudnnMask::kFull);
  Bf16 *k = qkv.data() + p.heads * p.dim, *v = k + p.kv_heads * p.dim, *dk = dqkv.data() + p.heads * p.dim,
       *dv = dk + p.kv_heads * p.dim;
  Ok(cudnn.Forward(block, {qkv.data(), k, v, out.data(), lse.data()},
                   space.Call(Take(cudnn.ForwardWorkspaceBytes(block)))));
  Ok(cudnn.Backward(block, {qkv.data(), k, v, out.data(), dout.data(), lse.data(), dqkv.data(), dk, dv},
                    space.Call(Take(cudnn.BackwardWorkspaceBytes(block)))));
  Must(CudaCopyLse({.rows = p.rows,
                    .batch = p.batch,
                    .heads = p.heads,
                    .from = lse.data(),
                    .from_stride = PackedStats(p.rows, p.heads),
                    .to = order.data(),
                    .to_stride = {p.batch * p.heads, p.heads, 1}},
                   g_stream),
       "copy lse");
  const Parts got = Split(p, dqkv.Get("dqkv")), want = Split(p, r.dqkv);
  lse.Get("lse");
  return {ErrorOf(out.Get("out"), r.out), ErrorOf(order.Get("lse"), r.lse), ErrorOf(got.q, want.q),
          ErrorOf(got.k, want.k), ErrorOf(got.v, want.v)};
}

// A zigzag ring of `ranks`: rank r holds chunks r and 2 ranks - 1 - r of queries and meets the KV of r, r-1,
// ...
Errors Ring(CudnnAttention& cudnn, Workspace& space, const Problem& p, const Reference& r, int64_t ranks) {
  const int64_t chunks = 2 * ranks, n = p.rows / chunks, w = p.batch * p.Width(),
                ow = p.batch * p.heads * p.v_dim, lw = p.batch * p.heads;
  Array<Bf16> qkv(r.qkv), dout(r.dout), block_out(n * ow), final_out(static_cast<int64_t>(r.out.size())),
      block_d(2 * n * w);
  Array<float> block_lse(n * lw), out(static_cast<int64_t>(r.out.size())),
      lse(static_cast<int64_t>(r.lse.size())), packed(n * lw);
  Array<float> dqkv(Doubles(r.qkv.size(), 0.0));
  const int64_t ko = p.heads * p.dim, vo = ko + p.kv_heads * p.dim;
  const CudnnBlock full = BlockOf(p, n, n, CudnnMask::kFull), causal = BlockOf(p, n, n, CudnnMask::kCausal);
  const auto visit = [&](const std::function<void(int64_t a, int64_t b, bool first)>& fn) {
    for (int64_t rank = 0; rank < ranks; ++rank)
      for (int64_t a : {rank, chunks - 1 - rank}) {
        bool first = true;
        for (int64_t step = 0; step < ranks; ++step) {
          const int64_t from = (rank - step + ranks) % ranks;
          for (int64_t b : {from, chunks - 1 - from}) {
            if (b <= a) fn(a, b, first), first = false;
          }
        }
      }
  };
  const LseStrides rows_first{p.batch * p.heads, p.heads, 1};
  visit([&](int64_t a, int64_t b, bool first) {
    const CudnnBlock& block = a == b ? causal : full;
    const Bf16 *q = qkv.data() + a * n * w, *kv = qkv.data() + b * n * w;
    Ok(cudnn.Forward(block, {q, kv + ko, kv + vo, block_out.data(), block_lse.data()},
                     space.Call(Take(cudnn.ForwardWorkspaceBytes(block)))));
    Must(CudaMergeBlock({.rows = n,
                         .batch = p.batch,
                         .heads = p.heads,
                         .dim = p.v_dim,
                         .block_out = block_out.data(),
                         .block_out_stride = {ow, ow / p.batch},
                         .block_lse = block_lse.data(),
                         .block_lse_stride = PackedStats(n, p.heads),
                         .out = out.data() + a * n * ow,
                         .out_stride = {ow, ow / p.batch},
                         .lse = lse.data() + a * n * lw,
                         .lse_stride = rows_first},
                        first ? MergeMode::kFirst : MergeMode::kContinue, g_stream),
         "merge");
  });
  Must((CudaCastRows<float, Bf16>({p.rows, 1, ow}, {out.data(), ow}, {final_out.data(), ow}, g_stream)),
       "finish");
  visit([&](int64_t a, int64_t b, bool first) {
    const CudnnBlock& block = a == b ? causal : full;
    const Bf16 *q = qkv.data() + a * n * w, *kv = qkv.data() + b * n * w;
    if (first)
      Must(CudaCopyLse({.rows = n,
                        .batch = p.batch,
                        .heads = p.heads,
                        .from = lse.data() + a * n * lw,
                        .from_stride = rows_first,
                        .to = packed.data(),
                        .to_stride = PackedStats(n, p.heads)},
                       g_stream),
           "copy lse");
    Bf16 *dq = block_d.data(), *dkv = dq + n * w;
    Ok(cudnn.Backward(block,
                      {q, kv + ko, kv + vo, final_out.data() + a * n * ow, dout.data() + a * n * ow,
                       packed.data(), dq, dkv + ko, dkv + vo},
                      space.Call(Take(cudnn.BackwardWorkspaceBytes(block)))));
    const auto add = [&](const Bf16* from, int64_t chunk, int64_t column, int64_t columns) {
      Must((CudaAddRows<Bf16, float>({n, p.batch, columns}, {from + column, w, p.Width()},
                                     {dqkv.data() + chunk * n * w + column, w, p.Width()}, g_stream)),
           "add");
    };
    add(dq, a, 0, p.heads * p.dim);
    add(dkv, b, ko, p.kv_heads * p.dim);
    add(dkv, b, vo, p.kv_heads * p.v_dim);
  });
  const Parts got = Split(p, dqkv.Get("ring dqkv")), want = Split(p, r.dqkv);
  block_d.Get("ring block gradients"), block_lse.Get("ring block lse"), block_out.Get("ring block out"),
      packed.Get("ring packed lse");
  return {ErrorOf(out.Get("ring out"), r.out), ErrorOf(lse.Get("ring lse"), r.lse), ErrorOf(got.q, want.q),
          ErrorOf(got.k, want.k), ErrorOf(got.v, want.v)};
}

void CheckMerge() {
  struct Case {
    int64_t rows, batch, heads, dim, pad;
  };
  for (const Case& c : {Case{1, 1, 1, 8, 0}, Case{33, 2, 3, 128, 8}, Case{70, 1, 5, 64, 0},
                        Case{31, 2, 2, 96, 16}, Case{65, 1, 2, 16, 0}, Case{40, 3, 1, 24, 8}}) {
    const int64_t ow = c.heads * c.dim + c.pad, row = c.batch * ow, n = c.rows * c.batch * c.heads;
    const Doubles a = Random<float>(c.rows * row), b = Random<Bf16>(c.rows * row);
    Doubles la = Random<float>(n, 3), lb = Random<float>(n, 3);
    for (int64_t i = 0; i < n; ++i) {
      if (i % 7 == 1) la[static_cast<size_t>(i)] = -INFINITY;
      if (i % 5 == 1) lb[static_cast<size_t>(i)] = -INFINITY;
    }
    const LseStrides rows_first{c.batch * c.heads, c.heads, 1}, packed = PackedStats(c.rows, c.heads);
    Doubles packed_b(lb.size()), want(a), want_lse(la), first(a), poisoned_a(a), poisoned_b(b);
    double got_bits = 0;
    for (int64_t r = 0; r < c.rows; ++r)
      for (int64_t i = 0; i < c.batch; ++i)
        for (int64_t h = 0; h < c.heads; ++h) {
          const auto l = static_cast<size_t>((r * c.batch + i) * c.heads + h);
          packed_b[static_cast<size_t>(r + i * packed.batch + h * packed.head)] = lb[l];
          const double top = std::max(la[l], lb[l]), wa = std::isinf(top) ? 0 : std::exp(la[l] - top),
                       wb = std::isinf(top) ? 0 : std::exp(lb[l] - top);
          if (!std::isinf(top)) want_lse[l] = top + std::log(wa + wb);
          for (int64_t e = 0; e < c.dim; ++e) {
            const auto o = static_cast<size_t>(r * row + i * ow + h * c.dim + e);
            want[o] = std::isinf(top) ? 0 : (wa * a[o] + wb * b[o]) / (wa + wb);
            first[o] = std::isinf(lb[l]) ? 0 : b[o];
            if (std::isinf(la[l])) poisoned_a[o] = NAN;
            if (std::isinf(lb[l])) poisoned_b[o] = NAN;
          }
        }
    Array<Bf16> gb(poisoned_b);
    Array<float> ga(poisoned_a), gla(la), glb(packed_b), gfirst(c.rows * row), glfirst(n);
    gfirst.Upload(a);
    MergeBlockArgs args{.rows = c.rows,
                        .batch = c.batch,
                        .heads = c.heads,
                        .dim = c.dim,
                        .block_out = gb.data(),
                        .block_out_stride = {row, ow},
                        .block_lse = glb.data(),
                        .block_lse_stride = packed,
                        .out = ga.data(),
                        .out_stride = {row, ow},
                        .lse = gla.data(),
                        .lse_stride = rows_first};
    Must(CudaMergeBlock(args, MergeMode::kContinue, g_stream), "merge");
    args.out = gfirst.data(), args.lse = glfirst.data();
    Must(CudaMergeBlock(args, MergeMode::kFirst, g_stream), "merge first");
    const std::string detail = std::to_string(c.rows) + " " + std::to_string(c.dim);
    const Doubles got = ga.Get("merge"), got_lse = gla.Get("merge lse"),
                  lse_first = glfirst.Get("merge first lse");
    Compare("merge O", detail, got, want, 1e-6);
    Compare("merge first O", detail, gfirst.Get("merge first"), first, 0);
    Expect(lse_first == lb, "merge first lse " + detail);
    Doubles x, y;
    for (size_t i = 0; i < got_lse.size(); ++i) {
      if (std::isinf(want_lse[i]))
        Expect(got_lse[i] == want_lse[i], "merge lse stays -inf");
      else
        x.push_back(got_lse[i]), y.push_back(want_lse[i]);
      if (std::isinf(lb[i]) && !std::isinf(la[i])) got_bits += got_lse[i] != la[i];
    }
    Expect(got_bits == 0, "merge of nothing leaves LSE bit-identical");
    Compare("merge LSE", detail, x, y, 1e-6);
  }
}

// One timed block; a failure to plan is reported, not fatal: support differs between library versions.
void Time(CudnnAttention& cudnn, const Problem& p) {
  Workspace space;
  const CudnnBlock block = BlockOf(p, p.rows, p.k_rows, p.causal ? CudnnMask::kCausal : CudnnMask::kFull);
  const auto forward = cudnn.ForwardWorkspaceBytes(block), backward = cudnn.BackwardWorkspaceBytes(block);
  if (!forward.ok() || !backward.ok()) {
    std::printf("time  %s: %s %s\n", NameOf(p).c_str(), std::string(forward.status().message()).c_str(),
                std::string(backward.status().message()).c_str());
    return;
  }
  const int64_t n = std::max(p.rows, p.k_rows) * p.batch * p.Width(),
                on = p.rows * p.batch * p.heads * p.v_dim;
  Bf16 *qkv, *dqkv, *out, *dout;
  float* lse;
  Must(cudaMalloc(&qkv, n * 2), "malloc");
  Must(cudaMalloc(&dqkv, n * 2), "malloc");
  Must(cudaMalloc(&out, on * 2), "malloc");
  Must(cudaMalloc(&dout, on * 2), "malloc");
  Must(cudaMalloc(&lse, p.rows * p.batch * p.heads * 4), "malloc");
  FillNormal(qkv, n, 1, 1), FillNormal(dout, on, 1, 2);
  const int64_t ko = p.heads * p.dim, vo = ko + p.kv_heads * p.dim;
  const CudnnCall call = space.Call(std::max(*forward, *backward));
  const double f = Milliseconds(5, [&] {
    Ok(cudnn.Forward(block, {qkv, qkv + ko, qkv + vo, out, lse}, call));
  });
  const double b = Milliseconds(5, [&] {
    Ok(cudnn.Backward(block, {qkv, qkv + ko, qkv + vo, out, dout, lse, dqkv, dqkv + ko, dqkv + vo}, call));
  });
  const double pairs = static_cast<double>(p.rows) * static_cast<double>(p.k_rows) *
                       static_cast<double>(p.batch * p.heads) * (p.causal ? 0.5 : 1);
  const double d = static_cast<double>(p.dim), v = static_cast<double>(p.v_dim);
  std::printf("time  %-52s fwd %7.3f ms %4.0f TFLOP/s, bwd %7.3f ms %4.0f TFLOP/s, workspace %ld / %ld MiB\n",
              NameOf(p).c_str(), f, pairs * 2 * (d + v) / f * 1e-9, b, pairs * (6 * d + 4 * v) / b * 1e-9,
              long(*forward >> 20), long(*backward >> 20));
  for (void* x : {(void*)qkv, (void*)dqkv, (void*)out, (void*)dout, (void*)lse}) cudaFree(x);
}

}  // namespace

void CheckAttention() {
  CheckMerge();
  auto cudnn = Take(CudnnAttention::Create());
  Workspace space;
  for (const Problem& p :
       {Problem{256, 256, 2, 4, 2, 64, 64, true}, Problem{192, 320, 1, 4, 4, 64, 64, false},
        Problem{256, 256, 2, 4, 1, 128, 128, true}, Problem{200, 136, 2, 4, 2, 128, 128, false},
        Problem{256, 256, 1, 2, 2, 192, 128, true}, Problem{256, 128, 1, 2, 2, 192, 128, false}}) {
    const CudnnBlock block = BlockOf(p, p.rows, p.k_rows, p.causal ? CudnnMask::kCausal : CudnnMask::kFull);
    const auto forward = cudnn->ForwardWorkspaceBytes(block), backward = cudnn->BackwardWorkspaceBytes(block);
    if (!forward.ok() || !backward.ok()) {
      Expect(false, "cudnn " + NameOf(p) + ": " + std::string(forward.status().message()) + " " +
                        std::string(backward.status().message()));
      continue;
    }
    const Errors e = OneCall(*cudnn, space, p, Compute(p));
    Print(NameOf(p).c_str(), e);
    // O is rounded once more than P; gradients carry the rounding of P, dS, O and themselves.
    Expect(e.out.l2 < 4e-3 && e.lse.l2 < 1e-5 && e.dq.l2 < 1e-2 && e.dk.l2 < 1e-2 && e.dv.l2 < 1e-2,
           "cudnn " + NameOf(p));
  }
  const Problem p{2048, 2048, 1, 4, 2, 128, 128, true};
  const Reference r = Compute(p);
  const Errors one = OneCall(*cudnn, space, p, r);
  Print("one call of 2048", one);
  for (int64_t ranks : {1, 4, 16}) {
    const Errors ring = Ring(*cudnn, space, p, r, ranks);
    char name[40];
    std::snprintf(name, sizeof(name), "zigzag ring of %ld", long(ranks));
    Print(name, ring);
    Expect(ring.out.l2 < 2 * one.out.l2 && ring.lse.l2 < 1e-5 && ring.dq.l2 < 2 * one.dq.l2 &&
               ring.dk.l2 < 2 * one.dk.l2 && ring.dv.l2 < 2 * one.dv.l2,
           name);
  }
}

void TimeAttention() {
  auto cudnn = Take(CudnnAttention::Create());
  for (const Problem& p :
       {Problem{32768, 32768, 1, 16, 16, 128, 128, true}, Problem{16384, 16384, 1, 16, 16, 128, 128, false},
        Problem{16384, 16384, 1, 32, 8, 128, 128, true}, Problem{8192, 8192, 1, 32, 8, 128, 128, false},
        Problem{32768, 32768, 1, 16, 16, 64, 64, true}, Problem{16384, 16384, 1, 16, 16, 64, 64, false},
        Problem{16384, 16384, 1, 16, 16, 192, 128, true}, Problem{8192, 8192, 1, 16, 16, 192, 128, false},
        Problem{2048, 2048, 1, 32, 8, 128, 128, false}}) {
    Time(*cudnn, p);
  }
  const int64_t rows = 16384, heads = 32, dim = 128, n = rows * heads * dim;
  Bf16* block;
  float *out, *lse, *lb;
  Must(cudaMalloc(&block, n * 2), "malloc");
  Must(cudaMalloc(&out, n * 4), "malloc");
  Must(cudaMalloc(&lse, rows * heads * 4), "malloc");
  Must(cudaMalloc(&lb, rows * heads * 4), "malloc");
  FillNormal(block, n, 1, 1), FillNormal(out, n, 1, 2), FillNormal(lse, rows * heads, 1, 3),
      FillNormal(lb, rows * heads, 1, 4);
  const MergeBlockArgs args{.rows = rows,
                            .heads = heads,
                            .dim = dim,
                            .block_out = block,
                            .block_out_stride = {heads * dim, 0},
                            .block_lse = lb,
                            .block_lse_stride = PackedStats(rows, heads),
                            .out = out,
                            .out_stride = {heads * dim, 0},
                            .lse = lse,
                            .lse_stride = {heads, 0, 1}};
  double ms = Milliseconds(9, [&] { Must(CudaMergeBlock(args, MergeMode::kContinue, g_stream), "merge"); });
  std::printf("time  merge 16384 x 32 x 128 %30.3f ms %6.0f GB/s\n", ms,
              (10.0 * static_cast<double>(n) + 12.0 * rows * heads) / ms * 1e-6);
  ms = Milliseconds(9, [&] { Must(CudaMergeBlock(args, MergeMode::kFirst, g_stream), "merge"); });
  std::printf("time  merge, first block %33.3f ms %6.0f GB/s\n", ms,
              (6.0 * static_cast<double>(n) + 8.0 * rows * heads) / ms * 1e-6);
  for (void* x : {(void*)block, (void*)out, (void*)lse, (void*)lb}) cudaFree(x);
}

}  // namespace annulus::testing
