#include "annulus/train/measure.h"

#include <algorithm>
#include <vector>

#include "annulus/base/random.h"
#include "annulus/device/stream_timer.h"
#include "annulus/device/transfer.h"
#include "annulus/ops/elementwise.h"
#include "run_directory.h"

namespace annulus {

absl::StatusOr<TensorRef> RandomTensor(Context& ctx, Arena& arena, DType dtype, const Shape& shape,
                                       uint64_t seed) {
  // A block of a million values, repeated: drawing billions would take longer than what is measured.
  constexpr int64_t kBlock = int64_t{1} << 20;
  const TensorRef tensor = arena.Allocate(dtype, shape);
  const DType wide = AccumOf(dtype);
  const TensorRef flat = tensor.Reshaped({shape.elements()});
  const Tensor host(Device{}, wide, {std::min(kBlock, shape.elements())});
  const RandomStream random(seed, "bench");
  VisitFloat(wide, [&]<class T>() {
    T* values = host.ref().data<T>();
    for (int64_t i = 0; i < host.ref().elements(); ++i) {
      values[i] = static_cast<T>(random.Normal(static_cast<uint64_t>(i)));
    }
  });
  ArenaScope scope(ctx.scratch);
  const TensorRef block = ctx.scratch.Allocate(wide, host.ref().shape());
  Upload(ctx, host.ref().raw(), host.ref().bytes(), block);
  for (int64_t begin = 0; begin < flat.elements(); begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, flat.elements());
    ANNULUS_RETURN_IF_ERROR(Cast(ctx, block.Rows(0, end - begin), flat.Rows(begin, end)));
  }
  return tensor;
}

absl::StatusOr<double> SecondsOf(Context& ctx, Communicator world, const Repeats& repeats,
                                 const std::function<absl::Status()>& call) {
  StreamTimer timer(ctx);
  std::vector<double> seconds;
  double total = 0;
  for (int64_t i = -repeats.warm_ups; i < repeats.timed; ++i) {
    if (i >= 2 && total >= repeats.seconds) break;  // on all ranks: they agree on what each took
    // With the time: a watchdog sees by it that another one began (Progress::kReports).
    ctx.recorder.Note("measurement",
                      absl::StrCat("run ", i + repeats.warm_ups + 1, " at ", UtcNow("%H:%M:%S")), nullptr);
    ctx.lane.Synchronize();
    ANNULUS_RETURN_IF_ERROR(world.Barrier());
    timer.Begin();
    absl::Status status;
    for (int64_t k = 0; k < repeats.calls && status.ok(); ++k) status = call();
    const double here = timer.Seconds() / static_cast<double>(repeats.calls);
    ANNULUS_RETURN_IF_ERROR(world.AgreeOk(status));
    ANNULUS_ASSIGN_OR_RETURN(const double took, world.AllReduceValue(here, ReduceOp::kMax));
    if (i < 0) continue;
    seconds.push_back(repeats.slowest == Slowest::kByMedian ? here : took);
    total += took * static_cast<double>(repeats.calls);
  }
  const auto median = seconds.begin() + static_cast<std::ptrdiff_t>(seconds.size() / 2);
  std::nth_element(seconds.begin(), median, seconds.end());
  return world.AllReduceValue(*median, ReduceOp::kMax);
}

}  // namespace annulus
