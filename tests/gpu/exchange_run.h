#pragma once

// What tests of the exchange on GPUs share: every transport that the machine offers, and executions of plans
// with toy attention (comm/toy_rank.h). Computing is done by host functions that the stream calls, so all of
// it is ordered by the device and may be delayed.

#include <cuda_runtime_api.h>

#include <deque>
#include <map>
#include <thread>

#include "annulus/device/transfer.h"
#include "comm/exchange_execute_checks.h"
#include "gpu/exchange_rank.h"

namespace annulus::testing {

inline void SleepMicroseconds(int64_t us) { std::this_thread::sleep_for(std::chrono::microseconds(us)); }

// Calls fn with each transport that the ranks can use on this machine.
inline void OnTransports(const std::function<void(GpuRank&, ExchangeTransport&)>& fn,
                         LinkThrottle throttle = {}) {
  GpuRank gpu;
  for (const TransportKind kind : gpu.Transports()) {
    SCOPED_TRACE(std::string(Name(kind)));
    const std::unique_ptr<ExchangeTransport> made = MakeTransport(kind, gpu.cp, gpu.ctx, throttle).value();
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

// The caller's memory on the device, which executions in a row share.
class HomeMemory {
 public:
  explicit HomeMemory(GpuRank& gpu) : gpu_(gpu) {}

  // Makes room for this rank's home slots; before any execution.
  void Fit(const ExchangePlan& plan) {
    for (const SlotSpec& spec : plan.ranks[static_cast<size_t>(gpu_.cp.rank())].slots) {
      Buffer& memory = memory_[spec.payload];
      const int64_t bytes = plan.problem.block_rows * ToyRowBytes(plan, spec);
      if (spec.home && memory.bytes() < bytes) memory = Buffer(gpu_.ctx.device, bytes);
    }
  }
  SlotMemory Of(const ToyRank& toy, Payload payload) const {
    SlotMemory slot = toy.source().home(payload);
    char* data = static_cast<char*>(memory_.at(payload).data());
    for (TensorRef& field : slot.fields) {
      field = TensorRef(data, field.dtype(), gpu_.ctx.device, field.shape());
      data += field.bytes();
    }
    return slot;
  }

 private:
  GpuRank& gpu_;
  std::map<Payload, Buffer> memory_;
};

// One execution of a plan by this rank: toy attention on pinned copies of the slots, all of it enqueued.
class Execution {
 public:
  Execution(GpuRank& gpu, const ExchangeCase& made, const ExchangePlan& plan, int64_t number)
      : gpu_(gpu),
        plan_(plan),
        specs_(plan.ranks[static_cast<size_t>(gpu.cp.rank())].slots),
        toy_(made, plan, gpu.cp.rank(), number),
        random_(static_cast<uint64_t>(number), absl::StrCat("delays of rank ", gpu.cp.rank())) {
    for (const SlotMemory& slot : toy_.slots()) {
      SlotMemory& mirror = mirrors_.emplace_back();
      for (const TensorRef& field : slot.fields) {
        pinned_.emplace_back(gpu.ctx.device, std::max<int64_t>(1, field.bytes()));
        mirror.fields.emplace_back(pinned_.back().data(), field.dtype(), Device{}, field.shape());
      }
    }
    toy_.Bind(mirrors_);
  }

  // Computing takes a random time of up to so long.
  void set_delay_us(uint64_t delay_us) { delay_us_ = delay_us; }

  absl::Status Run(ExchangeTransport& transport, const HomeMemory& home, ExchangeStats* stats) {
    const ArenaScope scope(gpu_.ctx.scratch);
    const SlotSource source{.home = [&](Payload payload) { return home.Of(toy_, payload); },
                            .fields = toy_.source().fields};
    ANNULUS_ASSIGN_OR_RETURN(slots_, transport.Slots(gpu_.ctx, plan_, source));
    // What a slot held before must not matter.
    for (size_t i = 0; i < slots_.size(); ++i) Move(Way::kToDevice, i, {0, SlotRows(plan_, specs_[i])});
    const ExchangeBinding binding{.slots = slots_,
                                  .compute = [this](const Step& step) { return Compute(step); }};
    ANNULUS_RETURN_IF_ERROR(transport.Execute(gpu_.ctx, plan_, binding, stats));
    for (size_t i = 0; i < slots_.size(); ++i) {
      if (specs_[i].home) Move(Way::kToHost, i, {0, plan_.problem.block_rows});
    }
    return absl::OkStatus();
  }

  // After the stream has got through.
  std::string Compare() const { return toy_.Compare(); }

 private:
  enum class Way { kToHost, kToDevice };

  void Move(Way way, size_t slot, const RowRange& rows) {
    for (size_t f = 0; f < slots_[slot].fields.size(); ++f) {
      const TensorRef device = slots_[slot].fields[f].Rows(rows.begin, rows.end);
      const TensorRef host = mirrors_[slot].fields[f].Rows(rows.begin, rows.end);
      if (device.bytes() == 0) continue;
      if (way == Way::kToHost) CopyBytes(device, host, gpu_.ctx.stream());
      if (way == Way::kToDevice) CopyBytes(host, device, gpu_.ctx.stream());
    }
  }
  void Move(Way way, int slot, const std::vector<BlockRows>& all) {
    if (slot < 0) return;
    const size_t s = static_cast<size_t>(slot);
    for (const BlockRows& rows : all) {
      const int64_t begin = RowInSlot(plan_, specs_[s], rows);
      Move(way, s, RowRange{begin, begin + rows.rows.size()});
    }
  }

  absl::Status Compute(const Step& step) {
    const Attend& attend = step.attend;
    const bool attends = step.kind == StepKind::kAttend;
    if (attends) {
      Move(Way::kToHost, attend.q_slot, attend.q_rows);
      Move(Way::kToHost, attend.kv_slot, attend.kv_rows);
      if (attend.q_write == ResultWrite::kAccumulate) Move(Way::kToHost, attend.q_result, attend.q_rows);
      if (attend.kv_write == ResultWrite::kAccumulate) Move(Way::kToHost, attend.kv_result, attend.kv_rows);
    } else {
      Move(Way::kToHost, step.slot, {step.rows});
      Move(Way::kToHost, step.into, {step.rows});
    }
    Call([this, step] { toy_.Compute(step); });
    if (attends) {
      Move(Way::kToDevice, attend.q_result, attend.q_rows);
      Move(Way::kToDevice, attend.kv_result, attend.kv_rows);
    } else {
      Move(Way::kToDevice, step.into, {step.rows});
    }
    return absl::OkStatus();
  }

  void Call(std::function<void()> fn) {
    const int64_t delay_us = delay_us_ == 0 ? 0 : static_cast<int64_t>(random_.Below(draw_++, delay_us_));
    calls_.Enqueue(gpu_.ctx.stream(), [fn = std::move(fn), delay_us] {
      if (delay_us > 0) SleepMicroseconds(delay_us);
      fn();
    });
  }

  GpuRank& gpu_;
  const ExchangePlan& plan_;
  const std::vector<SlotSpec>& specs_;
  ToyRank toy_;
  std::deque<PinnedBuffer> pinned_;
  std::vector<SlotMemory> mirrors_, slots_;
  HostCalls calls_;
  RandomStream random_;
  uint64_t draw_ = 0, delay_us_ = 0;
};

}  // namespace annulus::testing
