#pragma once

// Parts of CostOf, for those who price one plan on several transports.

#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "annulus/parallel/choose_plan.h"

namespace annulus {

// Of one (query, key) pair of a head: scores and values; backward five products.
double FlopsPerPair(Pass pass, int64_t head_dim, int64_t v_head_dim);

// Bytes of one row of each of a plan's slots, all fields together.
class RowBytes {
 public:
  // Of slots of all ranks, or of some.
  RowBytes(const AttentionCase& layer, const ExchangePlan& plan) : RowBytes(layer, plan, plan.ranks) {}
  RowBytes(const AttentionCase& layer, const ExchangePlan& plan, absl::Span<const RankPlan> ranks);
  int64_t Of(const SlotSpec& slot) const;

 private:
  using Key = std::tuple<Payload, int, Width>;
  static Key KeyOf(const SlotSpec& slot) { return {slot.payload, slot.group, slot.width}; }
  std::map<Key, int64_t> bytes_;
};

// The latents of so many rows for so many heads, and the dtype that gradients of keys and values come in.
struct Expansion {
  int64_t rows = 0, heads = 0;
  DType gradients = DType::kF32;
};
// Of expanding latents of a layer that has them: the product, and laying keys and values out; backward also
// what their gradients take.
double ExpansionSeconds(const AttentionCase& layer, Pass pass, const Expansion& expansion,
                        const MachineProfile& machine);

// [rank][step], 0 for transfers. What the layer does to its own tensors before and after the exchange is
// counted with a rank's first and last computing step.
std::vector<std::vector<double>> ComputeSecondsOf(const AttentionCase& layer, const ExchangePlan& plan,
                                                  const MachineProfile& machine);

// Sets what computing takes. seconds: ComputeSecondsOf the plan.
using StepSeconds = std::vector<std::vector<double>>;
void SetComputing(const AttentionCase& layer, const ExchangePlan& plan, const MachineProfile& machine,
                  TransportKind transport, LinkThrottle throttle, std::shared_ptr<const StepSeconds> seconds,
                  ExchangeCost* cost);

// InvalidArgument where the machine has no rates of messages between so many ranks by the transport.
absl::Status CheckLinks(const MachineProfile& machine, TransportKind transport, int ranks);

// Of a message of so many bytes alone, from when both ends are ready.
struct MessageTime {
  double overhead = 0, moving = 0, latency = 0;
  double seconds() const { return overhead + moving + latency; }
};
// In a plan of so many ranks: on the faster of its links, or between hosts. 0: not known.
MessageTime LeastMessageTime(const MachineProfile& machine, TransportKind transport, int ranks, double bytes,
                             bool between_hosts);

// All of the cost but computing. Ranks stand on hosts as machine.network says.
ExchangeCost MessageCostOf(const AttentionCase& layer, const ExchangePlan& plan,
                           const MachineProfile& machine, TransportKind transport, LinkThrottle throttle);

}  // namespace annulus
