#include "kernels/attention/attention_hopper_arena.cuh"

namespace annulus::kernels {

cudaError_t HopperArenaDim192(const HopperAttentionArena& arena, const HopperAttentionPartial& partial,
                              void* workspace, cudaStream_t stream) {
  return LaunchHopperArena<HopperForwardTile<192, 128, 2, 128, 2, 1>>(arena, partial, workspace, stream);
}

}  // namespace annulus::kernels
