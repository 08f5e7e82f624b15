#pragma once

// What any plan of a choice takes at least, in time that does not grow with the steps of the plan: for
// searches in which most plans are never built.

#include "annulus/parallel/choose_plan.h"

namespace annulus {

struct PlanBound {
  // Of the rank that takes longest. It computes its share of the pairs, in calls of no more than a pair of
  // blocks, which do not get faster by the pair than the machine's fastest kernel at that size. In rings each
  // of its few slots takes one block after the other: waits for its message, then for the computing on it.
  double seconds = 0;
  // That come to a host from others, in the mean over hosts. Where queries stay, the keys and values that any
  // query of the host sees come once at least, and where those stay, the queries; results go back.
  double host_bytes = 0;
};

// host_bytes are 0, which is always true, where they are not known: of balanced plans and meshes, where heads
// are shared out between hosts or hosts not filled alike, of masked documents.
PlanBound BoundOfChoice(const AttentionCase& layer, Pass pass, const PlanChoice& choice,
                        TransportKind transport, const MachineProfile& machine);

}  // namespace annulus
