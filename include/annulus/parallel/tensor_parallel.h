#pragma once

// Tensor parallelism with split tokens (Korthikanti et al., 2022): between matrix products each rank of the
// group holds 1 / size of the tokens; before products whose outputs are split it gathers them, and the sums
// after products whose inputs are split come back scattered. The backward of either is the other.
//
//   x [tokens / t, d] --Gather--> [tokens, d] --w[out/t]--> heads/t ... --w[:, in/t]--> partial --Sum--> y
//
// One rank: every call is the identity and moves nothing.
//
// What is under way moves along while the rank computes: on CPUs by being polled, from ctx.progress. What is
// dropped before it is finished, after an error, is waited for: its memory is about to be used again.

#include <memory>
#include <vector>

#include "annulus/comm/communicator.h"
#include "annulus/device/context.h"
#include "annulus/ops/linear.h"

namespace annulus {

// Sums on their way. Finish returns once the result may be used, and the partial sums overwritten.
class PendingSum {
 public:
  PendingSum() = default;
  absl::Status Finish(Context& ctx);

 private:
  friend class TensorParallel;
  std::shared_ptr<Request> request_;  // null: complete
  TensorRef received_, result_;       // received_: where the sum is added to result_
};

// Gathered tokens on their way.
class PendingTokens {
 public:
  PendingTokens() = default;
  absl::StatusOr<ConstTensorRef> Finish(Context& ctx);

 private:
  friend class TensorParallel;
  std::shared_ptr<Request> request_;  // null: complete
  ConstTensorRef all_;
};

class SharedTokens;

class TensorParallel {
 public:
  TensorParallel() = default;  // one rank
  explicit TensorParallel(Communicator tp);

  int rank() const;
  int size() const;
  const Communicator& comm() const { return comm_; }  // none for TensorParallel()

  // The group of `size` neighbouring ranks, from a multiple of it on, that this one belongs to; this group
  // for all of them. Made at first use: collective then.
  absl::StatusOr<TensorParallel> Neighbours(int size) const;

  // x: [tokens / size, columns] of every rank -> [tokens, columns], in memory of ctx.scratch; x on one rank.
  absl::StatusOr<PendingTokens> StartGather(Context& ctx, ConstTensorRef x) const;
  absl::StatusOr<ConstTensorRef> Gather(Context& ctx, ConstTensorRef x) const;

  // Where partial sums for `y` [tokens / size, columns] are to be written: [tokens, columns] in ctx.scratch,
  // y itself on one rank.
  TensorRef Partial(Context& ctx, TensorRef y) const;
  // How, where the sum is to be written to `y` in the way `write`: products of one rank go straight there.
  Write PartialWrite(TensorRef y, Write write) const;
  // y (=, +=) this rank's tokens of the sum over ranks of `partial`, which Partial gave.
  absl::StatusOr<PendingSum> StartSum(Context& ctx, TensorRef partial, Write write, TensorRef y) const;

  // y (=, +=) this rank's tokens of sum over ranks of x w^T.   x: [tokens, in / size]   w: [out, in / size]
  absl::Status RowParallelForward(Context& ctx, ConstTensorRef x, ConstTensorRef w, Write write,
                                  TensorRef y) const;
  // In place, on every rank.
  absl::Status AllReduce(TensorRef x) const;

  // Moves along what is under way; for ctx.progress.
  void Poll(const Context& ctx) const;

 private:
  friend class SharedTokens;
  struct Shared;  // by all copies
  std::shared_ptr<Request> Watch(Request request) const;

  Communicator comm_;
  std::shared_ptr<Shared> shared_;   // null with one rank
  SharedTokens* sharing_ = nullptr;  // while there is one
};

// What callers side by side have in common, as the branches of one layer do: as long as this lives, each of
// the tensors named here is gathered once for all who gather it, and what several add to one tensor is summed
// over the group once, with the last of them. In memory of ctx.scratch, which must outlive this.
//
//   SharedTokens shared(tensor);
//   shared.Gather(ctx, x), shared.Sum(ctx, y, 2);
//   tensor.Gather(ctx, x) ... tensor.RowParallelForward(ctx, h, w, Write::kAccumulate, y);  // twice
class SharedTokens {
 public:
  explicit SharedTokens(TensorParallel& tensor);
  ~SharedTokens();
  SharedTokens(const SharedTokens&) = delete;
  SharedTokens& operator=(const SharedTokens&) = delete;

  // Starts to gather x.
  absl::Status Gather(Context& ctx, ConstTensorRef x);
  // The next `summands` sums for y are one.
  void Sum(Context& ctx, TensorRef y, int summands);

 private:
  friend class TensorParallel;
  struct Gathered {
    ConstTensorRef x;
    PendingTokens tokens;
  };
  const PendingTokens* Find(ConstTensorRef x) const;
  bool IsSum(TensorRef y) const { return y_.defined() && y_.raw() == y.raw(); }

  TensorParallel& tensor_;
  std::vector<Gathered> gathered_;
  TensorRef y_, partial_;
  int summands_ = 0, begun_ = 0;
};

}  // namespace annulus
