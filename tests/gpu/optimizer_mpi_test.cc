// ranks: 1 2 4
//
// The sharded optimizer on GPUs: gradients reduced in place and elsewhere, and its state gathered for a
// checkpoint. Gradients are small integers, so that their sums are exact in any order.

#include <cmath>
#include <cstring>

#include "annulus/comm/gpu_communicator.h"
#include "annulus/device/gpu.h"
#include "support/mpi_main.h"
#include "support/optimizer_step.h"

namespace annulus::testing {
namespace {

Device ThisGpu() {
  ANNULUS_CHECK(GpuCount() > 0) << "this test needs a GPU: " << WhyNoGpu();
  const Device device{DeviceKind::kCuda, World().rank() % GpuCount()};
  ANNULUS_CHECK_OK(UseGpu(device.index));
  return device;
}

float GradientAt(int bucket, int64_t i, int rank) {
  return static_cast<float>((3 * i + bucket + rank) % 7 - 3);
}

float SumAt(int bucket, int64_t i) {
  float sum = 0;
  for (int r = 0; r < World().size(); ++r) sum += GradientAt(bucket, i, r);
  return sum;
}

struct Case {
  GpuLink link;
  DType dtype;
  GradientMemory memory;
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (const GpuLink link : {GpuLink::kHost, GpuLink::kNccl}) {
    if (link == GpuLink::kNccl && World().size() > GpuCount()) continue;  // ranks share a GPU
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      for (const GradientMemory memory : {GradientMemory::kAll, GradientMemory::kTurns})
        cases.push_back({link, dtype, memory});
    }
  }
  return cases;
}

void Reduce(Context& ctx, ParamStore& params, ShardedAdamW& optimizer) {
  ReduceBackward(params, optimizer, [&](int bucket) {
    const int64_t elements = params.table().bucket_elements[static_cast<size_t>(bucket)];
    std::vector<float> host;
    for (int64_t i = 0; i < elements; ++i) host.push_back(GradientAt(bucket, i, World().rank()));
    const TensorRef grads = params.BucketGrads(bucket).Rows(0, elements);
    Upload(ctx, host.data(), grads.bytes(), grads);
  });
}

// After the first update with beta1 = 0.5 the first moment is half of the gradient, exactly.
void ExpectMoments(const ParamStore& params, const GatheredTensors& state) {
  for (const NamedTensor& named : state.tensors) {
    if (named.name.rfind("optim.m.", 0) != 0) continue;
    const ParamInfo& info =
        params.table().params[static_cast<size_t>(params.table().IndexOf(named.name.substr(8)))];
    const float* m = named.tensor.data<float>();
    for (int64_t i = 0; i < named.tensor.elements(); ++i)
      ASSERT_EQ(m[i], 0.5f * SumAt(info.bucket, info.offset + i)) << named.name << " at " << i;
  }
}

void ExpectSame(const GatheredTensors& got, const GatheredTensors& want) {
  ASSERT_EQ(got.tensors.size(), want.tensors.size());
  for (size_t i = 0; i < want.tensors.size(); ++i) {
    const ConstTensorRef a = got.tensors[i].tensor, b = want.tensors[i].tensor;
    EXPECT_EQ(got.tensors[i].name, want.tensors[i].name);
    ASSERT_EQ(a.bytes(), b.bytes());
    EXPECT_EQ(std::memcmp(a.raw(), b.raw(), static_cast<size_t>(a.bytes())), 0) << got.tensors[i].name;
  }
}

TEST(GpuOptimizer, ReducesUpdatesAndIsGathered) {
  for (const Case& c : Cases()) {
    SCOPED_TRACE(::testing::Message() << Name(c.link) << ", " << Name(c.dtype) << ", "
                                      << (c.memory == GradientMemory::kAll ? "all" : "turns"));
    Context ctx(ThisGpu());
    Communicator group = WithGpu(World(), c.link, ctx).value();
    ParamStore params(ctx.device, c.dtype, BuildParamTable(SmallDecoder(4, 4)), group.size(), c.memory);
    OptimSpec spec;
    spec.beta1 = 0.5, spec.beta2 = 0.5, spec.eps = 1e-3;
    ShardedAdamW optimizer(ctx, spec, params, group);
    ANNULUS_CHECK_OK(optimizer.Initialize(9));
    Reduce(ctx, params, optimizer);
    double squares = 0;
    for (int bucket = 0; bucket < params.buckets(); ++bucket) {
      for (int64_t i = 0; i < params.table().bucket_elements[static_cast<size_t>(bucket)]; ++i)
        squares += double{SumAt(bucket, i)} * SumAt(bucket, i);
    }
    EXPECT_DOUBLE_EQ(FinishStep(ctx, optimizer, {.group = group, .lr = 1e-3}), std::sqrt(squares));

    // The least first: what it takes of the scratch memory is all that has been taken of it.
    constexpr int64_t kPieceBytes = 1000;
    const int64_t before = ctx.scratch.high_water_bytes();
    const GatheredTensors in_pieces = optimizer.Gather(kPieceBytes).value();
    EXPECT_LE(ctx.scratch.high_water_bytes(), std::max<int64_t>(before, 1024));
    ExpectMoments(params, in_pieces);
    ExpectSame(optimizer.Gather().value(), in_pieces);
  }
}

}  // namespace
}  // namespace annulus::testing
