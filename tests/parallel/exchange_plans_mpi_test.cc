// ranks: 1 2 3 4
// Attention by every exchange plan between processes: forward and backward equal one rank in f64.

#include "parallel/exchange_plan_cases.h"
#include "support/mpi_main.h"

namespace annulus::testing {
namespace {

TEST(MpiExchangePlans, EqualOneRank) {
  Communicator& world = World();
  uint64_t draw = 0;
  for (const MaskCase& mask : kMasks) {
    for (const PlanChoice& choice : AllChoices(world.size(), 8)) {
      ++draw;
      const LayerCase c = MakeCase(mask, kLayouts[draw % std::size(kLayouts)], world.size(), draw);
      SCOPED_TRACE(::testing::Message() << mask.name << ", " << NameOf(c.layout.kind()) << ", "
                                        << NameOf(choice, world.size()) << " on " << world.size());
      AttentionGeometry geometry(c.layout, world, {.forward = {choice}, .backward = {choice}});
      geometry.SetBatch(c.sequences);
      // This rank's rows over those of one rank.
      const WholeLayer<double> expected = OneRank(c);
      WholeLayer<double> got = MakeOutputs<double>(c);
      for (const auto& [whole, one] :
           {std::pair(&got.out, &expected.out), std::pair(&got.lse, &expected.lse),
            std::pair(&got.dq, &expected.dq), std::pair(&got.dkv, &expected.dkv)}) {
        std::copy_n(one->begin(), std::min(one->size(), whole->size()), whole->begin());
      }
      RunRank(c, MakeInputs<double>(c), geometry, &got);
      ExpectSameLayer(got, expected);
    }
  }
}

}  // namespace
}  // namespace annulus::testing
