// The Hopper backward of block attention under emulation, against the naive double reference.

#include "cuda/attention_hopper/backward_check.h"
#include "emulation/emulated_case.h"

namespace annulus::testing {
namespace {

class EmulatedBackward : public EmulatedCase {
 protected:
  void Check(const Case& c, int seeds = 2) {
    emulation::SetMultiprocessors(3);
    CheckBy(CheckBackward, c, seeds);
  }
};

// name, dim, v_dim, q_rows, k_rows, batch, heads, kv_heads, mask, chunks, striped
TEST_P(EmulatedBackward, OneRow) { Check({"one", 0, 0, 1, 1, 1, 1, 1}); }
TEST_P(EmulatedBackward, Causal) { Check({"causal", 0, 0, 384, 384, 1, 2, 2}); }
TEST_P(EmulatedBackward, Tails) { Check({"full tails gqa", 0, 0, 129, 191, 2, 4, 2, Mask::kFull}); }
TEST_P(EmulatedBackward, EarlyQueries) {
  Check({"causal early queries", 0, 0, 400, 255, 1, 2, 1, Mask::kCausal, 2});
}
TEST_P(EmulatedBackward, Window) { Check({"window, far keys NaN", 0, 0, 140, 600, 2, 2, 1, Mask::kWindow}); }
TEST_P(EmulatedBackward, Documents) {
  Check({"documents 4 chunks", 0, 0, 311, 311, 2, 2, 2, Mask::kDocuments, 4});
}
TEST_P(EmulatedBackward, Striped) {
  Check({"window 4 striped", 0, 0, 300, 300, 1, 2, 2, Mask::kWindow, 4, true});
}
TEST_P(EmulatedBackward, Random) {
  Check({"random 3 striped", 0, 0, 200, 300, 1, 3, 1, Mask::kRandom, 3, true});
}
TEST_P(EmulatedBackward, KeysShared) {
  Check({"full mqa, keys shared", 0, 0, 300, 100, 1, 8, 1, Mask::kFull});
}

INSTANTIATE_TEST_SUITE_P(Heads, EmulatedBackward, AllHeadDims(), NameOf);

}  // namespace
}  // namespace annulus::testing
