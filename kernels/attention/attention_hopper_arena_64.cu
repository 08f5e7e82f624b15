#include "kernels/attention/attention_hopper_arena.cuh"

namespace annulus::kernels {

cudaError_t HopperArenaDim64(const HopperAttentionArena& arena, const HopperAttentionPartial& partial,
                             void* workspace, cudaStream_t stream) {
  return LaunchHopperArena<HopperForwardTile<64, 64, 3, 128, 2, 2>>(arena, partial, workspace, stream);
}

}  // namespace annulus::kernels
