#include "annulus/base/check.h"
#include "gpu_memory.h"

namespace annulus {
namespace {

[[noreturn]] void Refuse(const char* what) {
  ANNULUS_CHECK(false) << what << ": built without CUDA";
  __builtin_unreachable();
}

}  // namespace

void* AllocateGpu(Device, int64_t) { Refuse("memory of a GPU"); }
void FreeGpu(Device, void*) { Refuse("memory of a GPU"); }
void* AllocatePinned(Device, int64_t) { Refuse("pinned memory"); }
void FreePinned(Device, void*) { Refuse("pinned memory"); }
void EnqueueCopy(const void*, void*, int64_t, StreamHandle) { Refuse("a copy on a stream"); }
void EnqueueZero(void*, int64_t, StreamHandle) { Refuse("zeroing on a stream"); }
void EnqueueWrite(uint32_t*, uint32_t, StreamHandle) { Refuse("a write on a stream"); }
GpuRange::GpuRange(Device device) : device_(device) { Refuse("memory of a GPU"); }
GpuRange::~GpuRange() = default;
void GpuRange::Grow(int64_t) { Refuse("memory of a GPU"); }

}  // namespace annulus
