#include "emulation/block.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <vector>

namespace annulus::emulation {
namespace {

constexpr int64_t kFirstAddress = 1024, kStackBytes = 128 << 10, kChunk = 16;
constexpr int kWarp = 32, kMostIdle = 100;

struct PhaseBarrier {
  int count = 0, pending = 0;
  int64_t bytes = 0;  // expected and not yet landed
  uint32_t parity = 0;

  void Check() {
    if (pending > 0 || bytes != 0) return;
    parity ^= 1;
    pending = count;
  }
};

struct NamedBarrier {
  int threads = 0, arrived = 0;
  int64_t phase = 0;
};

// Deposits of two meetings: while some threads still read those of one, others bring theirs to the next.
struct Meeting {
  const char* what = nullptr;
  int arrived = 0;
  int64_t number = 0;
  std::vector<unsigned char> brought[2];
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  std::function<bool()> ready;  // empty: at once
  const char* waits = "";
  bool done = false;
  int index = 0;
  std::map<std::type_index, std::shared_ptr<void>> slots;
  std::vector<int64_t> unfenced;  // chunks of shared memory
};

struct Block {
  Index3 index;
  std::vector<Thread> threads;
  int running = 0;
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  std::vector<int> writer;  // of each chunk of shared memory, not yet fenced; -1: nobody
  std::map<uint32_t, PhaseBarrier> barriers;
  NamedBarrier named[16];
  std::map<std::pair<int, int>, Meeting> meetings;  // by size and number of the warp or warpgroup
  std::vector<std::function<void()>> later;
  std::vector<int> laziness;  // of each warp: it is passed over so many times of 16
};

class Device {
 public:
  bool Run(const Launch& launch, const std::function<void()>& kernel);

  std::mt19937 rng{1};
  int multiprocessors = 2;
  std::string failure;
  Launch launch;
  bool idle = false;       // nothing goes on but time
  Block* block = nullptr;  // of the running thread or asynchronous work
  Thread* thread = nullptr;

  [[noreturn]] void Leave() {
    Switch();
    std::abort();  // nobody resumes a thread that is done
  }
  void Switch() { swapcontext(&thread->context, &scheduler_); }

 private:
  void Start(Block* to, int64_t number);
  bool Step();
  bool ResumeWarp(Block* of, int warp);
  bool ResumeSome(bool patient);
  void RunLater(Block* of);
  void ReportDeadlock();
  static void Main();

