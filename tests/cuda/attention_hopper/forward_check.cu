#include "cuda/attention_hopper/forward_check.h"
#include "cuda/attention_mma/block_check.h"
#include "kernels/attention/attention_hopper.h"

namespace annulus::testing {
namespace {

using kernels::HopperAttentionBlock;

cudaError_t Forward(const HopperAttentionBlock& block, const kernels::HopperAttentionPartial& partial,
                    cudaStream_t stream) {
  const DeviceArray<char> workspace(kernels::HopperAttentionForwardWorkspaceBytes(block));
  const cudaError_t error = kernels::HopperAttentionForward(block, partial, workspace.data, stream);
  return error == cudaSuccess ? cudaDeviceSynchronize() : error;
}

const Implementation<bf16> kHopper{"hopper", Forward, {}};

// All keys in one call, out of and into arrays with gaps.
bool CheckWhole(Prepared& prepared) {
  const Case& c = prepared.c;
  const Problem& p = prepared.p;
  StridedHeads<bf16> q(c.q_rows, c.batch, c.heads * c.dim, c.far),
      k(c.k_rows, c.batch, c.kv_heads * c.dim, c.far), v(c.k_rows, c.batch, c.kv_heads * c.v_dim, c.far),
      out(c.q_rows, c.batch, c.heads * c.v_dim, c.far);
  q.Upload(Convert<bf16>(p.q));
  k.Upload(Convert<bf16>(p.k));
  v.Upload(Convert<bf16>(p.v));
  out.Upload(std::vector<bf16>(Size(c.q_rows * c.batch * c.heads * c.v_dim), FromDouble<bf16>(NAN)));
  const GuardedArray<float> lse(std::vector<float>(Size(c.q_rows * c.batch * c.heads), NAN));
  const DeviceArray<int64_t> lo(prepared.lo), hi(prepared.hi);
  HopperAttentionBlock block = BlockOfCase<bf16>(prepared, lo.data, hi.data);
  block.q = q.Heads<const bf16>();
  block.k = k.Heads<const bf16>();
  block.v = v.Heads<const bf16>();
  const DeviceArray<char> workspace(kernels::HopperAttentionForwardWorkspaceBytes(block));
  CUDA(kernels::HopperAttentionForwardWhole(block, out.Heads<bf16>(), lse.data(), workspace.data, nullptr));
  CUDA(cudaDeviceSynchronize());
  Comparison comparison;
  bool intact = true;
  std::vector<double> rounded = prepared.naive.out;
  for (double& x : rounded) x = RoundTo<bf16>(x);
  comparison.Compare("O", Doubles(out.Download(&intact)), prepared.exact.out, rounded);
  comparison.Compare("LSE", Doubles(lse.Download(&intact)), prepared.exact.lse, prepared.naive.lse);
  comparison.Require(intact, "guards");
  std::printf("%s whole  %3ld/%-3ld %-24s%s\n", comparison.ok ? "ok  " : "FAIL", long(c.dim), long(c.v_dim),
              c.name, comparison.text.c_str());
  return comparison.ok;
}

}  // namespace

bool CheckForward(Prepared& prepared) {
  const bool carried = BlockCheck<bf16>(kHopper, prepared).Run();
  return CheckWhole(prepared) && carried;
}

}  // namespace annulus::testing
