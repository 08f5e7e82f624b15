// Checks the Hopper kernels of block attention against the naive double reference, then times them beside the
// others.
//     build/tests/attention_hopper_check [all|check|time|sanitize] [both|forward|backward]
//     build/tests/attention_hopper_check agree|repeats|guard      through the op (op_checks.h)
//     build/tests/attention_hopper_check arena

#include <chrono>
#include <set>

#include "annulus/device/gpu.h"
#include "cuda/attention_hopper/arena.h"
#include "cuda/attention_hopper/backward_check.h"
#include "cuda/attention_hopper/backward_time.h"
#include "cuda/attention_hopper/forward_check.h"
#include "cuda/attention_hopper/op_checks.h"
#include "cuda/attention_hopper/resources.h"
#include "cuda/attention_hopper/timing.h"
#include "kernels/attention/attention_hopper.h"

namespace annulus::testing {
namespace {

void AddCases(int64_t dim, int64_t v_dim, std::vector<Case>* cases) {
  AddCommonCases(dim, v_dim, cases);
  cases->push_back({"causal, several tiles", dim, v_dim, 384, 700, 1, 2, 2});
  cases->push_back({"full mqa", dim, v_dim, 600, 200, 1, 8, 1, Mask::kFull});
  cases->push_back({"causal, 400 tiles", dim, v_dim, 1000, 300, 5, 10, 2});
  cases->push_back({"causal 64 chunks", dim, v_dim, 150, 517, 1, 2, 1, Mask::kCausal, 64});
  cases->push_back(RisingScores(dim, v_dim));
}

// And more tiles than buffers.
void AddSmallCases(int64_t dim, int64_t v_dim, std::vector<Case>* cases) {
  AddSmallCommonCases(dim, v_dim, cases);
  cases->push_back({"full, 5 key tiles", dim, v_dim, 10, 600, 1, 1, 1, Mask::kFull});
}

bool CheckAll(const std::string& what, bool forward, bool backward) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<Case> cases;
  for (const auto& [dim, v_dim] : {std::pair<int64_t, int64_t>{64, 64}, {128, 128}, {192, 128}}) {
    (what == "sanitize" ? AddSmallCases : AddCases)(dim, v_dim, &cases);
  }
  if (what == "all")
    cases.push_back({"strides of 2^25", 64, 64, 70, 67, 1, 2, 1, Mask::kCausal, 1, false, true});
  std::vector<Prepared> prepared = PrepareAll<bf16>(cases);
  bool ok = true;
  for (Prepared& one : prepared) ok = (!forward || CheckForward(one)) && ok;
  for (Prepared& one : prepared) ok = (!backward || CheckBackward(one)) && ok;
  if (backward && what != "sanitize") ok = CheckBackwardRepeats() && ok;
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
  const std::set<std::string> known = {"all", "check", "time", "sanitize", "arena", "arena_missing"};
  if (!known.contains(what)) {
    std::printf("%s: expected all, check, time, sanitize or arena\n", what.c_str());
    return 1;
  }
  const std::string passes = argc > 2 ? argv[2] : "both";
  if (passes != "both" && passes != "forward" && passes != "backward") {
    std::printf("%s: expected both, forward or backward\n", passes.c_str());
    return 1;
  }
  const bool forward = passes != "backward", backward = passes != "forward";
  cudaDeviceProp device;
  const cudaError_t error = cudaGetDeviceProperties(&device, 0);
  if (error != cudaSuccess || !annulus::RunsHopperKernels({annulus::DeviceKind::kCuda, 0})) {
    std::printf("no Hopper GPU: %s\n", cudaGetErrorString(error));
    return 1;
  }
  if (what == "arena_missing") return RunArenaMissing() ? 0 : 1;
  std::printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  if (what == "arena") return RunArena(argv[0]) ? 0 : 1;
  bool ok = what == "time" || CheckAll(what, forward, backward);
  if (what == "all" || what == "time") {
    if (forward) PrintForwardResources(), ok = TimeForward() && ok;
    if (backward) PrintBackwardResources(), TimeBackward();
  }
  return ok ? 0 : 1;
}