  ucontext_t scheduler_;
  const std::function<void()>* kernel_ = nullptr;
  std::vector<std::unique_ptr<Block>> resident_;
  int eagerness_ = 0;  // asynchronous work: of 16 steps, so many run some
};

Device g_device;

void Device::Main() {
  (*g_device.kernel_)();
  g_device.thread->done = true;
  --g_device.block->running;
  g_device.Leave();
}

void Device::Start(Block* to, int64_t number) {
  *to = Block{};
  const unsigned x = launch.blocks.x, y = launch.blocks.y;
  to->index = {static_cast<unsigned>(number % x), static_cast<unsigned>(number / x % y),
               static_cast<unsigned>(number / x / y)};
  to->memory.assign(static_cast<size_t>(launch.shared_bytes + kFirstAddress), 0xFF);
  const auto address = reinterpret_cast<uintptr_t>(to->memory.data());
  to->shared = to->memory.data() + ((kFirstAddress - address % kFirstAddress) % kFirstAddress);
  to->writer.assign(static_cast<size_t>(launch.shared_bytes / kChunk + 1), -1);
  to->laziness.resize(static_cast<size_t>((launch.threads + kWarp - 1) / kWarp));
  for (int& lazy : to->laziness) lazy = rng() % 2 == 0 ? 0 : static_cast<int>(rng() % 16);
  to->threads = std::vector<Thread>(static_cast<size_t>(launch.threads));
  to->running = launch.threads;
  for (int i = 0; i < launch.threads; ++i) {
    Thread& made = to->threads[static_cast<size_t>(i)];
    made.index = i;
    made.stack = std::make_unique_for_overwrite<unsigned char[]>(kStackBytes);
    getcontext(&made.context);
    made.context.uc_stack.ss_sp = made.stack.get();
    made.context.uc_stack.ss_size = kStackBytes;
    made.context.uc_link = nullptr;
    makecontext(&made.context, &Device::Main, 0);
  }
}

// Every thread of the warp that can go on, once, from a random one on. False where none could.
bool Device::ResumeWarp(Block* of, int warp) {
  const int first = warp * kWarp, size = std::min(kWarp, launch.threads - first);
  const auto start = static_cast<int>(rng() % static_cast<unsigned>(size));
  bool any = false;
  block = of;
  for (int i = 0; i < size && failure.empty(); ++i) {
    Thread& one = of->threads[static_cast<size_t>(first + (start + i) % size)];
    if (one.done || (one.ready && !one.ready())) continue;
    one.ready = nullptr;
    any = true;
    idle = false;
    thread = &one;
    swapcontext(&scheduler_, &one.context);
    thread = nullptr;
  }
  return any;
}

void Device::RunLater(Block* of) {
  const size_t which = rng() % of->later.size();
  const std::function<void()> work = std::move(of->later[which]);
  of->later.erase(of->later.begin() + static_cast<ptrdiff_t>(which));
  block = of;
  try {
    work();
  } catch (const std::string&) {  // of Fail, which has kept it
  }
}

// False where nothing can go on.
bool Device::Step() {
  const auto blocks = static_cast<unsigned>(resident_.size());
  if (rng() % 16 < static_cast<unsigned>(eagerness_)) {
    Block* const some = resident_[rng() % blocks].get();
    if (!some->later.empty()) {
      RunLater(some);
      return true;
    }
  }
  if (ResumeSome(true) || ResumeSome(false)) return true;
  for (const auto& of : resident_) {
    if (of->later.empty()) continue;
    RunLater(of.get());
    return true;
  }
  idle = true;
  const bool any = ResumeSome(false);
  idle = false;
  return any;
}

// One warp that can go on, from a random one on.
bool Device::ResumeSome(bool patient) {
  const auto warps = static_cast<unsigned>((launch.threads + kWarp - 1) / kWarp),
             count = static_cast<unsigned>(resident_.size()) * warps;
  const auto start = static_cast<unsigned>(rng() % count);
  for (unsigned i = 0; i < count; ++i) {
    const unsigned at = (start + i) % count;
    Block* const of = resident_[at / warps].get();
    const auto warp = static_cast<int>(at % warps);
    if (patient && static_cast<int>(rng() % 16) < of->laziness[static_cast<size_t>(warp)]) continue;
    if (ResumeWarp(of, warp)) return true;
  }
  return false;
}

void Device::ReportDeadlock() {
  failure = "nothing can go on:";
  for (const auto& of : resident_) {
    std::map<std::string, std::vector<int>> waiting;
    for (const Thread& one : of->threads) {
      if (!one.done) waiting[one.waits].push_back(one.index);
    }
    for (const auto& [what, threads] : waiting) {
      failure += " block " + std::to_string(of->index.x) + ": " + std::to_string(threads.size()) +
                 " threads (" + std::to_string(threads.front()) + " ... " + std::to_string(threads.back()) +
                 ") wait for " + what + ";";
    }
  }
}

bool Device::Run(const Launch& to_run, const std::function<void()>& kernel) {
  launch = to_run;
  kernel_ = &kernel;
  failure.clear();
  eagerness_ = static_cast<int>(rng() % 17);
  const int64_t count = int64_t{launch.blocks.x} * launch.blocks.y * launch.blocks.z;
  int64_t started = std::min<int64_t>(count, launch.resident);
  resident_.clear();
  for (int64_t i = 0; i < started; ++i) Start(resident_.emplace_back(new Block).get(), i);
  int idle = 0;  // fruitless steps: threads that poll can go on in some steps only
  while (!resident_.empty() && failure.empty()) {
    idle = Step() ? 0 : idle + 1;
    if (idle == kMostIdle) ReportDeadlock();
    for (size_t i = 0; i < resident_.size() && failure.empty();) {
      Block* const of = resident_[i].get();
      if (of->running > 0 || !of->later.empty()) {
        ++i;
      } else if (started < count) {
        Start(of, started++);
        ++i;
      } else {
        resident_.erase(resident_.begin() + static_cast<ptrdiff_t>(i));
      }
    }
  }
  resident_.clear();
  return failure.empty();
}

Block& Current() { return *g_device.block; }

PhaseBarrier& BarrierAt(uint32_t address) {
  const auto found = Current().barriers.find(address);
  if (found == Current().barriers.end()) {
    Fail("barrier at " + std::to_string(address) + ": used before it is initialised");
  }
  return found->second;
}

void Arrive(uint32_t address, PhaseBarrier& barrier) {
  if (barrier.pending == 0) {
    Fail("barrier at " + std::to_string(address) + ": more arrivals than its count of " +
         std::to_string(barrier.count));
  }
  --barrier.pending;
  barrier.Check();
}

NamedBarrier& ArriveAtNamed(int id, int threads) {
  if (id < 0 || id >= 16 || threads <= 0 || threads % kWarp != 0) {
    Fail("named barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads");
  }
  NamedBarrier& barrier = Current().named[id];
  if (barrier.arrived > 0 && barrier.threads != threads) {
    Fail("named barrier " + std::to_string(id) + ": some come with " + std::to_string(threads) +
         " threads, others with " + std::to_string(barrier.threads));
  }
  barrier.threads = threads;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.phase;
  }
  return barrier;
}

}  // namespace

