// The Hopper forward of block attention under emulation, against the naive double reference.

#include "cuda/attention_hopper/forward_check.h"
#include "emulation/emulated_case.h"

namespace annulus::testing {
namespace {

class EmulatedForward : public EmulatedCase {
 protected:
  void Check(const Case& c, int seeds = 2) { CheckBy(CheckForward, c, seeds); }
};

// name, dim, v_dim, q_rows, k_rows, batch, heads, kv_heads, mask, chunks, striped
TEST_P(EmulatedForward, OneRow) { Check({"one", 0, 0, 1, 1, 1, 1, 1}); }
TEST_P(EmulatedForward, Causal) { Check({"causal", 0, 0, 256, 256, 1, 2, 2}); }
TEST_P(EmulatedForward, SeveralKeyTiles) {
  Check({"full, 6 key tiles", 0, 0, 10, 700, 1, 1, 1, Mask::kFull}, 8);
}
TEST_P(EmulatedForward, Tails) { Check({"full tails gqa", 0, 0, 129, 191, 2, 4, 2, Mask::kFull}); }
TEST_P(EmulatedForward, EarlyQueries) {
  Check({"causal early queries", 0, 0, 400, 255, 1, 2, 1, Mask::kCausal, 2});
}
TEST_P(EmulatedForward, Window) { Check({"window, far keys NaN", 0, 0, 140, 600, 2, 2, 1, Mask::kWindow}); }
TEST_P(EmulatedForward, KeysThatNobodySees) {
  Check({"start, far keys NaN", 0, 0, 70, 200, 2, 2, 1, Mask::kStart});
}
// Maxima rise from tile to tile.
TEST_P(EmulatedForward, SteepScores) {
  Case c{"full 2 chunks, steep", 0, 0, 100, 700, 1, 1, 1, Mask::kFull, 2};
  c.spread = 6;
  Check(c);
}
// In every row.
TEST_P(EmulatedForward, RisingScores) { Check(RisingScores(0, 0)); }
TEST_P(EmulatedForward, Documents) {
  Check({"documents 4 chunks", 0, 0, 311, 311, 2, 2, 2, Mask::kDocuments, 4});
}
TEST_P(EmulatedForward, Striped) {
  Check({"window 4 striped", 0, 0, 300, 300, 1, 2, 2, Mask::kWindow, 4, true});
}
TEST_P(EmulatedForward, Random) {
  Check({"random 3 striped", 0, 0, 200, 300, 1, 3, 1, Mask::kRandom, 3, true});
}
TEST_P(EmulatedForward, ManyChunks) {
  Check({"causal 16 chunks", 0, 0, 100, 217, 1, 2, 1, Mask::kCausal, 16});
}

INSTANTIATE_TEST_SUITE_P(Heads, EmulatedForward, AllHeadDims(), NameOf);

}  // namespace
}  // namespace annulus::testing
