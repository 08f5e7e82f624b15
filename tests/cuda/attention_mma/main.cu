// Checks block attention on CUDA, on tensor cores and in f32, against the naive double reference, then times
// it.
//     build/tests/attention_mma_check [all|check|time|heads|sanitize|profile]

#include <chrono>

#include "cuda/attention_mma/block_check.h"
#include "cuda/attention_mma/partial_check.h"
#include "cuda/attention_mma/timing.h"
#include "kernels/attention/attention_f32_cuda.h"
#include "kernels/attention/attention_mma.h"

namespace annulus::testing {
namespace {

using kernels::MmaQueryGradient;

template <MmaQueryGradient kQueryGradient>
cudaError_t MmaBackward(const kernels::MmaAttentionBlock& block,
                        const kernels::MmaAttentionGradients& gradients) {
  const DeviceArray<char> workspace(kernels::MmaAttentionBackwardWorkspaceBytes(block, kQueryGradient));
  const cudaError_t error =
      kernels::MmaAttentionBackward(block, gradients, kQueryGradient, workspace.data, nullptr);
  return error == cudaSuccess ? cudaDeviceSynchronize() : error;
}

const Implementation<bf16> kMma{"mma",
                                kernels::MmaAttentionForward,
                                {{"atomic", 1, MmaBackward<MmaQueryGradient::kAtomic>},
                                 {"ordered", 2, MmaBackward<MmaQueryGradient::kOrdered>}}};
const Implementation<float> kF32{
    "f32", kernels::F32AttentionForward, {{"backward", 2, [](const auto& block, const auto& gradients) {
                                             return kernels::F32AttentionBackward(block, gradients, nullptr);
                                           }}}};

void AddCases(int64_t dim, int64_t v_dim, std::vector<Case>* cases) {
  AddCommonCases(dim, v_dim, cases);
  cases->push_back({"full mqa, keys shared", dim, v_dim, 600, 200, 1, 8, 1, Mask::kFull});
  cases->push_back({"documents mqa, keys shared", dim, v_dim, 411, 411, 2, 8, 1, Mask::kDocuments, 2});
  cases->push_back({"causal 64 chunks", dim, v_dim, 150, 517, 1, 2, 1, Mask::kCausal, 64});
}

void AddSmallF32Cases(int64_t dim, int64_t v_dim, std::vector<Case>* cases) {
  cases->push_back({"random 2 chunks", dim, v_dim, 40, 70, 1, 2, 1, Mask::kRandom, 2});
}

template <typename T>
bool Check(const Implementation<T>& implementation, const std::vector<Case>& cases) {
  bool ok = true;
  for (Prepared& one : PrepareAll<T>(cases)) ok = BlockCheck<T>(implementation, one).Run() && ok;
  return ok;
}

bool CheckAll(const std::string& what) {
  const auto start = std::chrono::steady_clock::now();
  const bool small = what == "sanitize";
  std::vector<Case> mma, f32;
  for (const auto& [dim, v_dim] : {std::pair<int64_t, int64_t>{64, 64}, {128, 128}, {192, 128}}) {
    (small ? AddSmallCommonCases : AddCases)(dim, v_dim, &mma);
    (small ? AddSmallF32Cases : AddCases)(dim, v_dim, &f32);
  }
  for (const auto& [dim, v_dim] : {std::pair<int64_t, int64_t>{40, 40}, {256, 33}}) {
    (small ? AddSmallF32Cases : AddCases)(dim, v_dim, &f32);
  }
  if (what == "all")
    mma.push_back({"strides of 2^25", 64, 64, 70, 67, 1, 2, 1, Mask::kCausal, 1, false, true});
  bool ok = Check(kMma, mma);
  ok = Check(kF32, f32) && ok;
  ok = CheckPartialPasses() && ok;
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
  if (what != "all" && what != "check" && what != "time" && what != "heads" && what != "sanitize" &&
      what != "profile") {
    std::printf("%s: expected all, check, time, heads, sanitize or profile\n", what.c_str());
    return 1;
  }
  cudaDeviceProp device;
  const cudaError_t error = cudaGetDeviceProperties(&device, 0);
  if (error != cudaSuccess) {
    std::printf("no GPU: %s\n", cudaGetErrorString(error));
    return 1;
  }
  std::printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  if (what == "profile") {
    Time(8192, 16, 128, 128, false);
    return 0;
  }
  if (what == "heads") {
    TimeHeads();
    return 0;
  }
  const bool ok = what == "time" || CheckAll(what);
  if (what == "all" || what == "time") {
    Time(32768, 16, 128, 128, true);
    Time(32768, 16, 64, 64, true);
    Time(32768, 16, 192, 128, true);
    TimeF32(8192, 16, 128);
  }
  return ok ? 0 : 1;
}
