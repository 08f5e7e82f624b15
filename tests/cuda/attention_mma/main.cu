// Checks block attention on tensor cores against the naive double reference, then times it.
//     build/tests/attention_mma_check

#include "cuda/attention_mma/device_arrays.h"
#include "cuda/attention_mma/timing.h"

namespace annulus::testing {
namespace {

struct Case {
  const char* name;
  int64_t dim, v_dim, q_rows, k_rows, batch, heads, kv_heads;
  Mask mask = Mask::kCausal;
  int chunks = 1;
  bool striped = false;
  bool far = false;
  int64_t window = 50;
};

Problem MakeProblem(const Case& c, std::mt19937& rng) {
  Problem p{c.q_rows, c.k_rows, c.batch, c.heads, c.kv_heads, c.dim, c.v_dim, 1 / std::sqrt(double(c.dim)),
            {},       {},       {},      {},      {},         {}};
  std::normal_distribution<double> normal;
  const auto fill = [&](std::vector<double>* x, int64_t n, double sigma) {
    x->resize(Size(n));
    for (double& e : *x) e = RoundToBf16(sigma * normal(rng));
  };
  fill(&p.q, c.q_rows * c.batch * c.heads * c.dim, 1.5);  // scores of spread 1.5: neither flat nor one key
  fill(&p.k, c.k_rows * c.batch * c.kv_heads * c.dim, 1);
  fill(&p.v, c.k_rows * c.batch * c.kv_heads * c.v_dim, 1);
  fill(&p.dout, c.q_rows * c.batch * c.heads * c.v_dim, 1);
  p.lo.assign(Size(c.q_rows * c.batch), 0);
  p.hi.assign(Size(c.q_rows * c.batch), c.k_rows);
  for (int64_t item = 0; item < c.batch; ++item) {
    std::vector<int64_t> document_start(Size(c.k_rows));
    for (int64_t j = 1; j < c.k_rows; ++j) {
      const bool starts = rng() % 40 == 0 || (j > 20 && j < 24);  // some documents of one token
      document_start[Size(j)] = starts ? j : document_start[Size(j - 1)];
    }
    for (int64_t i = 0; i < c.q_rows; ++i) {
      int64_t &lo = p.lo[Size(i * c.batch + item)], &hi = p.hi[Size(i * c.batch + item)];
      // Queries end where the keys end: the first may be before all keys.
      const int64_t position = c.k_rows - c.q_rows + i;
      switch (c.mask) {
        case Mask::kFull:
          break;
        case Mask::kCausal:
          hi = position + 1;
          break;
        case Mask::kWindow:
          lo = position - c.window + 1;
          hi = position + 1;
          break;
        case Mask::kDocuments:
          lo = position < 0 ? 0 : document_start[Size(position)];
          hi = position + 1;
          break;
        case Mask::kRandom:
          lo = static_cast<int64_t>(rng() % Size(c.k_rows));
          hi = rng() % 4 == 0 ? lo - static_cast<int64_t>(rng() % 3)
                              : lo + 1 + static_cast<int64_t>(rng() % 200);
          break;
      }
    }
  }
  return p;
}

struct Checker {
  bool ok = true;
  std::string text;

