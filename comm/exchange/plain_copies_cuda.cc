#include "annulus/comm/exchange_bench.h"
#include "annulus/device/transfer.h"
#include "exchange_timing.h"
#include "peer_memory.h"

namespace annulus {

absl::StatusOr<double> MeasurePlainCopies(Context& ctx, Communicator cp, int64_t bytes, int repeats) {
  ANNULUS_RETURN_IF_ERROR(CheckRate(cp, bytes, repeats));
  ANNULUS_RETURN_IF_ERROR(CheckPeerMemory(cp, ctx.device));
  PeerMemory memory(cp, ctx.device);
  ANNULUS_RETURN_IF_ERROR(memory.Resize(kTimedBuffers * bytes));
  const Tensor block(ctx.device, DType::kU8, {bytes});
  char* const next = memory.at((cp.rank() + 1) % cp.size());
  ANNULUS_ASSIGN_OR_RETURN(
      const double seconds, MedianSeconds(ctx, cp, repeats, [&] {
        for (int i = 0; i < kTimedMessages; ++i) {
          CopyBytes(block.ref(),
                    TensorRef(next + i % kTimedBuffers * bytes, DType::kU8, ctx.device, block.ref().shape()),
                    ctx.stream());
        }
        return absl::OkStatus();
      }));
  return kTimedMessages * static_cast<double>(bytes) / seconds / 1e9;
}

}  // namespace annulus
