#include "cuda/attention_hopper/backward_check.h"
#include "cuda/attention_mma/block_check.h"
#include "kernels/attention/attention_hopper.h"

namespace annulus::testing {
namespace {

using kernels::MmaAttentionBlock;
using kernels::MmaAttentionGradients;
using kernels::MmaQueryGradient;

template <MmaQueryGradient kQueryGradient>
cudaError_t Backward(const MmaAttentionBlock& block, const MmaAttentionGradients& gradients) {
  const DeviceArray<char> workspace(kernels::HopperAttentionBackwardWorkspaceBytes(block, kQueryGradient));
  const cudaError_t error =
      kernels::HopperAttentionBackward(block, gradients, kQueryGradient, workspace.data, nullptr);
  return error == cudaSuccess ? cudaDeviceSynchronize() : error;
}

const Implementation<bf16> kAnyOrder{"hopper",
                                     nullptr,
                                     {{"added", 1, Backward<MmaQueryGradient::kAtomic>},
                                      {"ordered", 2, Backward<MmaQueryGradient::kOrdered>}}};
const Implementation<bf16> kRepeats{
    "hopper", nullptr, {{"ordered", 1000, Backward<MmaQueryGradient::kOrdered>}}};

}  // namespace

bool CheckBackward(Prepared& prepared) { return BlockCheck<bf16>(kAnyOrder, prepared).Run(); }

bool CheckBackwardRepeats() {
  bool ok = true;
  for (const auto& [dim, v_dim] : {std::pair<int64_t, int64_t>{64, 64}, {128, 128}, {192, 128}}) {
    Prepared prepared =
        Prepare<bf16>({"causal, 1000 times", dim, v_dim, 700, 700, 1, 4, 2, Mask::kCausal}, 1);
    ok = BlockCheck<bf16>(kRepeats, prepared).Run() && ok;
  }
  return ok;
}

}  // namespace annulus::testing