bool Run(const Launch& launch, const std::function<void()>& kernel) { return g_device.Run(launch, kernel); }
std::string LastFailure() { return g_device.failure; }
void SetSeed(uint32_t seed) { g_device.rng.seed(seed); }
void SetMultiprocessors(int count) { g_device.multiprocessors = count; }
int Multiprocessors() { return g_device.multiprocessors; }

void Fail(const std::string& what) {
  if (g_device.failure.empty()) {
    g_device.failure = what;
    if (g_device.thread != nullptr) {
      g_device.failure += " (block " + std::to_string(g_device.block->index.x) + ", thread " +
                          std::to_string(g_device.thread->index) + ")";
    }
  }
  if (g_device.thread == nullptr) {  // asynchronous work has no stack of its own to leave
    throw g_device.failure;
  }
  g_device.thread->done = true;
  g_device.Leave();
}
bool Idle() { return g_device.idle; }
uint32_t Random(uint32_t below) { return static_cast<uint32_t>(g_device.rng() % below); }

int ThreadOfBlock() { return g_device.thread->index; }
Index3 ThreadIndex() { return {static_cast<unsigned>(g_device.thread->index), 0, 0}; }
Index3 BlockIndex() { return g_device.block->index; }
Index3 BlockSize() { return {static_cast<unsigned>(g_device.launch.threads), 1, 1}; }
Index3 GridSize() { return g_device.launch.blocks; }

std::shared_ptr<void>& ThreadSlot(std::type_index type) { return g_device.thread->slots[type]; }

void WaitUntil(const char* what, std::function<bool()> ready) {
  g_device.thread->waits = what;
  g_device.thread->ready = std::move(ready);
  g_device.Switch();
}
void Later(std::function<void()> work) { Current().later.push_back(std::move(work)); }

unsigned char* SharedMemory() { return Current().shared; }
uint32_t AddressOf(const void* shared) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(shared) - Current().shared;
  if (offset < 0 || offset >= g_device.launch.shared_bytes) Fail("address outside of shared memory");
  return static_cast<uint32_t>(offset + kFirstAddress);
}
unsigned char* SharedAt(uint32_t address, int64_t bytes) {
  const int64_t offset = int64_t{address} - kFirstAddress;
  if (offset < 0 || offset + bytes > g_device.launch.shared_bytes) {
    Fail("shared memory at " + std::to_string(address) + ", " + std::to_string(bytes) +
         " bytes: outside of " + std::to_string(g_device.launch.shared_bytes));
  }
  return Current().shared + offset;
}

