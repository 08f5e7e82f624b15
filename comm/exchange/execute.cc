#include <algorithm>
#include <array>
#include <chrono>
#include <map>

#include "../backoff.h"
#include "../reduce.h"
#include "annulus/base/hash.h"
#include "binding.h"
#include "plan_text.h"

namespace annulus {
namespace {

using Clock = std::chrono::steady_clock;

// Makes ctx.progress advance the exchange, and what it advanced before.
class ProgressScope {
 public:
  ProgressScope(Context& ctx, std::function<void()> advance) : ctx_(ctx), previous_(std::move(ctx.progress)) {
    ctx_.progress = [this, advance = std::move(advance)] {
      advance();
      if (previous_) previous_();
    };
  }
  ~ProgressScope() { ctx_.progress = std::move(previous_); }
  ProgressScope(const ProgressScope&) = delete;
  ProgressScope& operator=(const ProgressScope&) = delete;

 private:
  Context& ctx_;
  std::function<void()> previous_;
};

class Executor {
 public:
  Executor(Context& ctx, const ExchangePlan& plan, Communicator& cp, const ExchangeBinding& binding)
      : ctx_(ctx),
        plan_(plan),
        cp_(cp),
        binding_(binding),
        rank_(plan.ranks[static_cast<size_t>(cp.rank())]) {
    const size_t count = rank_.steps.size();
    waits_for_.resize(count);
    waiters_.resize(count);
    tags_.resize(count);
    std::map<std::pair<StepKind, int>, int> messages;  // of each peer and direction
    for (size_t s = 0; s < count; ++s) {
      const Step& step = rank_.steps[s];
      ANNULUS_CHECK(IsCompute(step.kind) || IsTransfer(step.kind)) << StepText(plan_, cp.rank(), s);
      // A valid plan lists the messages of a pair of ranks in the same order at both ends.
      if (IsTransfer(step.kind)) tags_[s] = messages[{step.kind, step.peer}]++;
      waits_for_[s] = rank_.steps[s].after.size();
      for (const int dependency : rank_.steps[s].after)
        waiters_[static_cast<size_t>(dependency)].push_back(s);
      if (IsCompute(rank_.steps[s].kind)) compute_.push_back(s);
      if (IsTransfer(rank_.steps[s].kind) && waits_for_[s] == 0) startable_.push_back(s);
    }
  }

  absl::Status Run(ExchangeStats* stats) {
    const ProgressScope progress(ctx_, [this] { Advance(); });
    for (const size_t s : compute_) {
      WaitUntil([&] { return waits_for_[s] == 0; }, stats);
      Compute(s);
      Complete(s);
    }
    WaitUntil([&] { return completed_ == rank_.steps.size(); }, stats);
    stats->bytes_sent += bytes_sent_;
    return status_;
  }

 private:
  struct Running {
    size_t step;
    Request request;
  };

  bool on_gpu() const { return ctx_.device.kind == DeviceKind::kCuda; }

  // After an error the transfers go on, so that no other rank hangs; computing does not.
  void Compute(size_t s) {
    if (!status_.ok()) return;
    const Step& step = rank_.steps[s];
    const std::string text = StepText(plan_, cp_.rank(), s);
    if (!on_gpu()) ctx_.recorder.Note("compute", text, nullptr);
    if (step.kind == StepKind::kAttend) {
      status_ = binding_.attend(step);
    } else if (binding_.reduce) {
      status_ = binding_.reduce(RowsOf(binding_, step.slot, step.rows),
                                RowsOf(binding_, step.grad_slot, step.rows));
    } else {
      Reduce(step);
    }
    status_ = Prefixed(status_, text + ": ");
    if (on_gpu()) ctx_.recorder.Note("compute", text, ctx_.stream());
  }

  // In pieces, so that transfers go on meanwhile.
  void Reduce(const Step& step) {
    ANNULUS_CHECK(!on_gpu()) << plan_.name << ": no `reduce` is bound";
    const TensorRef from = RowsOf(binding_, step.slot, step.rows);
    const TensorRef to = RowsOf(binding_, step.grad_slot, step.rows);
    constexpr int64_t kPiece = int64_t{1} << 16;
    for (int64_t begin = 0; begin < from.elements(); begin += kPiece) {
      const int64_t offset = begin * SizeOf(from.dtype());
      Accumulate(from.dtype(), ReduceOp::kSum, static_cast<const char*>(from.raw()) + offset,
                 std::min(kPiece, from.elements() - begin), static_cast<char*>(to.raw()) + offset);
      ctx_.Poll();
    }
  }

