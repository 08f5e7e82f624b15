#include "execute.h"

#include <algorithm>
#include <chrono>
#include <map>

#include "../backoff.h"
#include "annulus/comm/exchange_timeline.h"
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
  Executor(Context& ctx, const ExchangePlan& plan, Communicator& cp, const ExchangeBinding& binding,
           StepClock* clock)
      : ctx_(ctx),
        plan_(plan),
        cp_(cp),
        binding_(binding),
        clock_(clock),
        rank_(plan.ranks[static_cast<size_t>(cp.rank())]) {
    const size_t count = rank_.steps.size();
    waits_for_.resize(count);
    waiters_.resize(count);
    tags_.resize(count);
    for (size_t s = 0; s < count; ++s) {
      const Step& step = rank_.steps[s];
      waits_for_[s] = step.after.size();
      for (const int dependency : step.after) waiters_[static_cast<size_t>(dependency)].push_back(s);
      if (IsCompute(step.kind)) {
        compute_.push_back(s);
      } else if (waits_for_[s] == 0) {
        startable_.push_back(s);
      }
    }
    NumberMessages();
  }

  absl::Status Run(ExchangeStats* stats) {
    if (clock_ != nullptr) clock_->BeginRun(rank_.steps.size(), ctx_.stream());
    const ProgressScope progress(ctx_, [this] { Advance(); });
    for (const size_t s : compute_) {
      WaitUntil([&] { return waits_for_[s] == 0; }, stats);
      Compute(s);
      Complete(s);
    }
    WaitUntil([&] { return completed_ == rank_.steps.size(); }, stats);
    stats->bytes_sent += bytes_sent_;
    if (clock_ != nullptr) clock_->EndRun(bytes_sent_, ctx_.stream());
    return status_;
  }

 private:
  struct Running {
    size_t step;
    std::vector<Request> fields;  // those that are not complete
  };

  bool on_gpu() const { return ctx_.device.kind == DeviceKind::kCuda; }
  const SlotMemory& SlotOf(const Step& step) const { return binding_.slots[static_cast<size_t>(step.slot)]; }

  // A valid plan lists the messages of a pair of ranks in the same order at both ends, and both have the same
  // fields.
  void NumberMessages() {
    std::map<std::pair<StepKind, int>, size_t> fields;  // of each peer and direction
    for (size_t s = 0; s < tags_.size(); ++s) {
      const Step& step = rank_.steps[s];
      if (!IsTransfer(step.kind)) continue;
      size_t& next = fields[{step.kind, step.peer}];
      tags_[s] = static_cast<int>(next);
      next += SlotOf(step).fields.size();
      ANNULUS_CHECK(next < static_cast<size_t>(Communicator::kMaxTag))
          << StepText(plan_, cp_.rank(), s) << ": too many messages between two ranks";
    }
  }

  // After an error the transfers go on, so that no other rank hangs; computing does not.
  void Compute(size_t s) {
    if (!status_.ok()) return;
    const std::string text = StepText(plan_, cp_.rank(), s);
    if (!on_gpu()) ctx_.recorder.Note("compute", text, nullptr);
    if (clock_ != nullptr) clock_->Begin(s, ctx_.stream());
    status_ = Prefixed(binding_.compute(rank_.steps[s]), text + ": ");
    if (clock_ != nullptr) clock_->End(s, ctx_.stream());
    if (on_gpu()) ctx_.recorder.Note("compute", text, ctx_.stream());
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
    std::vector<size_t> ended;
    for (Running& transfer : running_) {
      std::erase_if(transfer.fields, [&](Request& request) {
        const absl::StatusOr<bool> complete = request.Test();
        CheckTransfer(transfer.step, complete.status());
        return *complete;
      });
      if (transfer.fields.empty()) ended.push_back(transfer.step);
    }
    std::erase_if(running_, [](const Running& transfer) { return transfer.fields.empty(); });
    for (const size_t s : ended) {
      if (clock_ != nullptr) clock_->End(s, nullptr);
      Complete(s);
    }
    StartTransfers();
  }

  void StartTransfers() {
    std::sort(startable_.begin(), startable_.end());  // in order of the list
    for (const size_t s : startable_) {
      const Step& step = rank_.steps[s];
      const RowRange rows = RowsInSlot(plan_, cp_.rank(), step);
      Running transfer{.step = s, .fields = {}};
      int tag = tags_[s];
      if (clock_ != nullptr) clock_->Begin(s, nullptr);
      for (const TensorRef& field : SlotOf(step).fields) {
        const TensorRef part = field.Rows(rows.begin, rows.end);
        const bool sends = step.kind == StepKind::kSend;
        absl::StatusOr<Request> request =
            sends ? cp_.Send(part, step.peer, tag) : cp_.Receive(part, step.peer, tag);
        CheckTransfer(s, request.status());
        if (sends) bytes_sent_ += part.bytes();
        transfer.fields.push_back(*std::move(request));
        ++tag;
      }
      running_.push_back(std::move(transfer));
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
  StepClock* const clock_;  // null: nothing is recorded
  const RankPlan& rank_;
  std::vector<size_t> waits_for_;             // by step: how many steps it still waits for
  std::vector<std::vector<size_t>> waiters_;  // by step
  std::vector<int> tags_;                     // by step, of transfers: of the first field; the others follow
  std::vector<size_t> compute_;               // computing steps in order
  std::vector<size_t> startable_;             // transfers that wait for nothing and have not started
  std::vector<Running> running_;
  size_t completed_ = 0;
  int64_t bytes_sent_ = 0;
  absl::Status status_;
};

}  // namespace

absl::Status ExecuteByHost(Context& ctx, const ExchangePlan& plan, Communicator& cp,
                           const ExchangeBinding& binding, ExchangeStats* stats) {
  CheckBinding(plan, cp.rank(), cp.size(), binding);
  return Executor(ctx, plan, cp, binding, stats->clock).Run(stats);
}

}  // namespace annulus
