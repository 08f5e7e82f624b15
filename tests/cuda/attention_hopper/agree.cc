#include <chrono>
#include <map>

#include "annulus/device/gpu.h"
#include "cuda/attention_hopper/op_cases.h"
#include "cuda/attention_hopper/op_checks.h"
#include "cuda/attention_mma/comparison.h"

namespace annulus::testing {
namespace {

constexpr Device kGpu{DeviceKind::kCuda, 0};

// The library makes a plan for each shape, which takes it much longer than these shapes do: it serves the
// first of them.
constexpr int kLibraryCases = ANNULUS_HAS_CUDNN ? 60 : 0;

// Of the naive error. What one of them gives varies by a factor of five where a result has few elements.
constexpr uint32_t kRealizations = 6;

// How results come out: gradients of the library in bf16, those of keys after a sum over query heads each of
// which was rounded before.
enum class Written { kF32, kBf16, kByLibrary };
constexpr size_t kWrittenKinds = 3;

enum class Way { kWhole, kCarried, kOrdered };  // ordered: whole, the same bits on every run
constexpr const char* kWayNames[] = {"whole", "carried", "ordered"};

Allocate Saved(Context& ctx) {
  return [&ctx](DType dtype, const Shape& shape) { return ctx.saved.Allocate(dtype, shape); };
}

class Agreement {
 public:
  Agreement() : ctx_(kGpu) {}

  void Check(const OpCase& c) {
    ArenaScope scope(ctx_.saved);
    const Allocate saved = Saved(ctx_);
    const OpOperands in(ctx_, c, saved);
    const bool by_library = c.shape() != MaskShape::kGeneral && library_cases_ < kLibraryCases;
    Solve(in.problem(), by_library);
    Case all{c, in, OpResults(c, DType::kBF16, saved), OpResults(c, DType::kF32, saved)};
    for (const Way way : {Way::kWhole, Way::kCarried, Way::kOrdered}) {
      Judge(all, AttentionChoice::kHopper, way);
      Judge(all, AttentionChoice::kTensorCore, way);
    }
    if (!by_library) return;
    ++library_cases_;
    for (const Way way : {Way::kWhole, Way::kCarried}) Judge(all, AttentionChoice::kCudnn, way);
  }

  // Prints how near each kernel came to what is allowed.
  bool Report() const {
    for (const auto& [name, of_kernel] : seen_) {
      std::printf("%-16s %4d cases, largest error in units of what is allowed:", name.c_str(),
                  of_kernel.cases);
      for (size_t i = 0; i < kResults; ++i) std::printf(" %s %.2f", kResultNames[i], of_kernel.share[i]);
      std::printf("\n");
    }
    return ok_;
  }

 private:
  struct Case {
    const OpCase& c;
    const OpOperands& in;
    OpResults whole, carried;
  };
  struct Seen {
    int cases = 0;
    std::array<double, kResults> share{};
  };

  ResultArrays AllocateFor(const OpProblem& problem) {
    const std::array<int64_t, kResults> sizes = problem.sizes();
    ResultArrays results;
    for (size_t i = 0; i < kResults; ++i)
      results.of[i] = ctx_.saved.Allocate(DType::kF64, {sizes[i]}).data<double>();
    return results;
  }

  void Solve(const OpProblem& problem, bool by_library) {
    OpProblem by_head = problem;
    by_head.keys_by_query_head = true;
    exact_ = AllocateFor(problem);
    const ResultArrays naive = AllocateFor(problem), of_heads = AllocateFor(by_head);
    SolveExactly(problem, exact_, ctx_.stream());
    for (auto& errors : naive_error_) errors.fill(0);
    for (uint32_t realization = 0; realization < kRealizations; ++realization) {
      SolveNaively(problem, realization, naive, ctx_.stream());
      Note(problem, naive, Written::kF32);
      Note(problem, naive, Written::kBf16);
      if (by_library) {
        SolveNaively(by_head, realization, of_heads, ctx_.stream());
        for (const auto& [result, dim] : {std::pair{kDk, problem.dim}, std::pair{kDv, problem.v_dim}}) {
          SumRoundedHeads(of_heads.of[result], problem.heads / problem.kv_heads, dim, naive.of[result],
                          problem.sizes()[result], ctx_.stream());
        }
        Note(problem, naive, Written::kByLibrary);
      }
    }
    for (auto& errors : naive_error_) errors[kLse] = 0;  // is not in bf16
  }

  // Keeps the largest errors.
  void Note(const OpProblem& problem, const ResultArrays& naive, Written written) {
    const Stored stored = written == Written::kF32 ? Stored::kAsIs : Stored::kBf16;
    for (size_t i = 0; i < kResults; ++i) {
      double& error = naive_error_[static_cast<size_t>(written)][i];
      error = std::max(
          error, Compare(naive.of[i], stored, exact_.of[i], problem.sizes()[i], ctx_.stream()).error);
    }
  }

