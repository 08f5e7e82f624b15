#include "annulus/parallel/tensor_parallel.h"

#include <map>

#include "annulus/ops/elementwise.h"

namespace annulus {
namespace {

absl::Status WaitFor(Context& ctx, std::shared_ptr<Request> request) {
  if (request == nullptr || request->done()) return absl::OkStatus();
  ctx.waits.Begin(WaitKind::kTensor, ctx.stream());
  absl::Status status = request->Wait();
  ctx.waits.End(WaitKind::kTensor, ctx.stream());
  return status;
}

}  // namespace

absl::Status PendingSum::Finish(Context& ctx) {
  ANNULUS_RETURN_IF_ERROR(WaitFor(ctx, std::move(request_)));
  if (!received_.defined()) return absl::OkStatus();
  return AddInPlace(ctx, received_, result_);
}

absl::StatusOr<ConstTensorRef> PendingTokens::Finish(Context& ctx) {
  ANNULUS_RETURN_IF_ERROR(WaitFor(ctx, std::move(request_)));
  return all_;
}

struct TensorParallel::Shared {
  std::vector<std::weak_ptr<Request>> under_way;
  std::map<int, TensorParallel> neighbours;  // by size
};

TensorParallel::TensorParallel(Communicator tp) : comm_(std::move(tp)) {
  if (comm_.size() > 1) shared_ = std::make_shared<Shared>();
}

int TensorParallel::rank() const { return shared_ ? comm_.rank() : 0; }
int TensorParallel::size() const { return shared_ ? comm_.size() : 1; }

absl::StatusOr<TensorParallel> TensorParallel::Neighbours(int size) const {
  ANNULUS_CHECK(size > 0 && this->size() % size == 0) << size << " of " << this->size() << " ranks";
  if (size == this->size()) return *this;
  if (size == 1) return TensorParallel();
  std::map<int, TensorParallel>& made = shared_->neighbours;
  if (made.count(size) == 0) {
    Communicator comm = comm_;
    ANNULUS_ASSIGN_OR_RETURN(Communicator group, comm.Split(rank() / size, rank()));
    made.emplace(size, TensorParallel(std::move(group)));
  }
  return made.at(size);
}

std::shared_ptr<Request> TensorParallel::Watch(Request request) const {
  const auto wait_and_delete = [](Request* dropped) {
    if (!dropped->done()) (void)dropped->Wait();
    delete dropped;
  };
  std::shared_ptr<Request> shared(new Request(std::move(request)), wait_and_delete);
  std::vector<std::weak_ptr<Request>>& under_way = shared_->under_way;
  std::erase_if(under_way, [](const auto& other) { return other.expired(); });
  under_way.push_back(shared);
  return shared;
}

void TensorParallel::Poll(const Context& ctx) const {
  // On a GPU completion is not a matter of polling, and a completed request could no longer be waited for in
  // the order of the stream.
  if (!shared_ || ctx.device.kind != DeviceKind::kCpu) return;
  for (const auto& [size, group] : shared_->neighbours) group.Poll(ctx);
  for (const std::weak_ptr<Request>& watched : shared_->under_way) {
    const std::shared_ptr<Request> request = watched.lock();
    // An error shows again where the request is waited for.
    if (request != nullptr && !request->done()) (void)request->Test();
  }
}

absl::StatusOr<PendingTokens> TensorParallel::StartGather(Context& ctx, ConstTensorRef x) const {
  PendingTokens pending;
  pending.all_ = x;
  if (size() == 1) return pending;
  if (sharing_ != nullptr) {
    if (const PendingTokens* shared = sharing_->Find(x)) return *shared;
  }
  const TensorRef all = ctx.scratch.Allocate(x.dtype(), {x.dim(0) * size(), x.dim(1)});
  Communicator comm = comm_;
  ANNULUS_ASSIGN_OR_RETURN(Request request, comm.IAllGather(x, all));
  pending.all_ = all;
  pending.request_ = Watch(std::move(request));
  return pending;
}

absl::StatusOr<ConstTensorRef> TensorParallel::Gather(Context& ctx, ConstTensorRef x) const {
  ANNULUS_ASSIGN_OR_RETURN(PendingTokens pending, StartGather(ctx, x));
  return pending.Finish(ctx);
}

TensorRef TensorParallel::Partial(Context& ctx, TensorRef y) const {
  if (size() == 1) return y;
  if (sharing_ != nullptr && sharing_->IsSum(y)) return sharing_->partial_;
  return ctx.scratch.Allocate(y.dtype(), {y.dim(0) * size(), y.dim(1)});
}

Write TensorParallel::PartialWrite(TensorRef y, Write write) const {
  const SharedTokens* shared = sharing_;
  if (shared != nullptr && shared->IsSum(y) && shared->begun_ > 0) return Write::kAccumulate;
  return size() == 1 ? write : Write::kOverwrite;
}

absl::StatusOr<PendingSum> TensorParallel::StartSum(Context&, TensorRef partial, Write write,
                                                    TensorRef y) const {
  PendingSum pending;
  if (SharedTokens* shared = sharing_; shared != nullptr && shared->IsSum(y)) {
    ANNULUS_CHECK(shared->begun_ < shared->summands_) << "more than " << shared->summands_ << " summands";
    if (++shared->begun_ < shared->summands_) return pending;
  }
  if (size() == 1) {
    ANNULUS_CHECK(partial.raw() == y.raw()) << "partial sums that Partial did not give";
    return pending;
  }
  ANNULUS_CHECK(partial.elements() == y.elements() * size())
      << ToString(partial.shape()) << " -> " << ToString(y.shape());
  TensorRef sum = y;
  if (write == Write::kAccumulate) {
    sum = partial.Rows(rank() * y.dim(0), (rank() + 1) * y.dim(0));
    pending.received_ = sum, pending.result_ = y;
  }
  Communicator comm = comm_;
  ANNULUS_ASSIGN_OR_RETURN(Request request, comm.IReduceScatter(partial, sum));
  pending.request_ = Watch(std::move(request));
  return pending;
}

absl::Status TensorParallel::RowParallelForward(Context& ctx, ConstTensorRef x, ConstTensorRef w, Write write,
                                                TensorRef y) const {
  ArenaScope scope(ctx.scratch);
  const TensorRef partial = Partial(ctx, y);
  ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, x, w, PartialWrite(y, write), partial));
  ANNULUS_ASSIGN_OR_RETURN(PendingSum pending, StartSum(ctx, partial, write, y));
  return pending.Finish(ctx);
}

