#include "annulus/model/mixer.h"

namespace annulus {

std::unique_ptr<SequenceMixer> MakeMixer(const MixerArgs& args) {
  switch (args.branch_spec().kind) {
    case BranchKind::kAttention:
      return MakeAttention(args);
    case BranchKind::kLatentAttention:
      return MakeLatentAttention(args);
    case BranchKind::kMamba:
      return MakeMamba(args);
    case BranchKind::kLightning:
      return MakeLightning(args);
    case BranchKind::kBased:
      return MakeBased(args);
    case BranchKind::kDeltaNet:
      return MakeDeltaNet(args);
    case BranchKind::kMlp:
      return MakeMlp(args);
  }
  ANNULUS_CHECK(false) << "branch kind " << static_cast<int>(args.branch_spec().kind);
  return nullptr;
}

}  // namespace annulus
