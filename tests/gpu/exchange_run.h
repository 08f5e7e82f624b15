#pragma once

// What tests of the exchange on GPUs share: this rank on its GPU, every transport that the machine offers,
// and executions of plans with toy attention (comm/exchange_cases.h). Computing is done by host functions
// that the stream calls, so all of it is ordered by the device and may be delayed.

#include <cuda_runtime_api.h>

#include <deque>
#include <thread>

#include "annulus/comm/exchange_transport.h"
#include "annulus/comm/gpu_communicator.h"
#include "annulus/device/gpu.h"
#include "annulus/device/transfer.h"
#include "comm/exchange_cases.h"
#include "support/mpi_main.h"

namespace annulus::testing {

inline constexpr int64_t kRowBytes = 16;  // of a ToyRank's slots

inline void SleepMicroseconds(int64_t us) { std::this_thread::sleep_for(std::chrono::microseconds(us)); }

// This rank's GPU, and the group on it.
class GpuRank {
 public:
  GpuRank() : ctx(MyGpu()) {
    const GpuLink link = ChooseGpuLink(World(), ctx).value();
    own_gpus = link == GpuLink::kNccl;
    cp = WithGpu(World(), GpuLink::kHost, ctx).value();
  }

  Context ctx;
  Communicator cp;
  bool own_gpus = false;

 private:
  static Device MyGpu() {
    const int gpus = GpuCount();
    EXPECT_GT(gpus, 0) << WhyNoGpu();
    const Device device{DeviceKind::kCuda, World().rank() % std::max(gpus, 1)};
    EXPECT_TRUE(UseGpu(device.index).ok());
    return device;
  }
};

// Calls fn with each transport that the ranks can use on this machine; by the host they always can.
inline void OnTransports(const std::function<void(GpuRank&, ExchangeTransport&)>& fn) {
  GpuRank gpu;
  std::vector<TransportKind> kinds = {TransportKind::kHost};
  if (gpu.own_gpus) kinds.push_back(TransportKind::kNccl);
  if (ChooseTransport(gpu.cp, gpu.ctx).value() == TransportKind::kCopyEngine)
    kinds.push_back(TransportKind::kCopyEngine);
  for (const TransportKind kind : kinds) {
    SCOPED_TRACE(std::string(Name(kind)));
    const std::unique_ptr<ExchangeTransport> made = MakeTransport(kind, gpu.cp, gpu.ctx).value();
    EXPECT_EQ(made->kind(), kind);
    fn(gpu, *made);
  }
}

// `fn` is called by the stream when it gets there.
class HostCalls {
 public:
  void Enqueue(StreamHandle stream, std::function<void()> fn) {
    calls_.push_back(std::move(fn));
    const auto call = [](void* data) { (*static_cast<std::function<void()>*>(data))(); };
    ASSERT_EQ(cudaLaunchHostFunc(stream, call, &calls_.back()), cudaSuccess);
  }

 private:
  std::deque<std::function<void()>> calls_;
};

// One execution of a plan by this rank: toy attention on pinned copies of the slots, all of it enqueued.
class Execution {
 public:
  Execution(GpuRank& gpu, const ExchangeCase& made, const ExchangePlan& plan, int64_t number)
      : gpu_(gpu),
        plan_(plan),
        specs_(plan.ranks[static_cast<size_t>(gpu.cp.rank())].slots),
        toy_(made, plan, gpu.cp.rank(), number),
        slot_bytes_(plan.problem.block_rows * kRowBytes),
        pinned_(gpu.ctx.device, std::max<int64_t>(1, slot_bytes_ * static_cast<int64_t>(specs_.size()))),
        random_(static_cast<uint64_t>(number), absl::StrCat("delays of rank ", gpu.cp.rank())) {
    for (size_t i = 0; i < specs_.size(); ++i) {
      mirrors_.emplace_back(static_cast<char*>(pinned_.data()) + slot_bytes_ * static_cast<int64_t>(i),
                            DType::kI64, Device{}, Shape{plan.problem.block_rows, 2});
    }
    toy_.Bind(mirrors_);
  }

  // Computing takes a random time of up to so long.
  void set_delay_us(uint64_t delay_us) { delay_us_ = delay_us; }

