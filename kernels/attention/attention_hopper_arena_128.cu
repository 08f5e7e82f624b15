#include "kernels/attention/attention_hopper_arena.cuh"

namespace annulus::kernels {

cudaError_t HopperArenaDim128(const HopperAttentionArena& arena, const HopperAttentionPartial& partial,
                              void* workspace, cudaStream_t stream) {
  return LaunchHopperArena<HopperForwardTile<128, 128, 2, 128, 2, 2, Turns::kAsTheyCome>>(arena, partial,
                                                                                          workspace, stream);
}

}  // namespace annulus::kernels
