#include <array>
#include <utility>

#include "cuda/attention_hopper/backward_variants.h"
#include "cuda/attention_hopper/resources.h"
#include "cuda/attention_hopper/variants.h"
#include "cuda/attention_mma/device_arrays.h"

namespace annulus::testing {
namespace {

// Spills are in local memory, with what is indexed at run time; registers are those a block starts with.
void Print(int64_t dim, const char* name, const char* mode, const void* kernel) {
  cudaFuncAttributes attributes;
  CUDA(cudaFuncGetAttributes(&attributes, kernel));
  std::printf("    %3ld %-24s %-8s %4d registers, %4zu bytes of local memory\n", long(dim), name, mode,
              attributes.numRegs, attributes.localSizeBytes);
}

using Mode = std::pair<const char*, const void*>;
std::array<Mode, 2> ModesOf(const kernels::HopperForwardKernel& kernel) {
  return {Mode{"whole", kernel.whole}, {"carry", kernel.carry}};
}
std::array<Mode, 2> ModesOf(const kernels::HopperBackwardKernel& kernel) {
  return {Mode{"added", kernel.added}, {"ordered", kernel.ordered}};
}
void Print(int64_t dim, const char* name, const auto& kernel) {
  for (const auto& [mode, of_mode] : ModesOf(kernel)) Print(dim, name, mode, of_mode);
}

}  // namespace

void PrintForwardResources() {
  std::printf("forward\n");
  Print(64, "", kernels::kHopperForwardDim64);
  Print(128, "", kernels::kHopperForwardDim128);
  Print(192, "", kernels::kHopperForwardDim192);
  for (int i = 0; i < kHopperForwardVariantCount; ++i) {
    const HopperForwardVariant& variant = kHopperForwardVariants[i];
    Print(variant.dim, variant.name, variant.kernel);
  }
}

void PrintBackwardResources() {
  std::printf("backward\n");
  Print(64, "", kernels::kHopperBackwardDim64);
  Print(128, "", kernels::kHopperBackwardDim128);
  Print(192, "", kernels::kHopperBackwardDim192);
  for (int i = 0; i < kHopperBackwardVariantCount; ++i) {
    const HopperBackwardVariant& variant = kHopperBackwardVariants[i];
    Print(variant.dim, variant.name, variant.kernel);
  }
}

}  // namespace annulus::testing