  // max |got - want| <= 2 max |naive - want| + atol, all finite.
  void Compare(const char* name, const std::vector<double>& got, const std::vector<double>& want,
               const std::vector<double>& naive, double atol) {
    double error = 0, naive_error = 0, square = 0, norm = 0;
    bool finite = true;
    for (size_t i = 0; i < want.size(); ++i) {
      if (std::isinf(want[i])) {
        finite = finite && got[i] == want[i];
        continue;
      }
      finite = finite && std::isfinite(got[i]);
      error = std::max(error, std::abs(got[i] - want[i]));
      naive_error = std::max(naive_error, std::abs(naive[i] - want[i]));
      square += (got[i] - want[i]) * (got[i] - want[i]);
      norm += want[i] * want[i];
    }
    const bool good = finite && error <= 2 * naive_error + atol;
    ok = ok && good;
    char line[200];
    std::snprintf(line, sizeof line, " %s %.1e/%.1e rel %.1e%s", name, error, naive_error,
                  std::sqrt(square / std::max(norm, 1e-30)),
                  good     ? ""
                  : finite ? " FAIL"
                           : " NONFINITE");
    text += line;
  }
  void Require(bool condition, const char* what) {
    if (condition) return;
    ok = false;
    text += std::string(" FAIL:") + what;
  }
};

template <typename T>
std::vector<T> Convert(const std::vector<double>& x) {
  std::vector<T> y(x.size());
  std::transform(x.begin(), x.end(), y.begin(), FromDouble<T>);
  return y;
}

// A case with its solutions, made on all cores before the device is needed.
struct Prepared {
  Case c;
  std::mt19937 rng;
  Problem p;                    // bounds are key rows
  std::vector<int64_t> lo, hi;  // the bounds as the kernel gets them
  Solution exact, naive;
};

Prepared Prepare(const Case& c, uint32_t seed) {
  Prepared made{.c = c, .rng = std::mt19937(seed), .p = {}, .lo = {}, .hi = {}, .exact = {}, .naive = {}};
  Problem& p = made.p = MakeProblem(c, made.rng);
  made.lo = p.lo;
  made.hi = p.hi;
  for (int64_t& x : p.lo) x = std::clamp<int64_t>(x, 0, c.k_rows);
  for (int64_t& x : p.hi) x = std::clamp<int64_t>(x, 0, c.k_rows);
  made.exact = Solve(p, RoundNot);
  made.naive = Solve(p, RoundToBf16);
  return made;
}

bool Check(Prepared& prepared) {
  const Case& c = prepared.c;
  std::mt19937& rng = prepared.rng;
  const Problem& p = prepared.p;
  const Solution &exact = prepared.exact, &naive = prepared.naive;
  int64_t begin = c.k_rows, end = 0;
  for (size_t i = 0; i < p.lo.size(); ++i) {
    if (p.lo[i] >= p.hi[i]) continue;
    begin = std::min(begin, p.lo[i]);
    end = std::max(end, p.hi[i]);
  }

  // Keys that no query sees are NaN on the device.
  std::vector<double> k = p.k, v = p.v;
  for (int64_t j = 0; j < c.k_rows; ++j) {
    if (begin <= j && j < end) continue;
    const int64_t row = c.batch * c.kv_heads;
    std::fill_n(k.begin() + j * row * c.dim, row * c.dim, NAN);
    std::fill_n(v.begin() + j * row * c.v_dim, row * c.v_dim, NAN);
  }
  StridedHeads<bf16> dq_in(c.q_rows, c.batch, c.heads * c.dim, c.far),
      dk_in(c.k_rows, c.batch, c.kv_heads * c.dim, c.far),
      dv_in(c.k_rows, c.batch, c.kv_heads * c.v_dim, c.far),
      ddout(c.q_rows, c.batch, c.heads * c.v_dim, c.far);
  dq_in.Upload(Convert<bf16>(p.q));
  dk_in.Upload(Convert<bf16>(k));
  dv_in.Upload(Convert<bf16>(v));
  ddout.Upload(Convert<bf16>(p.dout));
  DeviceArray<int64_t> dlo(prepared.lo), dhi(prepared.hi);

  // The carry: nothing yet for rows that will see keys, with outputs poisoned; for rows that see none, values
  // that must survive.
  std::vector<float> out0(exact.out.size()), lse0(exact.lse.size());
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < lse0.size(); ++i) {
    const bool carry = std::isinf(exact.lse[i]) && i % 3 != 0;
    lse0[i] = carry ? normal(rng) : -INFINITY;
    for (size_t d = 0; d < Size(c.v_dim); ++d) out0[i * Size(c.v_dim) + d] = carry ? normal(rng) : NAN;
  }
  StridedHeads<float> out(c.q_rows, c.batch, c.heads * c.v_dim, c.far);
  StridedHeads<bf16> result(c.q_rows, c.batch, c.heads * c.v_dim, c.far);
  out.Upload(out0);
  result.Upload(std::vector<bf16>(out0.size(), FromDouble<bf16>(NAN)));
  DeviceArray<float> lse(lse0);

