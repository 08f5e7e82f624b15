#include "annulus/device/context.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "annulus/device/trace.h"
#include "annulus/device/transfer.h"

namespace annulus {
namespace {

TEST(Context, PollsOnlyWhenThereIsSomethingToPoll) {
  Context ctx{Device{}};
  ctx.Poll();
  int polls = 0;
  ctx.progress = [&] { ++polls; };
  ctx.Poll();
  EXPECT_EQ(polls, 1);
}

TEST(Context, KernelsOfACpuComputeInF32AndF64) {
  Context ctx{Device{}};
  EXPECT_EQ(ctx.determinism, Determinism::kOff);
  EXPECT_EQ(Context(Device{}, Determinism::kRequired).determinism, Determinism::kRequired);
  EXPECT_TRUE(VisitDevice(ctx, [](auto device) { return std::is_same_v<decltype(device), CpuTag>; }));
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    EXPECT_EQ(VisitKernel(ctx, dtype, [&]<class T>(auto) { return DTypeOf<T>(); }), dtype);
  }
}

TEST(ContextDeathTest, RefusesDtypesAndDevicesWithoutKernels) {
  Context ctx{Device{}};
  for (const DType dtype : {DType::kBF16, DType::kI32}) {
    EXPECT_DEATH(VisitKernel(ctx, dtype, []<class T>(auto) {}), std::string(Name(dtype)) + " on cpu");
  }
  ctx.device.kind = DeviceKind::kCuda;
  EXPECT_DEATH(VisitKernel(ctx, DType::kF64, []<class T>(auto) {}), "f64 on cuda:0|no kernels for cuda:0");
}

TEST(TraceRange, Nests) {
  const TraceRange outer("step");
  const TraceRange inner(std::string("kv_ring attend 3"));
}

TEST(Stream, IsEmptyOnCpus) {
  Stream stream(Device{}, StreamPriority::kHigh);
  EXPECT_EQ(stream.handle(), nullptr);
  stream.Synchronize();
  Event begin(Device{}, EventTiming::kTimed), end(Device{}, EventTiming::kTimed);
  begin.Record(stream.handle());
  begin.Hold(stream.handle());
  begin.Synchronize();
  EXPECT_TRUE(begin.Done());
  EXPECT_EQ(Event::Seconds(begin, end), 0);
}

TEST(StagingMemory, ReusesThePieceThatFitsBest) {
  StagingMemory staging{Device{}};
  std::vector<void*> pieces;
  const auto send = [&](int64_t bytes) {
    staging.Send(bytes, nullptr, [&](void* pinned) {
      std::memset(pinned, 1, static_cast<size_t>(bytes));
      pieces.push_back(pinned);
    });
  };
  send(100);
  EXPECT_EQ(staging.capacity_bytes(), 64 << 10);
  send((1 << 20) + 1);
  EXPECT_EQ(staging.capacity_bytes(), (64 << 10) + (2 << 20));
  const int64_t capacity = staging.capacity_bytes();
  send(200);
  send(1 << 20);
  send(0);
  EXPECT_EQ(staging.capacity_bytes(), capacity);
  EXPECT_EQ(pieces[2], pieces[0]);
  EXPECT_EQ(pieces[3], pieces[1]);
  EXPECT_EQ(pieces[4], pieces[0]);
}

TEST(SpanClock, CountsSpansAndTheirTime) {
  SpanClock clock{Device{}};
  const auto before = std::chrono::steady_clock::now();
  for (int i = 0; i < 3; ++i) {
    clock.Begin(nullptr);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    clock.End(nullptr);
  }
  clock.Begin(nullptr);
  const SpanClock::Spans spans = clock.Take();
  EXPECT_EQ(spans.count, 3);
  EXPECT_GE(spans.seconds, 0.015);
  EXPECT_LE(spans.seconds,
            std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count());
  clock.End(nullptr);
  EXPECT_EQ(clock.Take().count, 1);
  EXPECT_EQ(clock.Take().count, 0);
}

TEST(WaitClock, CountsTheHostsWaitsByKind) {
  WaitClock clock{Device{}};
  constexpr std::chrono::milliseconds kWait(20);
  const auto wait = [&](WaitKind kind) {
    clock.Begin(kind, nullptr);
    std::this_thread::sleep_for(kWait);
    clock.End(kind, nullptr);
  };
  const auto before = std::chrono::steady_clock::now();
  wait(WaitKind::kExchange);
  wait(WaitKind::kExchange);
  wait(WaitKind::kParameters);
  const double all = std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
  const double exchange = clock.TakeSeconds(WaitKind::kExchange);
  const double parameters = clock.TakeSeconds(WaitKind::kParameters);
  EXPECT_GE(exchange, 0.040);
  EXPECT_GE(parameters, 0.020);
  EXPECT_LE(exchange + parameters, all);
  EXPECT_EQ(clock.TakeSeconds(WaitKind::kGradients), 0);
  EXPECT_EQ(clock.TakeSeconds(WaitKind::kExchange), 0);
}

TEST(WaitClock, AWaitCountsWhenItIsOver) {
  WaitClock clock{Device{}};
  clock.Begin(WaitKind::kGradients, nullptr);
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  EXPECT_EQ(clock.TakeSeconds(WaitKind::kGradients), 0);
  clock.End(WaitKind::kGradients, nullptr);
  EXPECT_GE(clock.TakeSeconds(WaitKind::kGradients), 0.005);
}

TEST(WaitClockDeathTest, BeginAndEndAlternate) {
  WaitClock clock{Device{}};
  EXPECT_DEATH(clock.End(WaitKind::kParameters, nullptr), "wait 2 ends before it begins");
  clock.Begin(WaitKind::kExchange, nullptr);
  EXPECT_DEATH(clock.Begin(WaitKind::kExchange, nullptr), "wait 0 begins twice");
}

TEST(FlightRecorder, NamesWhatEachLaneIsAt) {
  FlightRecorder recorder{Device{}};
  EXPECT_EQ(recorder.Report(), "step 0");
  recorder.BeginStep(7);
  EXPECT_EQ(recorder.step(), 7);
  recorder.Note("exchange", "send 0", nullptr);
  EXPECT_EQ(recorder.Report(), "step 7\nexchange: finished none of the last 1, waits for `send 0`");
  recorder.Note("compute", "attend 0", nullptr);
  recorder.Note("compute", "attend 1", nullptr);
  recorder.Note("exchange", "send 1", nullptr);
  recorder.Note("compute", "merge", nullptr);
  EXPECT_EQ(recorder.Report(),
            "step 7\ncompute: finished `attend 1`, waits for `merge`\nexchange: finished `send 0`, waits for "
            "`send 1`");
  for (int i = 0; i < 10'000; ++i) recorder.Note("compute", absl::StrCat("attend ", i), nullptr);
  recorder.BeginStep(8);
  EXPECT_EQ(recorder.Report(),
            "step 8\ncompute: finished `attend 9998`, waits for `attend 9999`\n"
            "exchange: finished `send 0`, waits for `send 1`");
}

TEST(FlightRecorder, ReportsWhileOthersNote) {
  FlightRecorder recorder{Device{}};
  std::vector<std::thread> threads;
  for (const std::string lane : {"compute", "exchange"}) {
    threads.emplace_back([&recorder, lane] {
      for (int i = 0; i < 3000; ++i) recorder.Note(lane, absl::StrCat(lane, " ", i), nullptr);
    });
  }
  for (int i = 0; i < 100; ++i) EXPECT_EQ(recorder.Report().rfind("step 0", 0), 0u);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(recorder.Report(),
            "step 0\ncompute: finished `compute 2998`, waits for `compute 2999`\n"
            "exchange: finished `exchange 2998`, waits for `exchange 2999`");
}

}  // namespace
}  // namespace annulus
