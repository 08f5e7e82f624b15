#pragma once

// Cases of block attention under emulation, for each of the head dims that Hopper's kernels know.

#include <gtest/gtest.h>

#include "cuda/attention_mma/cases.h"
#include "emulation/block.h"

namespace annulus::testing {

struct HeadDims {
  int64_t dim, v_dim;
};

class EmulatedCase : public ::testing::TestWithParam<HeadDims> {
 protected:
  // `check` with the case's dims. Several seeds are several orders of what runs side by side.
  void CheckBy(bool (*check)(Prepared&), Case c, int seeds) {
    c.dim = GetParam().dim;
    c.v_dim = GetParam().v_dim;
    for (int seed = 0; seed < seeds; ++seed) {
      emulation::SetSeed(static_cast<uint32_t>(seed));
      Prepared prepared = Prepare<bf16>(c, static_cast<uint32_t>(seed));
      EXPECT_TRUE(check(prepared)) << c.name << ", seed " << seed;
    }
  }
};

inline auto AllHeadDims() {
  return ::testing::Values(HeadDims{64, 64}, HeadDims{128, 128}, HeadDims{192, 128});
}
inline std::string NameOf(const ::testing::TestParamInfo<HeadDims>& info) {
  return "Dim" + std::to_string(info.param.dim);
}

}  // namespace annulus::testing
