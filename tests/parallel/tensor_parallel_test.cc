#include "annulus/parallel/tensor_parallel.h"

#include <gtest/gtest.h>

#include "annulus/base/random.h"
#include "support/loopback.h"

namespace annulus::testing {
namespace {

constexpr int64_t kColumns = 3;

// Small integers: sums are exact, whatever their order.
Tensor Integers(const std::string& name, Shape shape) {
  Tensor tensor(Device{}, DType::kF64, shape);
  const RandomStream random(3, name);
  for (int64_t i = 0; i < shape.elements(); ++i) {
    tensor.ref().data<double>()[i] = static_cast<double>(random.Below(static_cast<uint64_t>(i), 17)) - 8;
  }
  return tensor;
}
std::vector<double> Values(ConstTensorRef t) { return {t.data<double>(), t.data<double>() + t.elements()}; }
double Dot(ConstTensorRef a, ConstTensorRef b) {
  double sum = 0;
  for (int64_t i = 0; i < a.elements(); ++i) sum += a.data<double>()[i] * b.data<double>()[i];
  return sum;
}
// Rows of rank `rank` out of those of all `size` ranks.
ConstTensorRef Share(const Tensor& all, int rank, int size) {
  const int64_t rows = all.ref().dim(0) / size;
  return all.ref().Rows(rank * rows, (rank + 1) * rows);
}

// fn(tensor parallel group, context) on every rank of groups of 1 to 4.
void OnGroups(const std::function<void(TensorParallel&, Context&)>& fn) {
  for (int size = 1; size <= 4; ++size) {
    OnLoopback(size, [&](Communicator comm) {
      TensorParallel tensor(comm);
      Context ctx{Device{}};
      EXPECT_EQ(tensor.size(), size);
      EXPECT_EQ(tensor.rank(), comm.rank());
      fn(tensor, ctx);
    });
  }
}

TEST(TensorParallel, GathersTokensInOrderOfRanks) {
  OnGroups([](TensorParallel& tensor, Context& ctx) {
    const Tensor all = Integers("x", {2 * tensor.size(), kColumns});
    const ConstTensorRef gathered = tensor.Gather(ctx, Share(all, tensor.rank(), tensor.size())).value();
    EXPECT_EQ(gathered.shape(), all.ref().shape());
    EXPECT_EQ(Values(gathered), Values(all.ref()));
  });
}

// Ranks 0 1 | 2 3 of four: each pair gathers its own.
TEST(TensorParallel, NeighboursAreAGroup) {
  OnGroups([](TensorParallel& tensor, Context& ctx) {
    const Tensor all = Integers("x", {2 * tensor.size(), kColumns});
    for (int size = 1; size <= tensor.size(); ++size) {
      if (tensor.size() % size != 0) continue;
      for (int time = 0; time < 2; ++time) {  // made, and found again
        const TensorParallel group = tensor.Neighbours(size).value();
        EXPECT_EQ(group.size(), size);
        EXPECT_EQ(group.rank(), tensor.rank() % size);
        const int first = tensor.rank() / size * size;
        const ConstTensorRef gathered = group.Gather(ctx, Share(all, tensor.rank(), tensor.size())).value();
        EXPECT_EQ(Values(gathered), Values(all.ref().Rows(2 * first, 2 * (first + size))));
      }
    }
  });
}

TEST(TensorParallel, SumsAreScatteredAndAdded) {
  OnGroups([](TensorParallel& tensor, Context& ctx) {
    const int size = tensor.size();
    for (const Write write : {Write::kOverwrite, Write::kAccumulate}) {
      const Tensor before = Integers("y", {2, kColumns});
      const Tensor y = Integers("y", {2, kColumns});
      std::vector<double> want = Values(before.ref());
      if (write == Write::kOverwrite) want.assign(want.size(), 0);
      for (int r = 0; r < size; ++r) {
        const Tensor of_rank = Integers(absl::StrCat("partial", r), {2 * size, kColumns});
        const std::vector<double> mine = Values(Share(of_rank, tensor.rank(), size));
        for (size_t i = 0; i < want.size(); ++i) want[i] += mine[i];
      }
      ArenaScope scope(ctx.scratch);
      const Tensor own = Integers(absl::StrCat("partial", tensor.rank()), {2 * size, kColumns});
      const TensorRef partial = tensor.Partial(ctx, y.ref());
      EXPECT_EQ(partial.shape(), own.ref().shape());
      const bool add = tensor.PartialWrite(y.ref(), write) == Write::kAccumulate;
      EXPECT_EQ(add, write == Write::kAccumulate && size == 1);
      for (int64_t i = 0; i < partial.elements(); ++i) {
        double& to = partial.data<double>()[i];
        to = (add ? to : 0) + own.ref().data<double>()[i];
      }
      PendingSum sum = tensor.StartSum(ctx, partial, write, y.ref()).value();
      ANNULUS_CHECK_OK(sum.Finish(ctx));
      EXPECT_EQ(Values(y.ref()), want) << size;
    }
  });
}

// <Gather x, z> over all ranks is <x, Sum z>: either is the backward of the other.
TEST(TensorParallel, GatherAndSumAreAdjoint) {
  OnGroups([](TensorParallel& tensor, Context& ctx) {
    const int size = tensor.size();
    const Tensor x = Integers(absl::StrCat("x", tensor.rank()), {2, kColumns});
    const Tensor z = Integers(absl::StrCat("z", tensor.rank()), {2 * size, kColumns});
    const double gathered = Dot(tensor.Gather(ctx, x.ref()).value(), z.ref());
    const Tensor y(Device{}, DType::kF64, {2, kColumns});
    const TensorRef partial = tensor.Partial(ctx, y.ref());
    std::copy_n(z.ref().data<double>(), z.ref().elements(), partial.data<double>());
    PendingSum sum = tensor.StartSum(ctx, partial, Write::kOverwrite, y.ref()).value();
    ANNULUS_CHECK_OK(sum.Finish(ctx));
    const Tensor dots(Device{}, DType::kF64, {2});
    dots.ref().data<double>()[0] = gathered;
    dots.ref().data<double>()[1] = Dot(x.ref(), y.ref());
    ANNULUS_CHECK_OK(tensor.AllReduce(dots.ref()));
    EXPECT_EQ(dots.ref().data<double>()[0], dots.ref().data<double>()[1]);
    EXPECT_NE(dots.ref().data<double>()[0], 0);
  });
}

TEST(TensorParallel, RowParallelProductIsTheWholeOne) {
  constexpr int64_t kIn = 12, kOut = 5;
  OnGroups([](TensorParallel& tensor, Context& ctx) {
    const int size = tensor.size();
    const int64_t tokens = 2 * size, share = kIn / size;
    const Tensor x = Integers("x", {tokens, kIn}), w = Integers("w", {kOut, kIn});
    const Tensor own_x(Device{}, DType::kF64, {tokens, share}), own_w(Device{}, DType::kF64, {kOut, share});
    const auto take = [&](const Tensor& from, const Tensor& to) {
      for (int64_t i = 0; i < to.ref().elements(); ++i) {
        to.ref().data<double>()[i] =
            from.ref().data<double>()[i / share * kIn + tensor.rank() * share + i % share];
      }
    };
    take(x, own_x), take(w, own_w);
    const Tensor want = Integers("y", {tokens, kOut}), y = Integers("y", {tokens, kOut});
    ANNULUS_CHECK_OK(LinearForward(ctx, x.ref(), w.ref(), Write::kAccumulate, want.ref()));
    const TensorRef mine = y.ref().Rows(2 * tensor.rank(), 2 * tensor.rank() + 2);
    ANNULUS_CHECK_OK(tensor.RowParallelForward(ctx, own_x.ref(), own_w.ref(), Write::kAccumulate, mine));
    EXPECT_EQ(Values(mine), Values(Share(want, tensor.rank(), size)));
  });
}

// Several at once, finished in another order than they were started in, and polled in between.
TEST(TensorParallel, SeveralAreUnderWayAtOnce) {
  OnGroups([](TensorParallel& tensor, Context& ctx) {
    const int size = tensor.size();
    const Tensor a = Integers("a", {2 * size, kColumns}), b = Integers("b", {3 * size, kColumns});
    PendingTokens first = tensor.StartGather(ctx, Share(a, tensor.rank(), size)).value();
    PendingTokens second = tensor.StartGather(ctx, Share(b, tensor.rank(), size)).value();
    tensor.Poll(ctx);
    EXPECT_EQ(Values(second.Finish(ctx).value()), Values(b.ref()));
    EXPECT_EQ(Values(first.Finish(ctx).value()), Values(a.ref()));
    tensor.Poll(ctx);
  });
}

TEST(TensorParallel, WhatIsDroppedIsWaitedFor) {
  OnGroups([](TensorParallel& tensor, Context& ctx) {
    const Tensor a = Integers("a", {2 * tensor.size(), kColumns});
    {
      PendingTokens dropped = tensor.StartGather(ctx, Share(a, tensor.rank(), tensor.size())).value();
    }
    EXPECT_EQ(Values(tensor.Gather(ctx, Share(a, tensor.rank(), tensor.size())).value()), Values(a.ref()));
  });
}

// Two callers get the same tokens, and what each adds comes out of one sum; afterwards each has its own
// again.
TEST(TensorParallel, CallersSideBySideShareGathersAndSums) {
  OnGroups([](TensorParallel& tensor, Context& ctx) {
    const int size = tensor.size();
    const Tensor x = Integers("x", {2 * size, kColumns}), y = Integers("y", {2, kColumns});
    std::vector<double> want = Values(y.ref());
    for (int r = 0; r < size; ++r) {
      for (const char* summand : {"first", "second"}) {
        const Tensor of_rank = Integers(absl::StrCat(summand, r), {2 * size, kColumns});
        const std::vector<double> mine = Values(Share(of_rank, tensor.rank(), size));
        for (size_t i = 0; i < want.size(); ++i) want[i] += mine[i];
      }
    }
    const ConstTensorRef own = Share(x, tensor.rank(), size);
    ArenaScope scope(ctx.scratch);
    {
      SharedTokens shared(tensor);
      ANNULUS_CHECK_OK(shared.Gather(ctx, own));
      shared.Sum(ctx, y.ref(), 2);
      const ConstTensorRef first = tensor.Gather(ctx, own).value(), second = tensor.Gather(ctx, own).value();
      EXPECT_EQ(first.raw(), second.raw());
      EXPECT_EQ(Values(second), Values(x.ref()));
      for (const char* summand : {"first", "second"}) {
        const Tensor of_rank = Integers(absl::StrCat(summand, tensor.rank()), {2 * size, kColumns});
        const TensorRef partial = tensor.Partial(ctx, y.ref());
        const bool add = tensor.PartialWrite(y.ref(), Write::kAccumulate) == Write::kAccumulate;
        EXPECT_EQ(add, size == 1 || std::string(summand) == "second");
        for (int64_t i = 0; i < partial.elements(); ++i) {
          double& to = partial.data<double>()[i];
          to = (add ? to : 0) + of_rank.ref().data<double>()[i];
        }
        PendingSum sum = tensor.StartSum(ctx, partial, Write::kAccumulate, y.ref()).value();
        ANNULUS_CHECK_OK(sum.Finish(ctx));
      }
      EXPECT_EQ(Values(y.ref()), want);
    }
    EXPECT_EQ(tensor.Gather(ctx, own).value().raw() == tensor.Gather(ctx, own).value().raw(), size == 1);
  });
}

TEST(TensorParallel, OneRankMovesNothing) {
  TensorParallel none;
  Context ctx{Device{}};
  const Tensor x = Integers("x", {4, kColumns});
  EXPECT_EQ(none.size(), 1);
  EXPECT_EQ(none.rank(), 0);
  EXPECT_EQ(none.Gather(ctx, x.ref()).value().raw(), x.ref().raw());
  EXPECT_EQ(none.Partial(ctx, x.ref()).raw(), x.ref().raw());
  ANNULUS_CHECK_OK(none.AllReduce(x.ref()));
  EXPECT_EQ(ctx.scratch.high_water_bytes(), 0);
  const Tensor other = Integers("x", {4, kColumns});
  EXPECT_DEATH((void)none.StartSum(ctx, other.ref(), Write::kOverwrite, x.ref()),
               "that Partial did not give");
  SharedTokens shared(none);
  shared.Sum(ctx, x.ref(), 1);
  ANNULUS_CHECK_OK(none.StartSum(ctx, x.ref(), Write::kOverwrite, x.ref()).status());
  EXPECT_DEATH((void)none.StartSum(ctx, x.ref(), Write::kOverwrite, x.ref()), "more than 1 summands");
}

}  // namespace
}  // namespace annulus::testing