void WroteShared(uint32_t address, int64_t bytes) {
  SharedAt(address, bytes);
  const int64_t first = (int64_t{address} - kFirstAddress) / kChunk,
                last = (int64_t{address} - kFirstAddress + bytes - 1) / kChunk;
  for (int64_t chunk = first; chunk <= last; ++chunk) {
    Current().writer[static_cast<size_t>(chunk)] = g_device.thread->index;
    g_device.thread->unfenced.push_back(chunk);
  }
}
void FenceShared() {
  for (const int64_t chunk : g_device.thread->unfenced) {
    int& writer = Current().writer[static_cast<size_t>(chunk)];
    if (writer == g_device.thread->index) writer = -1;
  }
  g_device.thread->unfenced.clear();
}
void AsyncReadsShared(const char* what, uint32_t address, int64_t bytes) {
  SharedAt(address, bytes);
  const int64_t first = (int64_t{address} - kFirstAddress) / kChunk,
                last = (int64_t{address} - kFirstAddress + bytes - 1) / kChunk;
  for (int64_t chunk = first; chunk <= last; ++chunk) {
    const int writer = Current().writer[static_cast<size_t>(chunk)];
    if (writer < 0) continue;
    Fail(std::string(what) + " reads shared memory at " + std::to_string(chunk * kChunk + kFirstAddress) +
         ", which thread " + std::to_string(writer) + " has written without a fence since");
  }
}

void BarrierInit(uint32_t barrier, int count) {
  SharedAt(barrier, 8);
  if (barrier % 8 != 0 || count <= 0)
    Fail("barrier at " + std::to_string(barrier) + ": bad address or count");
  if (!Current().barriers.emplace(barrier, PhaseBarrier{count, count, 0, 0}).second) {
    Fail("barrier at " + std::to_string(barrier) + ": initialised twice");
  }
}
void BarrierArrive(uint32_t barrier) { Arrive(barrier, BarrierAt(barrier)); }
void BarrierExpect(uint32_t barrier, int64_t bytes) {
  PhaseBarrier& at = BarrierAt(barrier);
  at.bytes += bytes;
  Arrive(barrier, at);
}
void CompleteBytes(uint32_t barrier, int64_t bytes) {
  PhaseBarrier& at = BarrierAt(barrier);
  at.bytes -= bytes;
  at.Check();
}
void BarrierWait(uint32_t barrier, uint32_t parity) {
  BarrierAt(barrier);
  Block* const block = &Current();
  const auto over = [block, barrier, parity] { return block->barriers.at(barrier).parity != parity; };
  static thread_local std::map<uint32_t, std::string> names;
  std::string& name = names[barrier];
  if (name.empty()) name = "barrier at " + std::to_string(barrier);
  WaitUntil(name.c_str(), over);
}

void NamedArrive(int id, int threads) { ArriveAtNamed(id, threads); }
void NamedSync(int id, int threads) {
  NamedBarrier& barrier = Current().named[id & 15];
  const int64_t phase = barrier.phase;
  ArriveAtNamed(id, threads);
  static const std::string* const names = [] {
    auto* made = new std::string[16];
    for (int i = 0; i < 16; ++i) made[i] = "named barrier " + std::to_string(i);
    return made;
  }();
  WaitUntil(names[id].c_str(), [&barrier, phase] { return barrier.phase != phase; });
}
void SyncBlock() { NamedSync(0, g_device.launch.threads); }

const void* Meet(const char* what, int threads, const void* mine, size_t bytes) {
  const int place = ThreadOfBlock() % threads;
  Meeting& meeting = Current().meetings[{threads, ThreadOfBlock() / threads}];
  if (meeting.arrived > 0 && std::strcmp(meeting.what, what) != 0) {
    Fail(std::string("threads of one warp or warpgroup meet in ") + what + " and in " + meeting.what);
  }
  meeting.what = what;
  const int64_t number = meeting.number;
  std::vector<unsigned char>& brought = meeting.brought[number % 2];
  if (meeting.arrived == 0) brought.resize(bytes * static_cast<size_t>(threads));
  std::memcpy(brought.data() + bytes * static_cast<size_t>(place), mine, bytes);
  if (++meeting.arrived == threads) {
    meeting.arrived = 0;
    ++meeting.number;
  }
  WaitUntil(what, [&meeting, number] { return meeting.number != number; });
  return brought.data();
}

}  // namespace annulus::emulation
