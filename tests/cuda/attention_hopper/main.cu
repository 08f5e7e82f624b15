// Checks the Hopper kernels of block attention against the naive double reference, then times them beside the
// others.
//     build/tests/attention_hopper_check [all|check|time|sanitize]
//     build/tests/attention_hopper_check agree|repeats|guard      through the op (op_checks.h)

#include <chrono>

#include "cuda/attention_hopper/backward_check.h"
#include "cuda/attention_hopper/backward_time.h"
#include "cuda/attention_hopper/forward_check.h"
#include "cuda/attention_hopper/op_checks.h"
#include "cuda/attention_hopper/timing.h"
#include "kernels/attention/attention_hopper.h"

namespace annulus::testing {
namespace {

void AddCases(int64_t dim, int64_t v_dim, std::vector<Case>* cases) {
  const Case of_dim[] = {
      {"one", dim, v_dim, 1, 1, 1, 1, 1},
      {"causal", dim, v_dim, 256, 256, 1, 2, 2},
      {"causal, several tiles", dim, v_dim, 384, 700, 1, 2, 2},
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
      {"full mqa", dim, v_dim, 600, 200, 1, 8, 1, Mask::kFull},
      {"causal, 400 tiles", dim, v_dim, 1000, 300, 5, 10, 2},
      {"causal 64 chunks", dim, v_dim, 150, 517, 1, 2, 1, Mask::kCausal, 64},
  };
  cases->insert(cases->end(), std::begin(of_dim), std::end(of_dim));
}

// Under a sanitizer everything is slow: whole tiles with another of two keys, tails with empty rows, and more
// tiles than buffers.
void AddSmallCases(int64_t dim, int64_t v_dim, std::vector<Case>* cases) {
  cases->push_back({"full gqa", dim, v_dim, 128, 130, 1, 2, 1, Mask::kFull});
  cases->push_back({"random gqa", dim, v_dim, 70, 100, 1, 2, 1, Mask::kRandom});
  cases->push_back({"full, 5 key tiles", dim, v_dim, 10, 600, 1, 1, 1, Mask::kFull});
}

bool CheckAll(const std::string& what) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<Case> cases;
  for (const auto& [dim, v_dim] : {std::pair<int64_t, int64_t>{64, 64}, {128, 128}, {192, 128}}) {
    (what == "sanitize" ? AddSmallCases : AddCases)(dim, v_dim, &cases);
  }
  if (what == "all")
    cases.push_back({"strides of 2^25", 64, 64, 70, 67, 1, 2, 1, Mask::kCausal, 1, false, true});
  std::vector<Prepared> prepared(cases.size());
  ForEachParallel(static_cast<int64_t>(cases.size()), [&](int64_t i) {
    prepared[Size(i)] = Prepare<bf16>(cases[Size(i)], static_cast<uint32_t>(i));
  });
  bool ok = true;
  for (Prepared& one : prepared) ok = CheckForward(one) && ok;
  for (Prepared& one : prepared) ok = CheckBackward(one) && ok;
  if (what != "sanitize") ok = CheckBackwardRepeats() && ok;
  std::printf("checks %s in %.1f s\n", ok ? "passed" : "FAILED",
              std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  return ok;
}

}  // namespace
}  // namespace annulus::testing

int main(int argc, char** argv) {
  using namespace annulus::testing;
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);  // a check that is cut off shows how far it came
  const std::string what = argc > 1 ? argv[1] : "all";
  if (what == "agree" || what == "repeats" || what == "guard") return CheckOp(what) ? 0 : 1;
  if (what != "all" && what != "check" && what != "time" && what != "sanitize") {
    std::printf("%s: expected all, check, time or sanitize\n", what.c_str());
    return 1;
  }
  cudaDeviceProp device;
  const cudaError_t error = cudaGetDeviceProperties(&device, 0);
  if (error != cudaSuccess || !annulus::kernels::HopperAttentionRuns()) {
    std::printf("no Hopper GPU: %s\n", cudaGetErrorString(error));
    return 1;
  }
  std::printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  bool ok = what == "time" || CheckAll(what);
  if (what == "all" || what == "time") {
    ok = TimeForward() && ok;
    TimeBackward();
  }
  return ok ? 0 : 1;
}
