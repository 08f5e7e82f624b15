// ranks: 1 2 4
//
// The sharded optimizer on GPUs: gradients reduced in place and elsewhere, and its state gathered for a
// checkpoint. Gradients are small integers, so that their sums are exact in any order.

#include <cmath>
#include <cstring>

#include "annulus/comm/gpu_communicator.h"
#include "annulus/device/gpu.h"
#include "annulus/device/transfer.h"
#include "annulus/ops/elementwise.h"
#include "annulus/train/optimizer.h"
#include "support/mpi_main.h"

namespace annulus::testing {
namespace {

// Buckets of many sizes: their shards start at no round address. One is wide, and tensor-parallel ranks have
// some of most buckets in common.
ModelSpec SmallSpec() {
  const LayerSpec attention{.branches = {{.kind = BranchKind::kAttention}}},
      mlp{.branches = {{.kind = BranchKind::kMlp}}}, mamba{.branches = {{.kind = BranchKind::kMamba}}};
  ModelSpec spec;
  spec.d_model = 20, spec.vocab_size = 51;
  spec.heads = 2, spec.kv_heads = 1, spec.head_dim = 10;
  spec.d_ff = 30;
  spec.mamba = {.heads = 6, .head_dim = 3, .state = 5, .groups = 1};
  spec.tied_head = false;
  spec.layers = {attention, mlp, attention, mamba, attention, mlp, attention};
  return spec;
}

Device ThisGpu() {
  ANNULUS_CHECK(GpuCount() > 0) << "this test needs a GPU: " << WhyNoGpu();
  const Device device{DeviceKind::kCuda, World().rank() % GpuCount()};
  ANNULUS_CHECK_OK(UseGpu(device.index));
  return device;
}

// Of an element of a whole parameter, on a rank of the group that shards the state.
float GradientAt(const std::string& name, int64_t i, int rank) {
  return static_cast<float>((3 * i + static_cast<int64_t>(name.size()) + rank) % 7 - 3);
}
float SumAt(const std::string& name, int64_t i, int ranks) {
  float sum = 0;
  for (int r = 0; r < ranks; ++r) sum += GradientAt(name, i, r);
  return sum;
}

struct Case {
  GpuLink link;
  DType dtype;
  GradientMemory memory;
  int tp;
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (const GpuLink link : {GpuLink::kHost, GpuLink::kNccl}) {
    if (link == GpuLink::kNccl && World().size() > GpuCount()) continue;  // ranks share a GPU
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      for (const GradientMemory memory : {GradientMemory::kAll, GradientMemory::kTurns}) {
        for (const int tp : {1, 2}) {
          if (World().size() % tp == 0) cases.push_back({link, dtype, memory, tp});
        }
      }
    }
  }
  return cases;
}

// What this rank has of a bucket's gradients. Of what every tensor-parallel rank holds, the first has all but
// one, which each of the others has.
std::vector<float> GradientsOf(const ParamTable& table, int bucket, const OptimizerGroups& groups) {
  std::vector<float> host(static_cast<size_t>(table.buckets[static_cast<size_t>(bucket)].elements));
  const float others = static_cast<float>(groups.tensor.size() - 1);
  for (const ParamInfo& info : table.params) {
    if (info.bucket != bucket) continue;
    for (const LogicalRun& run : LogicalRuns(info, 0, info.shape.elements())) {
      for (int64_t i = 0; i < run.elements; ++i) {
        float value = GradientAt(info.name, run.logical + i, groups.shards.rank());
        if (info.parts.empty()) value = groups.tensor.rank() == 0 ? value - others : 1.0f;
        host[static_cast<size_t>(info.offset + run.local + i)] = value;
      }
    }
  }
  return host;
}

// Makes every bucket's gradient as a backward pass does, and starts its reduction.
void Reduce(Context& ctx, ParamStore& params, const OptimizerGroups& groups, ShardedAdamW& optimizer) {
  for (int bucket = params.buckets() - 1; bucket >= 0; --bucket) {
    ANNULUS_CHECK_OK(optimizer.PrepareGradients(bucket));
    const std::vector<float> host = GradientsOf(params.table(), bucket, groups);
    const TensorRef grads = params.BucketGrads(bucket).Rows(0, static_cast<int64_t>(host.size()));
    Upload(ctx, host.data(), grads.bytes(), grads);
    ANNULUS_CHECK_OK(optimizer.StartReduce(bucket));
  }
}

double Norm(Context& ctx, ShardedAdamW& optimizer, OptimizerGroups groups) {
  const Tensor squares(ctx.device, DType::kF64, {1});
  ANNULUS_CHECK_OK(Zero(ctx, squares.ref()));
  ANNULUS_CHECK_OK(optimizer.FinishReduce(squares.ref()));
  ANNULUS_CHECK_OK(groups.shards.AllReduce(squares.ref(), ReduceOp::kSum));
  ANNULUS_CHECK_OK(groups.tensor.AllReduce(squares.ref()));
  double sum = 0;
  Download(ctx, squares.ref(), &sum);
  return std::sqrt(sum);
}
double ExpectedNorm(int ranks) {
  double squares = 0;
  for (const ParamInfo& info : BuildParamTable(SmallSpec()).params) {
    for (int64_t i = 0; i < info.logical.elements(); ++i) {
      squares += double{SumAt(info.name, i, ranks)} * SumAt(info.name, i, ranks);
    }
  }
  return std::sqrt(squares);
}

// After the first update with beta1 = 0.5 the first moment is half of the gradient, exactly.
void ExpectMoments(const GatheredTensors& state, int ranks) {
  for (const NamedTensor& named : state.tensors) {
    if (named.name.rfind("optim.m.", 0) != 0) continue;
    const std::string name = named.name.substr(8);
    const float* m = named.tensor.data<float>();
    for (int64_t i = 0; i < named.tensor.elements(); ++i)
      ASSERT_EQ(m[i], 0.5f * SumAt(name, i, ranks)) << named.name << " at " << i;
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

OptimizerGroups GroupsOn(const Case& c, Context& ctx) {
  const int rank = World().rank();
  const auto group = [&](int color, const char* lane) {
    return WithGpu(World().Split(color, rank).value(), c.link, ctx, lane).value();
  };
  return {.shards = group(rank % c.tp, "shards"), .tensor = TensorParallel(group(rank / c.tp, "tensor"))};
}

TEST(GpuOptimizer, ReducesUpdatesAndIsGathered) {
  for (const Case& c : Cases()) {
    SCOPED_TRACE(::testing::Message() << Name(c.link) << ", " << Name(c.dtype) << ", tp " << c.tp << ", "
                                      << (c.memory == GradientMemory::kAll ? "all" : "turns"));
    Context ctx(ThisGpu());
    const OptimizerGroups groups = GroupsOn(c, ctx);
    const int ranks = groups.shards.size();
    const TensorShard shard{.rank = groups.tensor.rank(), .size = c.tp};
    ParamStore params(ctx.device, c.dtype, BuildParamTable(SmallSpec(), shard), ranks, c.memory);
    OptimSpec spec;
    spec.beta1 = 0.5, spec.beta2 = 0.5, spec.eps = 1e-3;
    ShardedAdamW optimizer(ctx, spec, SmallSpec(), params, groups);
    ANNULUS_CHECK_OK(optimizer.Initialize(9));
    Reduce(ctx, params, groups, optimizer);
    EXPECT_DOUBLE_EQ(Norm(ctx, optimizer, groups), ExpectedNorm(ranks));
    const double one = 1;
    const Tensor scale(ctx.device, DType::kF64, {1});
    Upload(ctx, &one, sizeof(one), scale.ref());
    ANNULUS_CHECK_OK(optimizer.Update(1, 1e-3, scale.ref()));

    // The least first: what it takes of the scratch memory is all that has been taken of it.
    constexpr int64_t kPieceBytes = 1000;
    const int64_t before = ctx.scratch.high_water_bytes();
    const GatheredTensors in_pieces = optimizer.Gather(kPieceBytes).value();
    EXPECT_LE(ctx.scratch.high_water_bytes(), std::max<int64_t>(before, 1024));
    ExpectMoments(in_pieces, ranks);
    ExpectSame(optimizer.Gather().value(), in_pieces);
  }
}

// Wide parameters are their own masters: the state has m and v of them, of others the parameter as well.
TEST(GpuOptimizer, HasNoSecondCopyOfWideParameters) {
  Context ctx(ThisGpu());
  Communicator group = WithGpu(World(), GpuLink::kHost, ctx).value();
  ParamStore params(ctx.device, DType::kBF16, BuildParamTable(SmallSpec()), group.size());
  const ShardedAdamW optimizer(ctx, {}, SmallSpec(), params, {.shards = group});
  int64_t copies = 0;
  for (int bucket = 0; bucket < params.buckets(); ++bucket) {
    const bool wide = params.table().buckets[static_cast<size_t>(bucket)].wide;
    const TensorRef values = params.BucketValues(bucket);
    EXPECT_EQ(values.dtype(), wide ? DType::kF32 : DType::kBF16);
    copies += (wide ? 2 : 3) * values.elements();
  }
  EXPECT_EQ(optimizer.state_bytes() * group.size(), copies * SizeOf(DType::kF32));
}

}  // namespace
}  // namespace annulus::testing
