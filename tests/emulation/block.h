#pragma once

// Runs kernels of Hopper on one CPU thread, to prove their synchronisation, layouts and masks wrong where no
// GPU is: each thread of a block is a fiber, and a seeded random scheduler decides who goes on whenever a
// thread waits. What is asynchronous on the device (copies, products of warpgroups) happens at random times
// between its start and the wait for it. Kernels are compiled by the host's compiler with ANNULUS_EMULATED
// and the headers of tests/emulation/cuda in place of CUDA's.
//
// Reported as failures: waits that nothing ends, with who waits for what; arrivals beyond a barrier's count;
// lanes of a warp that meet in different instructions; accesses outside of shared memory, which begins as
// NaN; shared memory that the copy engine or a product reads after ordinary writes without a fence; and
// whatever the instructions of products.h and tensor.h check themselves.
//
// Not emulated: time, clusters, the order of device memory between blocks (all see one memory).

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <typeindex>

namespace annulus::emulation {

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

// How a kernel runs.
struct Launch {
  Index3 blocks;
  int threads = 0;
  int64_t shared_bytes = 0;
  int resident = 1;  // blocks that run at the same time
};

// All blocks to their ends. False after a failure, which LastFailure tells; what ran by then stays.
bool Run(const Launch& launch, const std::function<void()>& kernel);
std::string LastFailure();

// Of all later launches.
void SetSeed(uint32_t seed);
void SetMultiprocessors(int count);
int Multiprocessors();

// The rest is called by kernels only, from their threads.

// Ends the launch as failed; the thread does not go on.
[[noreturn]] void Fail(const std::string& what);
uint32_t Random(uint32_t below);
// Whether no thread and nothing asynchronous can go on but threads that wait for time to pass.
bool Idle();

int ThreadOfBlock();
inline int Lane() { return ThreadOfBlock() % 32; }
inline int WarpOfBlock() { return ThreadOfBlock() / 32; }
Index3 ThreadIndex();
Index3 BlockIndex();
Index3 BlockSize();
Index3 GridSize();

// One T for each thread of a launch.
std::shared_ptr<void>& ThreadSlot(std::type_index type);
template <typename T>
T& ThreadLocal() {
  std::shared_ptr<void>& slot = ThreadSlot(typeid(T));
  if (slot == nullptr) slot = std::make_shared<T>();
  return *static_cast<T*>(slot.get());
}

// The calling thread goes on at some time after `ready`, which the scheduler asks again and again.
void WaitUntil(const char* what, std::function<bool()> ready);
// Something asynchronous: `work` runs once, at a random later time, in the calling thread's block.
void Later(std::function<void()> work);

// Shared memory of the block. Addresses begin at 1024.
unsigned char* SharedMemory();
uint32_t AddressOf(const void* shared);
unsigned char* SharedAt(uint32_t address, int64_t bytes);
// The calling thread has written by ordinary means, or fences what it has written so; the copy engine or a
// product reads.
void WroteShared(uint32_t address, int64_t bytes);
void FenceShared();
void AsyncReadsShared(const char* what, uint32_t address, int64_t bytes);

// Barriers in shared memory, and those by number.
void BarrierInit(uint32_t barrier, int count);
void BarrierArrive(uint32_t barrier);
void BarrierExpect(uint32_t barrier, int64_t bytes);
void CompleteBytes(uint32_t barrier, int64_t bytes);
void BarrierWait(uint32_t barrier, uint32_t parity);
void NamedArrive(int id, int threads);
void NamedSync(int id, int threads);
void SyncBlock();

// Where all 32 threads of the warp, or 128 of the warpgroup, come to the same instruction: what each of them
// brought, valid until the calling thread's next meeting.
const void* Meet(const char* what, int threads, const void* mine, size_t bytes);
template <typename T>
const T* MeetWarp(const char* what, const T& mine) {
  return static_cast<const T*>(Meet(what, 32, &mine, sizeof(T)));
}
template <typename T>
const T* MeetGroup(const char* what, const T& mine) {
  return static_cast<const T*>(Meet(what, 128, &mine, sizeof(T)));
}

}  // namespace annulus::emulation
