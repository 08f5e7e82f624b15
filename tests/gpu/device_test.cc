// The device layer on GPU 0. Fails where there is none.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <future>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "annulus/device/context.h"
#include "annulus/device/gpu.h"
#include "annulus/device/transfer.h"

namespace annulus {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr Device kGpu = {DeviceKind::kCuda, 0};
constexpr int64_t kMiB = int64_t{1} << 20;

double SecondsSince(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// Holds streams up until it is opened. Opens by itself after a while, so that a test which waits for it fails
// rather than hangs.
class Gate {
 public:
  ~Gate() {
    Open();
    cudaDeviceSynchronize();
  }
  void Block(StreamHandle stream) { ASSERT_EQ(cudaLaunchHostFunc(stream, &Wait, this), cudaSuccess); }
  void Open() { open_ = true; }
  bool gave_up() const { return gave_up_; }

 private:
  static void Wait(void* data) {
    Gate& gate = *static_cast<Gate*>(data);
    const auto begin = Clock::now();
    while (!gate.open_ && SecondsSince(begin) < 20) std::this_thread::sleep_for(milliseconds(1));
    if (!gate.open_) gate.gave_up_ = true;
  }

  std::atomic<bool> open_ = false;
  std::atomic<bool> gave_up_ = false;
};

std::vector<int32_t> Numbers(int64_t count, int32_t first) {
  std::vector<int32_t> values(static_cast<size_t>(count));
  std::iota(values.begin(), values.end(), first);
  return values;
}

std::vector<int32_t> Fetch(Context& ctx, ConstTensorRef x) {
  std::vector<int32_t> host(static_cast<size_t>(x.elements()), -7);
  Download(ctx, x, host.data());
  return host;
}

TensorRef PinnedRef(const PinnedBuffer& memory, int64_t elements) {
  return {memory.data(), DType::kI32, Device{}, {elements}};
}

class DeviceOnGpu : public ::testing::Test {
 protected:
  // Death tests start the program anew: a forked process cannot use the CUDA of its parent.
  DeviceOnGpu() { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
  void SetUp() override {
    const absl::Status used = UseGpu(0);
    ASSERT_TRUE(used.ok()) << used;
  }
};
using DeviceOnGpuDeathTest = DeviceOnGpu;

TEST_F(DeviceOnGpu, IsDescribed) {
  const absl::StatusOr<GpuInfo> info = DescribeGpu(0);
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(WhyNoGpu(), "");
  EXPECT_NE(info->name, "");
  EXPECT_EQ(info->identity.size(), 32u);
  EXPECT_EQ(info->identity.find_first_not_of("0123456789abcdef"), std::string::npos) << info->identity;
  EXPECT_NE(info->identity, std::string(32, '0'));
  EXPECT_GT(info->multiprocessors, 0);
  EXPECT_GE(info->compute_major, 8);
  EXPECT_EQ(info->bf16_tflops, PeakOfGpu(info->name, info->memory_bytes).bf16_tflops);
  const absl::StatusOr<GpuMemory> memory = MemoryOfGpu();
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_LE(memory->free_bytes, memory->total_bytes);
  EXPECT_LE(memory->total_bytes, info->memory_bytes);
  EXPECT_GT(memory->total_bytes, info->memory_bytes * 9 / 10);
  EXPECT_EQ(CudaVersion().rfind("CUDA ", 0), 0u) << CudaVersion();
  EXPECT_EQ(CudaVersion().find("no driver"), std::string::npos) << CudaVersion();
}

TEST_F(DeviceOnGpu, KernelsComputeInF32AndBf16) {
  const Context ctx(kGpu);
  EXPECT_TRUE(VisitDevice(ctx, [](auto device) { return std::is_same_v<decltype(device), CudaTag>; }));
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    EXPECT_EQ(VisitKernel(ctx, dtype, [&]<class T>(auto) { return DTypeOf<T>(); }), dtype);
  }
}

TEST_F(DeviceOnGpu, BuffersAreZeroedAlsoWhereMemoryWasUsed) {
  Context ctx(kGpu);
  const Shape shape({16 * kMiB});
  const std::vector<int32_t> numbers = Numbers(16 * kMiB, 1), zeros(16 * kMiB, 0);
  for (int repeat = 0; repeat < 3; ++repeat) {
    const Tensor tensor(kGpu, DType::kI32, shape);
    ASSERT_TRUE(Fetch(ctx, tensor.ref()) == zeros) << repeat;
    Upload(ctx, numbers.data(), tensor.ref().bytes(), tensor.ref());
    ASSERT_TRUE(Fetch(ctx, tensor.ref()) == numbers) << repeat;
  }
  Buffer a(kGpu, 1000);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(a.data()) % static_cast<uintptr_t>(kAlignmentBytes), 0u);
  void* data = a.data();
  Buffer b(std::move(a));
  EXPECT_EQ(b.data(), data);
  EXPECT_EQ(a.data(), nullptr);  // NOLINT: moved-from is empty
  EXPECT_EQ(Buffer(kGpu, 0).data(), nullptr);
}

TEST_F(DeviceOnGpu, ArenaGrowsInOnePieceAndKeepsContents) {
  Context ctx(kGpu);
  Arena& arena = ctx.scratch;
  EXPECT_EQ(arena.capacity_bytes(), 0);
  std::vector<std::pair<TensorRef, int32_t>> filled;
  char* end = nullptr;
  // Bytes: below, at and above a step of growth, so that tensors lie across borders of mappings.
  for (const int64_t bytes :
       {int64_t{4}, 40 * kMiB, 40 * kMiB, 64 * kMiB, 300 * kMiB + 4, int64_t{0}, kMiB}) {
    const int32_t first = static_cast<int32_t>(1000 * filled.size() + 1);
    const TensorRef tensor = arena.Allocate(DType::kI32, {bytes / 4});
    char* begin = static_cast<char*>(tensor.raw());
    if (end != nullptr) {
      EXPECT_EQ(begin, end) << "a tail was left";
    }
    end = begin + std::max((tensor.bytes() + 255) / 256 * 256, kAlignmentBytes);
    const std::vector<int32_t> numbers = Numbers(tensor.elements(), first);
    Upload(ctx, numbers.data(), tensor.bytes(), tensor);
    filled.emplace_back(tensor, first);
  }
  for (const auto& [tensor, first] : filled) {
    ASSERT_TRUE(Fetch(ctx, tensor) == Numbers(tensor.elements(), first)) << tensor.bytes();
  }
  EXPECT_GE(arena.capacity_bytes(), arena.used_bytes());
  EXPECT_EQ(arena.high_water_bytes(), arena.used_bytes());
}

TEST_F(DeviceOnGpu, ArenaOfARepeatedStepStays) {
  Arena arena(kGpu);
  const auto step = [&] {
    const ArenaScope scope(arena);
    std::vector<void*> at = {arena.Allocate(DType::kBF16, {kMiB}).raw()};
    for (int i = 0; i < 3; ++i) {
      const ArenaScope inner(arena);
      at.push_back(arena.Allocate(DType::kF32, {20 * kMiB}).raw());
    }
    at.push_back(arena.Allocate(DType::kU8, {17}).raw());
    return at;
  };
  const std::vector<void*> first = step();
  EXPECT_EQ(first[1], first[2]);
  EXPECT_EQ(first[1], first[3]);
  EXPECT_EQ(first[1], first[4]);
  const int64_t capacity = arena.capacity_bytes(), high_water = arena.high_water_bytes();
  EXPECT_EQ(arena.used_bytes(), 0);
  for (int repeat = 0; repeat < 3; ++repeat) EXPECT_EQ(step(), first);
  EXPECT_EQ(arena.capacity_bytes(), capacity);
  EXPECT_EQ(arena.high_water_bytes(), high_water);
}

TEST_F(DeviceOnGpu, ArenaGivesItsMemoryBack) {
  {
    Arena(kGpu).Allocate(DType::kU8, {1});
  }  // what CUDA takes for itself at first use
  const absl::StatusOr<GpuMemory> before = MemoryOfGpu();
  ASSERT_TRUE(before.ok()) << before.status();
  for (int repeat = 0; repeat < 3; ++repeat) {
    Arena arena(kGpu);
    arena.Allocate(DType::kU8, {512 * kMiB});
    arena.Allocate(DType::kU8, {512 * kMiB});
    Arena moved(std::move(arena));
    EXPECT_GE(moved.capacity_bytes(), 1024 * kMiB);
    EXPECT_LE(MemoryOfGpu()->free_bytes, before->free_bytes - 1024 * kMiB);
  }
  EXPECT_GE(MemoryOfGpu()->free_bytes, before->free_bytes - 16 * kMiB);
}

TEST_F(DeviceOnGpu, PinnedCopiesDoNotHoldTheHostUp) {
  Gate gate;
  Context ctx(kGpu);
  const int64_t elements = 4 * kMiB;
  const std::vector<int32_t> numbers = Numbers(elements, 5);
  const TensorRef there = ctx.scratch.Allocate(DType::kI32, {elements});
  const PinnedBuffer from(kGpu, there.bytes()), to(kGpu, there.bytes());
  std::copy(numbers.begin(), numbers.end(), static_cast<int32_t*>(from.data()));
  std::fill_n(static_cast<int32_t*>(to.data()), elements, -1);
  Event done(kGpu);
  EXPECT_TRUE(done.Done());  // never recorded
  gate.Block(ctx.stream());
  CopyBytes(PinnedRef(from, elements), there, ctx.stream());
  ZeroBytes(there.Rows(0, 10), ctx.stream());
  CopyBytes(there, PinnedRef(to, elements), ctx.stream());
  done.Record(ctx.stream());
  EXPECT_FALSE(done.Done());
  EXPECT_EQ(*static_cast<int32_t*>(to.data()), -1);
  EXPECT_FALSE(gate.gave_up()) << "the host waited for the stream";
  gate.Open();
  done.Synchronize();
  EXPECT_TRUE(done.Done());
  std::vector<int32_t> expected = numbers;
  std::fill_n(expected.begin(), 10, 0);
  EXPECT_TRUE(std::equal(expected.begin(), expected.end(), static_cast<int32_t*>(to.data())));
}

TEST_F(DeviceOnGpu, UploadsKeepWhatWasGivenAndStagingIsReused) {
  Gate gate;
  Context ctx(kGpu);
  constexpr int kSent = 5;
  constexpr int64_t kElements = 100'000;  // 400 kB: one piece of 512 KiB
  std::vector<TensorRef> there;
  for (int i = 0; i < kSent; ++i) there.push_back(ctx.scratch.Allocate(DType::kI32, {kElements}));
  gate.Block(ctx.stream());
  std::vector<int32_t> host;
  for (int i = 0; i < kSent; ++i) {
    host = Numbers(kElements, i);
    Upload(ctx, host.data(), there[static_cast<size_t>(i)].bytes(), there[static_cast<size_t>(i)]);
    std::fill(host.begin(), host.end(), -1);
    EXPECT_EQ(ctx.staging.capacity_bytes(), (i + 1) * kMiB / 2);
  }
  EXPECT_FALSE(gate.gave_up()) << "the host waited for the stream";
  gate.Open();
  ctx.lane.Synchronize();
  for (int i = 0; i < kSent; ++i) {
    ASSERT_TRUE(Fetch(ctx, there[static_cast<size_t>(i)]) == Numbers(kElements, i)) << i;
  }
  for (int i = 0; i < 3 * kSent; ++i) {
    host = Numbers(kElements, 100 + i);
    Upload(ctx, host.data(), there[0].bytes(), there[0]);
    ASSERT_TRUE(Fetch(ctx, there[0]) == host) << i;
  }
  EXPECT_EQ(ctx.staging.capacity_bytes(), kSent * kMiB / 2);
}

TEST_F(DeviceOnGpu, EventsOrderStreams) {
  Gate gate;
  Context ctx(kGpu);
  const Stream other(kGpu, StreamPriority::kHigh);
  ASSERT_NE(other.handle(), nullptr);
  ASSERT_NE(other.handle(), ctx.stream());
  const int64_t elements = kMiB;
  const TensorRef there = ctx.scratch.Allocate(DType::kI32, {elements});
  ZeroBytes(there, ctx.stream());
  ctx.lane.Synchronize();
  const PinnedBuffer from(kGpu, there.bytes()), early(kGpu, there.bytes()), late(kGpu, there.bytes());
  const std::vector<int32_t> numbers = Numbers(elements, 3), zeros(static_cast<size_t>(elements), 0);
  std::copy(numbers.begin(), numbers.end(), static_cast<int32_t*>(from.data()));
  Event written(kGpu), read(kGpu);
  gate.Block(ctx.stream());
  CopyBytes(PinnedRef(from, elements), there, ctx.stream());
  written.Record(ctx.stream());
  CopyBytes(there, PinnedRef(early, elements), other.handle());
  other.Synchronize();  // not held: passes the blocked stream
  EXPECT_TRUE(std::equal(zeros.begin(), zeros.end(), static_cast<int32_t*>(early.data())));
  written.Hold(other.handle());
  CopyBytes(there, PinnedRef(late, elements), other.handle());
  read.Record(other.handle());
  std::this_thread::sleep_for(milliseconds(20));
  EXPECT_FALSE(read.Done());
  gate.Open();
  other.Synchronize();
  EXPECT_TRUE(read.Done());
  EXPECT_TRUE(std::equal(numbers.begin(), numbers.end(), static_cast<int32_t*>(late.data())));
}

TEST_F(DeviceOnGpu, StreamsAndEventsMove) {
  Stream a(kGpu);
  const StreamHandle handle = a.handle();
  Stream b(std::move(a));
  EXPECT_EQ(b.handle(), handle);
  EXPECT_EQ(a.handle(), nullptr);  // NOLINT: moved-from is empty
  Event begin(kGpu, EventTiming::kTimed), end;
  begin.Record(b.handle());
  end = Event(kGpu, EventTiming::kTimed);
  std::this_thread::sleep_for(milliseconds(20));
  end.Record(b.handle());
  Event moved(std::move(end));
  moved.Synchronize();
  const double seconds = Event::Seconds(begin, moved);
  EXPECT_GE(seconds, 0.015);
  EXPECT_LT(seconds, 10);
}

TEST_F(DeviceOnGpu, WaitClockMeasuresAHeldStream) {
  Gate gate;
  Context ctx(kGpu);
  const Stream other(kGpu);
  Event sent(kGpu);
  gate.Block(other.handle());
  sent.Record(other.handle());
  const auto begin = Clock::now();
  ctx.waits.Begin(WaitKind::kExchange, ctx.stream());
  sent.Hold(ctx.stream());
  ctx.waits.End(WaitKind::kExchange, ctx.stream());
  ctx.waits.Begin(WaitKind::kGradients, ctx.stream());
  ctx.waits.End(WaitKind::kGradients, ctx.stream());
  std::this_thread::sleep_for(milliseconds(200));
  EXPECT_EQ(ctx.waits.TakeSeconds(WaitKind::kExchange), 0) << "the stream still waits";
  EXPECT_EQ(ctx.waits.TakeSeconds(WaitKind::kGradients), 0) << "the stream is not there yet";
  gate.Open();
  ctx.lane.Synchronize();
  const double wall = SecondsSince(begin), exchange = ctx.waits.TakeSeconds(WaitKind::kExchange);
  EXPECT_GE(exchange, 0.190);  // the first event may run a little late
  EXPECT_LE(exchange, wall);
  EXPECT_LT(ctx.waits.TakeSeconds(WaitKind::kGradients), 0.010);
  EXPECT_EQ(ctx.waits.TakeSeconds(WaitKind::kExchange), 0);

  // The same events again, all of them over: several waits add up.
  const auto again = Clock::now();
  for (int i = 0; i < 3; ++i) {
    ctx.waits.Begin(WaitKind::kParameters, ctx.stream());
    std::this_thread::sleep_for(milliseconds(20));  // the stream has nothing to do
    ctx.waits.End(WaitKind::kParameters, ctx.stream());
  }
  ctx.waits.Begin(WaitKind::kParameters, ctx.stream());  // stays open
  ctx.lane.Synchronize();
  const double parameters = ctx.waits.TakeSeconds(WaitKind::kParameters);
  EXPECT_GE(parameters, 0.050);
  EXPECT_LE(parameters, SecondsSince(again));
}

// The report of a thread that has nothing to do with CUDA; fails if it takes as long as only a blocked one
// does.
std::string ReportOfAnotherThread(const FlightRecorder& recorder) {
  const auto begin = Clock::now();
  std::string report = std::async(std::launch::async, [&] { return recorder.Report(); }).get();
  EXPECT_LT(SecondsSince(begin), 5);
  return report;
}

TEST_F(DeviceOnGpu, FlightRecorderReportsABlockedStream) {
  Gate gate;
  Context ctx(kGpu);
  const Stream exchange(kGpu);
  FlightRecorder& recorder = ctx.recorder;
  recorder.BeginStep(3);
  recorder.Note("compute", "attend 0", ctx.stream());
  recorder.Note("exchange", "send 0", exchange.handle());
  ctx.lane.Synchronize();
  exchange.Synchronize();
  EXPECT_EQ(recorder.Report(),
            "step 3\ncompute: finished `attend 0`, waits for nothing\n"
            "exchange: finished `send 0`, waits for nothing");
  gate.Block(ctx.stream());
  for (int i = 1; i <= 13; ++i) recorder.Note("compute", absl::StrCat("attend ", i), ctx.stream());
  recorder.Note("exchange", "send 1", exchange.handle());
  exchange.Synchronize();
  recorder.Note("host", "read data", nullptr);
  EXPECT_EQ(ReportOfAnotherThread(recorder),
            "step 3\ncompute: finished `attend 0`, waits for `attend 1` (12 more behind it)\n"
            "exchange: finished `send 1`, waits for nothing\n"
            "host: finished none of the last 1, waits for `read data`");
  EXPECT_FALSE(gate.gave_up());
  gate.Open();
  ctx.lane.Synchronize();
  EXPECT_NE(recorder.Report().find("compute: finished `attend 13`, waits for nothing"), std::string::npos);
}

// More than CUDA queues on a stream: the noting thread itself hangs, and the report answers all the same.
TEST_F(DeviceOnGpu, FlightRecorderReportsWhileTheHostHangsInCuda) {
  Gate gate;
  Context ctx(kGpu);
  constexpr int kNotes = 20'000;
  ctx.recorder.Note("compute", "first", ctx.stream());
  ctx.lane.Synchronize();
  gate.Block(ctx.stream());
  std::atomic<int> noted = 0;
  std::thread host([&] {
    ASSERT_TRUE(UseGpu(0).ok());
    for (int i = 0; i < kNotes; ++i, ++noted)
      ctx.recorder.Note("compute", absl::StrCat("attend ", i), ctx.stream());
  });
  for (int before = -1; before != noted;) {
    before = noted;
    std::this_thread::sleep_for(milliseconds(200));
  }
  EXPECT_LT(noted, kNotes) << "the queue never filled";
  const std::string report = ReportOfAnotherThread(ctx.recorder);
  EXPECT_NE(report.find("compute: finished "), std::string::npos) << report;
  EXPECT_NE(report.find(absl::StrCat(" (", noted.load(), " more behind it)")), std::string::npos) << report;
  EXPECT_FALSE(gate.gave_up());
  gate.Open();
  host.join();
  ctx.lane.Synchronize();
  EXPECT_EQ(ctx.recorder.Report(),
            absl::StrCat("step 0\ncompute: finished `attend ", kNotes - 1, "`, waits for nothing"));
}

TEST_F(DeviceOnGpu, ReadbackComesLater) {
  Gate gate;
  Context ctx(kGpu);
  const std::vector<double> first = {1, 2, 3}, second = {4, 5, 6};
  const TensorRef there = Upload(ctx, ctx.scratch, absl::MakeConstSpan(first));
  Readback readback(kGpu, 3);
  readback.Start(ctx, there);
  EXPECT_EQ(readback.Wait(), absl::MakeConstSpan(first));
  gate.Block(ctx.stream());
  Upload(ctx, second.data(), there.bytes(), there);
  readback.Start(ctx, there);
  ZeroBytes(there, ctx.stream());
  EXPECT_FALSE(gate.gave_up()) << "the host waited for the stream";
  gate.Open();
  EXPECT_EQ(readback.Wait(), absl::MakeConstSpan(second));
}

TEST_F(DeviceOnGpuDeathTest, MemoryThatIsNotThereIsNamedWithWhatIs) {
  EXPECT_DEATH(Buffer(kGpu, int64_t{1} << 50),
               "out of memory: 1125899906842624 bytes on cuda:0, [0-9]+ of [0-9]+ bytes are free");
  EXPECT_DEATH(Arena(kGpu).Allocate(DType::kU8, {int64_t{1} << 50}),
               "out of memory: 1125899906842624 bytes on cuda:0, [0-9]+ of [0-9]+ bytes are free");
  // Addresses are left, memory is not.
  EXPECT_DEATH(
      {
        const int64_t most = MemoryOfGpu()->free_bytes * 6 / 10;
        const Buffer other(kGpu, most);
        Arena arena(kGpu);
        arena.Allocate(DType::kU8, {most});
      },
      "out of memory: [0-9]+ bytes on cuda:0, [0-9]+ of [0-9]+ bytes are free");
}

TEST_F(DeviceOnGpuDeathTest, FailuresNameTheCallTheMessageAndTheDevice) {
  const auto time_untimed_events = [] {
    const Stream stream(kGpu);
    Event begin(kGpu), end(kGpu);
    begin.Record(stream.handle());
    end.Record(stream.handle());
    stream.Synchronize();
    Event::Seconds(begin, end);
  };
  EXPECT_DEATH(time_untimed_events(),
               "stream_cuda.cc:[0-9]+.*cudaEventElapsedTime.*: cudaError[A-Za-z]+ \\(.*\\) on cuda:0");
  EXPECT_DEATH(ZeroBytes(Tensor(kGpu, DType::kU8, {8}).ref(), nullptr), "on no stream");
  EXPECT_DEATH(Event(kGpu).Record(nullptr), "on no stream");
  EXPECT_DEATH(VisitKernel(Context(kGpu), DType::kF64, []<class T>(auto) {}), "f64 on cuda:0");
}

}  // namespace
}  // namespace annulus