  void Judge(Case& all, AttentionChoice kernel, Way way) {
    ctx_.attention = kernel;
    ctx_.determinism = way == Way::kOrdered ? Determinism::kRequired : Determinism::kOff;
    OpResults& got = way == Way::kCarried ? all.carried : all.whole;
    way == Way::kCarried ? got.RunCarried(ctx_, all.in) : got.RunWhole(ctx_, all.in);
    const char* const name = kernel == AttentionChoice::kHopper  ? "hopper"
                             : kernel == AttentionChoice::kCudnn ? "cudnn"
                                                                 : "mma";
    const std::string label = std::string(name) + " " + kWayNames[static_cast<size_t>(way)];
    Seen& seen = seen_[label];
    ++seen.cases;
    for (size_t i = 0; i < kResults; ++i) {
      const TensorRef& x = got.of(static_cast<Result>(i));
      const Written written = kernel == AttentionChoice::kCudnn ? Written::kByLibrary
                              : x.dtype() == DType::kBF16       ? Written::kBf16
                                                                : Written::kF32;
      const double naive = naive_error_[static_cast<size_t>(written)][i];
      const Deviation deviation = x.dtype() == DType::kBF16
                                      ? Compare(static_cast<const bf16*>(x.raw()), Stored::kAsIs,
                                                exact_.of[i], x.elements(), ctx_.stream())
                                      : Compare(static_cast<const float*>(x.raw()), Stored::kAsIs,
                                                exact_.of[i], x.elements(), ctx_.stream());
      const double allowed = 2 * naive + kAbsoluteTolerance;
      seen.share[i] = std::max(seen.share[i], deviation.error / allowed);
      if (deviation.wrong == 0 && deviation.error <= allowed) continue;
      ok_ = false;
      std::printf("FAIL %s: %s: %s %.2e, naive %.2e, %u not finite or not -inf\n", label.c_str(),
                  all.c.text().c_str(), kResultNames[i], deviation.error, naive, deviation.wrong);
    }
  }

  Context ctx_;
  ResultArrays exact_;
  std::array<std::array<double, kResults>, kWrittenKinds> naive_error_{};
  int library_cases_ = 0;
  std::map<std::string, Seen> seen_;
  bool ok_ = true;
};

}  // namespace

bool CheckAgreement(int cases) {
  const auto start = std::chrono::steady_clock::now();
  std::mt19937 rng(1);
  Agreement agreement;
  std::array<int, std::size(kOpMaskNames)> masks{};
  for (int i = 0; i < cases; ++i) {
    const OpCase c = RandomOpCase(rng);
    ++masks[static_cast<size_t>(c.mask)];
    agreement.Check(c);
  }
  const bool ok = agreement.Report();
  std::printf("%d random cases:", cases);
  for (size_t i = 0; i < masks.size(); ++i)
    std::printf(" %d %s%s", masks[i], kOpMaskNames[i], i + 1 < masks.size() ? "," : "");
  std::printf(": %s in %.1f s\n", ok ? "agree" : "FAILED",
              std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  return ok;
}

bool CheckOp(const std::string& what) {
  ANNULUS_CHECK_OK(UseGpu(0));
  if (!RunsHopperKernels(kGpu)) {
    std::printf("no GPU that runs this program's kernels for Hopper\n");
    return false;
  }
  if (what == "agree") return CheckAgreement(500);
  return what == "repeats" ? CheckOpRepeats(1000) : CheckGuardPages();
}

bool CheckOpRepeats(int repeats) {
  bool ok = true;
  for (const auto& [dim, v_dim] : {std::pair<int64_t, int64_t>{64, 64}, {128, 128}, {192, 128}}) {
    for (const OpMask mask : {OpMask::kCausal, OpMask::kDocuments, OpMask::kRandom}) {
      const OpCase c{.dim = dim,
                     .v_dim = v_dim,
                     .q_rows = 701,
                     .k_rows = 701,
                     .batch = 2,
                     .heads = 8,
                     .kv_heads = 2,
                     .mask = mask,
                     .extent = 300,
                     .positions = {},
                     .chunks = 1,
                     .seed = 1};
      Context ctx(kGpu, Determinism::kRequired);
      ctx.attention = AttentionChoice::kHopper;
      const OpOperands in(ctx, c, Saved(ctx));
      OpResults first(c, DType::kF32, Saved(ctx)), again(c, DType::kF32, Saved(ctx));
      first.RunCarried(ctx, in);
      const DeviceArray<unsigned long long> different(std::vector<unsigned long long>(1));
      for (int i = 1; i < repeats; ++i) {
        again.RunCarried(ctx, in);
        for (size_t r = 0; r < kResults; ++r) {
          const TensorRef &x = first.of(static_cast<Result>(r)), &y = again.of(static_cast<Result>(r));
          CountDifferentBytes(x.raw(), y.raw(), x.bytes(), different.data, ctx.stream());
        }
      }
      unsigned long long bytes = 0;
      CUDA(cudaStreamSynchronize(ctx.stream()));
      CUDA(cudaMemcpy(&bytes, different.data, sizeof bytes, cudaMemcpyDeviceToHost));
      std::printf("%s %d runs, forward and backward, %s: %llu bytes differ\n", bytes == 0 ? "ok  " : "FAIL",
                  repeats, c.text().c_str(), bytes);
      ok = ok && bytes == 0;
    }
  }
  return ok;
}

}  // namespace annulus::testing