  absl::Status Run(ExchangeTransport& transport, TensorRef home_kv, TensorRef home_grad,
                   ExchangeStats* stats) {
    const ArenaScope scope(gpu_.ctx.scratch);
    ANNULUS_ASSIGN_OR_RETURN(slots_, transport.Slots(gpu_.ctx, plan_, home_kv, home_grad));
    // What a slot held before must not matter.
    for (size_t i = 0; i < slots_.size(); ++i) CopyBytes(mirrors_[i], slots_[i], gpu_.ctx.stream());
    const ExchangeBinding binding{
        .slots = slots_,
        .attend = [this](const Step& step) { return Attend(step); },
        .reduce = [this](ConstTensorRef from, TensorRef to) { return Reduce(from, to); }};
    ANNULUS_RETURN_IF_ERROR(transport.Execute(gpu_.ctx, plan_, binding, stats));
    for (size_t i = 0; i < slots_.size(); ++i) {
      if (specs_[i].home) ToHost(static_cast<int>(i), {0, plan_.problem.block_rows});
    }
    return absl::OkStatus();
  }

  // After the stream has got through.
  std::string Compare() const { return toy_.Compare(); }

 private:
  void ToHost(int slot, const RowRange& rows) {
    const size_t i = static_cast<size_t>(slot);
    CopyBytes(slots_[i].Rows(rows.begin, rows.end), mirrors_[i].Rows(rows.begin, rows.end),
              gpu_.ctx.stream());
  }
  void ToDevice(int slot, const RowRange& rows) {
    const size_t i = static_cast<size_t>(slot);
    CopyBytes(mirrors_[i].Rows(rows.begin, rows.end), slots_[i].Rows(rows.begin, rows.end),
              gpu_.ctx.stream());
  }
  void Call(std::function<void()> fn) {
    const int64_t delay_us = delay_us_ == 0 ? 0 : static_cast<int64_t>(random_.Below(draw_++, delay_us_));
    calls_.Enqueue(gpu_.ctx.stream(), [fn = std::move(fn), delay_us] {
      if (delay_us > 0) SleepMicroseconds(delay_us);
      fn();
    });
  }

  absl::Status Attend(const Step& step) {
    const bool overwrites = step.grad_write == GradWrite::kOverwrite;
    for (const BlockPair& pair : step.pairs) {
      ToHost(step.slot, pair.keys);
      if (step.grad_slot >= 0 && !overwrites) ToHost(step.grad_slot, pair.keys);
    }
    Call([this, step] { toy_.Attend(step); });
    if (step.grad_slot < 0) return absl::OkStatus();
    if (overwrites) ToDevice(step.grad_slot, step.rows);
    for (const BlockPair& pair : step.pairs) {
      if (!overwrites) ToDevice(step.grad_slot, pair.keys);
    }
    return absl::OkStatus();
  }

  // The slot of a piece of it, and its rows.
  std::pair<int, RowRange> PlaceOf(const ConstTensorRef& piece) const {
    const char* const at = static_cast<const char*>(piece.raw());
    for (size_t i = 0; i < slots_.size(); ++i) {
      const int64_t begin = at - static_cast<const char*>(slots_[i].raw());
      if (begin < 0 || begin >= slot_bytes_) continue;
      return {static_cast<int>(i), {begin / kRowBytes, begin / kRowBytes + piece.dim(0)}};
    }
    ADD_FAILURE() << "a piece of no slot";
    return {0, {0, 0}};
  }

  absl::Status Reduce(ConstTensorRef from, TensorRef to) {
    const auto [from_slot, rows] = PlaceOf(from);
    const auto [to_slot, to_rows] = PlaceOf(to);
    EXPECT_EQ(rows, to_rows);
    ToHost(from_slot, rows);
    ToHost(to_slot, rows);
    const Step step{.kind = StepKind::kReduce, .slot = from_slot, .grad_slot = to_slot, .rows = rows};
    Call([this, step] { toy_.Reduce(step); });
    ToDevice(to_slot, rows);
    return absl::OkStatus();
  }

  GpuRank& gpu_;
  const ExchangePlan& plan_;
  const std::vector<SlotSpec>& specs_;
  ToyRank toy_;
  const int64_t slot_bytes_;
  PinnedBuffer pinned_;
  std::vector<TensorRef> mirrors_, slots_;
  HostCalls calls_;
  RandomStream random_;
  uint64_t draw_ = 0, delay_us_ = 0;
};

// The caller's memory for blocks of `rows`.
struct Home {
  Home(GpuRank& gpu, int64_t rows)
      : kv(gpu.ctx.device, DType::kI64, {rows, 2}), grad(gpu.ctx.device, DType::kI64, {rows, 2}) {}
  Tensor kv, grad;
};

}  // namespace annulus::testing