  // On GPUs the clock counts from the end of the computing that is enqueued, which the host is ahead of.
  template <typename Condition>
  void WaitUntil(const Condition& reached, ExchangeStats* stats) {
    const Clock::time_point begin = Clock::now();
    ctx_.waits.Begin(WaitKind::kExchange, ctx_.stream());
    Backoff backoff;
    for (ctx_.Poll(); !reached(); ctx_.Poll()) backoff.Pause();
    ctx_.waits.End(WaitKind::kExchange, ctx_.stream());
    if (!on_gpu()) stats->exposed_seconds += std::chrono::duration<double>(Clock::now() - begin).count();
  }

  // Starts and completes transfers.
  void Advance() {
    StartTransfers();
    for (size_t i = 0; i < running_.size();) {
      const size_t s = running_[i].step;
      const absl::StatusOr<bool> complete = running_[i].request.Test();
      CheckTransfer(s, complete.status());
      if (!*complete) {
        ++i;
        continue;
      }
      running_.erase(running_.begin() + static_cast<std::ptrdiff_t>(i));
      Complete(s);
    }
    StartTransfers();
  }

  void StartTransfers() {
    std::sort(startable_.begin(), startable_.end());  // in order of the list
    for (const size_t s : startable_) {
      const Step& step = rank_.steps[s];
      const TensorRef rows = RowsOf(binding_, step.slot, step.rows);
      const bool send = step.kind == StepKind::kSend;
      absl::StatusOr<Request> request =
          send ? cp_.Send(rows, step.peer, tags_[s]) : cp_.Receive(rows, step.peer, tags_[s]);
      CheckTransfer(s, request.status());
      if (send) bytes_sent_ += rows.bytes();
      running_.push_back({s, *std::move(request)});
    }
    startable_.clear();
  }

  // A failed transfer ends the job: others are under way and would write into memory that the caller reuses.
  void CheckTransfer(size_t s, const absl::Status& status) const {
    ANNULUS_CHECK(status.ok()) << plan_.name << ": " << StepText(plan_, cp_.rank(), s) << ": " << status;
  }

  void Complete(size_t s) {
    ++completed_;
    for (const size_t waiter : waiters_[s]) {
      if (--waits_for_[waiter] == 0 && IsTransfer(rank_.steps[waiter].kind)) startable_.push_back(waiter);
    }
  }

  Context& ctx_;
  const ExchangePlan& plan_;
  Communicator& cp_;
  const ExchangeBinding& binding_;
  const RankPlan& rank_;
  std::vector<size_t> waits_for_;             // by step: how many steps it still waits for
  std::vector<std::vector<size_t>> waiters_;  // by step
  std::vector<int> tags_;                     // by step, of transfers
  std::vector<size_t> compute_;               // computing steps in order
  std::vector<size_t> startable_;             // transfers that wait for nothing and have not started
  std::vector<Running> running_;
  size_t completed_ = 0;
  int64_t bytes_sent_ = 0;
  absl::Status status_;
};

}  // namespace

absl::Status Execute(Context& ctx, const ExchangePlan& plan, Communicator& cp, const ExchangeBinding& binding,
                     ExchangeStats* stats) {
  CheckBinding(plan, cp.rank(), cp.size(), binding);
  return Executor(ctx, plan, cp, binding).Run(stats);
}

absl::Status AgreeOnPlan(const ExchangePlan& plan, Communicator& cp) {
  const uint64_t hash = HashOf(plan);
  // max(h) = ~min(~h): one reduction gives both ends.
  std::array<int64_t, 2> ends = {static_cast<int64_t>(hash), ~static_cast<int64_t>(hash)};
  ANNULUS_RETURN_IF_ERROR(
      cp.AllReduce(TensorRef(ends.data(), DType::kI64, Device{}, Shape{2}), ReduceOp::kMin));
  if (ends[0] == ~ends[1]) return absl::OkStatus();
  return Invalid("exchange plan ", plan.name, " hash=", Hex64(hash), " on cp rank ", cp.rank(),
                 ": expected the same plan on all ranks of the group");
}

}  // namespace annulus