  // Chunks of keys, in any order.
  std::vector<int> order(Size(c.chunks));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), rng);
  const auto block_of = [&](int chunk) {
    const int64_t rows = (c.k_rows + c.chunks - 1) / c.chunks;
    const int64_t first = c.striped ? chunk : std::min(c.k_rows, chunk * rows),
                  step = c.striped ? c.chunks : 1;
    return MmaAttentionBlock{
        .q = dq_in.Heads<const bf16>(),
        .k = dk_in.Heads<const bf16>(first, step),
        .v = dv_in.Heads<const bf16>(first, step),
        .q_rows = c.q_rows,
        .k_rows = c.striped ? (c.k_rows - chunk + c.chunks - 1) / c.chunks : std::min(rows, c.k_rows - first),
        .batch = c.batch,
        .heads = c.heads,
        .kv_heads = c.kv_heads,
        .dim = c.dim,
        .v_dim = c.v_dim,
        .lo = dlo.data,
        .hi = dhi.data,
        .key_offset = first,
        .key_stride = step,
        .scale = static_cast<float>(p.scale)};
  };
  for (int i = 0; i < c.chunks; ++i) {
    MmaAttentionPartial partial{out.Heads<float>(), lse.data, {}};
    if (i == c.chunks - 1) partial.result = result.Heads<bf16>();
    CUDA(kernels::MmaAttentionForward(block_of(order[Size(i)]), partial, nullptr));
  }
  CUDA(cudaDeviceSynchronize());
  Checker check;
  bool intact = true;
  std::vector<float> out1 = out.Download(&intact), lse1(lse0.size());
  std::vector<bf16> result1 = result.Download(&intact);
  CUDA(cudaMemcpy(lse1.data(), lse.data, lse1.size() * sizeof(float), cudaMemcpyDeviceToHost));
  bool kept = true, rounded = true;
  for (size_t i = 0; i < lse1.size(); ++i) {
    const size_t at = i * Size(c.v_dim);
    const bool empty = std::isinf(exact.lse[i]);
    if (empty) {
      kept = kept && std::memcmp(&lse0[i], &lse1[i], 4) == 0 &&
             std::memcmp(&out0[at], &out1[at], Size(c.v_dim) * 4) == 0;
    }
    for (size_t d = at; d < at + Size(c.v_dim); ++d) {
      const bool nothing = empty && lse0[i] == -INFINITY;
      // Normalised twice, f32 and bf16 see the same value.
      rounded = rounded && ToDouble(result1[d]) == (nothing ? 0 : RoundToBf16(out1[d]));
      if (empty) out1[d] = 0;
    }
    if (empty) lse1[i] = -INFINITY;
  }
  check.Require(kept, "bits of empty rows");
  check.Require(rounded, "rounded result");
  check.Compare("O", Doubles(out1), exact.out, naive.out, 1e-5);
  check.Compare("LSE", Doubles(lse1), exact.lse, naive.lse, 1e-5);

  // Backward from the exact statistics.
  std::vector<float> delta = Convert<float>(exact.delta);
  for (size_t i = 0; i < delta.size(); ++i) delta[i] = std::isinf(exact.lse[i]) ? NAN : delta[i];
  DeviceArray<float> dlse(Convert<float>(exact.lse)), ddelta(delta);
  for (const MmaQueryGradient mode : {MmaQueryGradient::kAtomic, MmaQueryGradient::kOrdered}) {
    check.text += mode == MmaQueryGradient::kAtomic ? "\n    atomic: " : "\n    ordered:";
    std::vector<float> first[3];
    // The ordered backward twice: the same bits.
    for (int repeat = 0; repeat < (mode == MmaQueryGradient::kOrdered ? 2 : 1); ++repeat) {
      StridedHeads<float> dq(c.q_rows, c.batch, c.heads * c.dim, c.far),
          dk(c.k_rows, c.batch, c.kv_heads * c.dim, c.far),
          dv(c.k_rows, c.batch, c.kv_heads * c.v_dim, c.far);
      StridedHeads<float>* gradients[] = {&dq, &dk, &dv};
      const std::vector<double>* wants[] = {&exact.dq, &exact.dk, &exact.dv};
      const std::vector<double>* naives[] = {&naive.dq, &naive.dk, &naive.dv};
      const char* names[] = {"dQ", "dK", "dV"};
      const auto before = [](size_t i) { return static_cast<double>(i % 7) - 3; };  // added to, not set
      for (int g = 0; g < 3; ++g) {
        std::vector<float> host(wants[g]->size());
        for (size_t i = 0; i < host.size(); ++i) host[i] = static_cast<float>(before(i));
        gradients[g]->Upload(host);
      }
      for (const int chunk : order) {
        const MmaAttentionBlock block = block_of(chunk);
        DeviceArray<char> workspace(kernels::MmaAttentionBackwardWorkspaceBytes(block));
        CUDA(kernels::MmaAttentionBackward(
            block,
            {ddout.Heads<const bf16>(), dlse.data, ddelta.data, dq.Heads<float>(),
             dk.Heads<float>(block.key_offset, block.key_stride),
             dv.Heads<float>(block.key_offset, block.key_stride)},
            mode, workspace.data, nullptr));
        CUDA(cudaDeviceSynchronize());
      }
      for (int g = 0; g < 3; ++g) {
        std::vector<float> got = gradients[g]->Download(&intact);
        if (repeat == 1) {
          check.Require(std::memcmp(got.data(), first[g].data(), got.size() * 4) == 0, "same bits again");
          continue;
        }
        first[g] = got;
        std::vector<double> difference = Doubles(got);
        for (size_t i = 0; i < difference.size(); ++i) difference[i] -= before(i);
        check.Compare(names[g], difference, *wants[g], *naives[g], 1e-5);
      }
    }
  }
  check.Require(intact, "guards");
  std::printf("%s %-26s%s\n", check.ok ? "ok  " : "FAIL", c.name, check.text.c_str());
  return check.ok;
}

}  // namespace
}  // namespace annulus::testing

