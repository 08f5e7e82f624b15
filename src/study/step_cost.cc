#include "annulus/study/step_cost.h"

namespace annulus {

const char* Name(StageKind kind) {
  switch (kind) {
    case StageKind::kCompute:
      return "compute";
    case StageKind::kExchange:
      return "exchange";
    case StageKind::kStates:
      return "states";
    case StageKind::kTensorGather:
      return "tensor gather";
    case StageKind::kTensorScatter:
      return "tensor scatter";
  }
  return "";
}

}  // namespace annulus