absl::Status TensorParallel::AllReduce(TensorRef x) const {
  if (size() == 1) return absl::OkStatus();
  Communicator comm = comm_;
  return comm.AllReduce(x, ReduceOp::kSum);
}

SharedTokens::SharedTokens(TensorParallel& tensor) : tensor_(tensor) {
  ANNULUS_CHECK(tensor.sharing_ == nullptr) << "two that share";
  tensor.sharing_ = this;
}

SharedTokens::~SharedTokens() { tensor_.sharing_ = nullptr; }

absl::Status SharedTokens::Gather(Context& ctx, ConstTensorRef x) {
  ANNULUS_ASSIGN_OR_RETURN(PendingTokens tokens, tensor_.StartGather(ctx, x));
  gathered_.push_back({.x = x, .tokens = std::move(tokens)});
  return absl::OkStatus();
}

void SharedTokens::Sum(Context& ctx, TensorRef y, int summands) {
  partial_ = tensor_.Partial(ctx, y);
  y_ = y, summands_ = summands;
}

const PendingTokens* SharedTokens::Find(ConstTensorRef x) const {
  for (const Gathered& gathered : gathered_) {
    if (gathered.x.raw() == x.raw()) return &gathered.tokens;
  }
  return nullptr;
}

}  // namespace annulus