int main(int argc, char** argv) {
  using namespace annulus::testing;
  const std::string what = argc > 1 ? argv[1] : "all";
  cudaDeviceProp device;
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) return 1;
  std::printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  bool ok = true;
  if (what == "profile") {
    Time(8192, 16, 128, 128, false);
    return 0;
  }
  if (what != "time") {
    const auto start = std::chrono::steady_clock::now();
    std::vector<Case> cases;
    for (const auto& [dim, v_dim] : {std::pair<int64_t, int64_t>{64, 64}, {128, 128}, {192, 128}}) {
      const Case of_dim[] = {
          {"one", dim, v_dim, 1, 1, 1, 1, 1},
          {"causal", dim, v_dim, 256, 256, 1, 2, 2},
          {"full tails gqa", dim, v_dim, 129, 191, 2, 4, 2, Mask::kFull},
          {"causal tails gqa", dim, v_dim, 333, 333, 2, 6, 2},
          {"causal 4 chunks", dim, v_dim, 300, 517, 1, 4, 1, Mask::kCausal, 4},
          {"causal early queries", dim, v_dim, 400, 255, 1, 2, 1, Mask::kCausal, 2},
          {"window, far keys NaN", dim, v_dim, 140, 600, 2, 2, 1, Mask::kWindow},
          {"window 4 striped", dim, v_dim, 500, 500, 1, 2, 2, Mask::kWindow, 4, true},
          {"documents 4 chunks", dim, v_dim, 511, 511, 2, 2, 2, Mask::kDocuments, 4},
          {"documents 4 striped", dim, v_dim, 385, 385, 2, 4, 2, Mask::kDocuments, 4, true},
          {"random 4 chunks", dim, v_dim, 410, 390, 2, 4, 2, Mask::kRandom, 4},
          {"random 3 striped", dim, v_dim, 200, 700, 1, 3, 1, Mask::kRandom, 3, true},
      };
      cases.insert(cases.end(), std::begin(of_dim), std::end(of_dim));
    }
    if (what == "all")
      cases.push_back({"strides of 2^25", 64, 64, 70, 67, 1, 2, 1, Mask::kCausal, 1, false, true});
    if (what == "sanitize") {  // under a checker everything is slow: tails and empty rows of each head dim
      std::erase_if(cases, [](const Case& c) {
        return c.name != std::string("full tails gqa") && c.name != std::string("random 4 chunks");
      });
    }
    std::vector<Prepared> prepared(cases.size());
    ForEachParallel(static_cast<int64_t>(cases.size()), [&](int64_t i) {
      prepared[Size(i)] = Prepare(cases[Size(i)], static_cast<uint32_t>(i));
    });
    std::printf("references made in %.1f s\n",
                std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    for (Prepared& one : prepared) {
      std::printf("%3ld ", long(one.c.dim));
      ok = Check(one) && ok;
    }
    std::printf("checks %s in %.1f s\n", ok ? "passed" : "FAILED",
                std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    std::fflush(stdout);
  }
  if (what == "all" || what == "time") {
    Time(32768, 16, 128, 128, true);
    Time(32768, 16, 64, 64, true);
    Time(32768, 16, 192, 128, true);
  }
  return ok ? 0 : 1;
}
