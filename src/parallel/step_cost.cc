// Time of a plan's computing steps: what plan_compute.cc and context_attention.cc do, priced by the machine's
// rates.

#include <algorithm>
#include <array>
#include <cstdlib>
#include <map>

#include "annulus/base/check.h"
#include "annulus/parallel/attend_calls.h"
#include "keys_seen.h"
#include "plan_cost.h"
#include "slot_fields.h"

namespace annulus {
namespace {

struct CallCase {
  AttentionKernel kernel;
  Determinism determinism;
  Pass pass;
  MaskShape shape;
  int64_t head_dim, v_head_dim;
};

// Pairs per second of a call with so many (WorkOf): by the rates of the same kernel and mask if there are
// any, of the nearest head, in proportion to FLOPs.
double PairRate(const MachineProfile& machine, const CallCase& call, double pairs) {
  const AttentionRate* best = nullptr;
  const auto distance = [&](const AttentionRate& rate) {
    return std::tuple(rate.kernel != call.kernel, rate.determinism != call.determinism,
                      rate.shape != call.shape,
                      std::abs(rate.head_dim - call.head_dim) + std::abs(rate.v_head_dim - call.v_head_dim));
  };
  for (const AttentionRate& rate : machine.attention) {
    if (rate.pass == call.pass && (best == nullptr || distance(rate) < distance(*best))) best = &rate;
  }
  ANNULUS_CHECK(best != nullptr) << machine.device << ": no attention rates of this pass";
  return RateAt(best->pairs, pairs) * FlopsPerPair(call.pass, best->head_dim, best->v_head_dim) /
         FlopsPerPair(call.pass, call.head_dim, call.v_head_dim);
}

bool HasRates(const MachineProfile& machine, AttentionKernel kernel) {
  return std::any_of(machine.attention.begin(), machine.attention.end(),
                     [&](const AttentionRate& rate) { return rate.kernel == kernel; });
}

class StepCost {
 public:
  StepCost(const AttentionCase& layer, const ExchangePlan& plan, const MachineProfile& machine)
      : layer_(layer),
        plan_(plan),
        machine_(machine),
        row_bytes_(layer, plan),
        compute_bytes_(static_cast<double>(SizeOf(layer.dtype))),
        accum_bytes_(static_cast<double>(SizeOf(AccumOf(layer.dtype)))),
        whole_(std::all_of(plan.ranks.begin(), plan.ranks.end(),
                           [](const RankPlan& rank) { return rank.steps.size() == 1; })),
        knows_cudnn_(HasRates(machine, AttentionKernel::kCudnn)),
        knows_hopper_(HasRates(machine, AttentionKernel::kHopper)),
        seen_(layer, plan) {}

  double Of(int cp_rank, const Step& step) {
    switch (step.kind) {
      case StepKind::kAttend:
        return AttendSeconds(cp_rank, step.attend);
      case StepKind::kCopy:
        return MoveSeconds(cp_rank, step, 1);
      case StepKind::kReduce:
        return MoveSeconds(cp_rank, step, 2);
      case StepKind::kSend:
      case StepKind::kReceive:
        return 0;
    }
    return 0;
  }

  // Results that kernels add to are emptied, and rounded in the end.
  double BeforeSeconds(const RankPlan& rank) const {
    double seconds = 0;
    if (plan_.pass == Pass::kBackward) {  // delta reads the output and its gradient
      seconds += PassSeconds(2 * compute_bytes_ *
                             Elements(plan_.problem.block_rows, layer_.heads, layer_.v_head_dim));
    }
    for (size_t slot = 0; slot < rank.slots.size() && !whole_; ++slot) {
      if (IsHomeResult(rank.slots[slot]) && AddedTo(rank, static_cast<int>(slot)))
        seconds += PassSeconds(accum_bytes_ * HomeElements(rank.slots[slot].payload));
    }
    return seconds;
  }
  double AfterSeconds(const RankPlan& rank) const {
    double seconds = 0;
    for (const SlotSpec& slot : rank.slots) {
      if (IsHomeResult(slot) && slot.width == Width::kAccumulator && !whole_)
        seconds += RoundSeconds(HomeElements(slot.payload));
    }
    return seconds;
  }

 private:
  const SlotSpec& SlotOf(int cp_rank, int slot) const {
    return plan_.ranks[static_cast<size_t>(cp_rank)].slots[static_cast<size_t>(slot)];
  }
  double Elements(int64_t rows, int64_t heads, int64_t dim) const {
    return static_cast<double>(rows * layer_.sequences.batch * heads * dim);
  }

  // A pass over memory.
  double PassSeconds(double bytes) const {
    if (bytes <= 0) return 0;
    return machine_.launch_seconds + bytes / RateAt(machine_.copy, bytes);
  }
  double RoundSeconds(double elements) const {
    return accum_bytes_ == compute_bytes_ ? 0 : PassSeconds(elements * (accum_bytes_ + compute_bytes_));
  }

  static bool IsHomeResult(const SlotSpec& slot) { return slot.home && IsResult(slot.payload); }
  double HomeElements(Payload payload) const {
    const int64_t rows = plan_.problem.block_rows;
    if (payload == Payload::kOutput) return Elements(rows, layer_.heads, layer_.v_head_dim);
    if (payload == Payload::kQueryGrad) return Elements(rows, layer_.heads, layer_.head_dim);
    return Elements(rows, layer_.kv_heads, KvColumns(layer_));
  }
  static bool AddedTo(const RankPlan& rank, int slot) {
    return std::any_of(rank.steps.begin(), rank.steps.end(), [&](const Step& step) {
      if (step.kind == StepKind::kReduce) return step.into == slot;
      const Attend& attend = step.attend;
      return step.kind == StepKind::kAttend &&
             ((attend.q_result == slot && attend.q_write == ResultWrite::kAccumulate) ||
              (attend.kv_result == slot && attend.kv_write == ResultWrite::kAccumulate));
    });
  }

  // Reads the rows of one slot and touches those of the other so many times, of the heads that both have.
  double MoveSeconds(int cp_rank, const Step& step, int into_times) const {
    SlotSpec from = SlotOf(cp_rank, step.slot), into = SlotOf(cp_rank, step.into);
    int64_t from_bytes = row_bytes_.Of(from), into_bytes = row_bytes_.Of(into);
    if (from.group != into.group) {
      // In proportion: one of them holds all heads.
      const auto share = [&](int group) {
        return group == kAllHeads ? layer_.heads : plan_.groups[static_cast<size_t>(group)].q_heads();
      };
      from_bytes = std::min(from_bytes, from_bytes * share(into.group) / share(from.group));
      into_bytes = std::min(into_bytes, into_bytes * share(from.group) / share(into.group));
    }
    return PassSeconds(static_cast<double>(step.rows.rows.size() * (from_bytes + into_times * into_bytes)));
  }

  // ---- Attends ----------------------------------------------------------------------------------

  // A result of an attend.
  struct Result {
    bool exists = false;
    bool overwritten = false;
    bool at_once = false;  // by one call that makes all of its rows
    bool rounded = false;  // rows are in the compute dtype
    int64_t rows = 0;
    friend bool operator==(const Result&, const Result&) = default;
  };
  // What the price of calls depends on besides them.
  struct Terms {
    int64_t q_heads = 0, kv_heads = 0;
    Result q = {}, kv = {};
    friend bool operator==(const Terms&, const Terms&) = default;
  };
  struct KnownCalls {
    const Attend* attend;
    std::vector<AttendCall> calls;
    std::vector<std::pair<Terms, double>> seconds;
  };

  // Ranks that share the same rows for different heads have the same calls, and most of them the same price.
  KnownCalls& CallsFor(int cp_rank, const Attend& attend) {
    const bool shared = SlotOf(cp_rank, attend.q_slot).span == Span::kSuper && !attend.pairs.empty();
    // Those of the same first pair.
    std::vector<KnownCalls>& alike =
        shared ? calls_[{attend.pairs[0].q_chunk, attend.pairs[0].kv_chunk}] : own_calls_;
    if (!shared) alike.clear();
    const auto known = std::find_if(alike.begin(), alike.end(), [&](const KnownCalls& each) {
      return each.attend->pairs == attend.pairs;
    });
    if (known != alike.end()) return *known;
    alike.push_back({&attend, CallsOf(layer_.layout, layer_.sequences, plan_, cp_rank, attend), {}});
    return alike.back();
  }

  Result ResultOf(int cp_rank, int slot, ResultWrite write, const std::vector<BlockRows>& rows,
                  const RowRange* call_rows) const {
    if (slot < 0) return {};
    Result result{.exists = true, .overwritten = write == ResultWrite::kOverwrite};
    for (const BlockRows& each : rows) result.rows += each.rows.size();
    result.at_once = result.overwritten && call_rows != nullptr && call_rows->size() == result.rows;
    result.rounded = SlotOf(cp_rank, slot).width == Width::kCompute && accum_bytes_ != compute_bytes_;
    return result;
  }
  // Emptied before and rounded after its calls.
  double AroundSeconds(const Result& result, int64_t heads, int64_t dim, bool emptied) const {
    const double elements = Elements(result.rows, heads, dim);
    return (result.overwritten && emptied ? PassSeconds(elements * accum_bytes_) : 0) +
           (result.rounded ? RoundSeconds(elements) : 0);
  }

  double AttendSeconds(int cp_rank, const Attend& attend) {
    KnownCalls& known = CallsFor(cp_rank, attend);
    const std::vector<AttendCall>& calls = known.calls;
    const HeadGroup group = GroupOf(layer_, plan_, SlotOf(cp_rank, attend.q_slot));
    const AttendCall* only = calls.size() == 1 ? &calls[0] : nullptr;
    const Result q = ResultOf(cp_rank, attend.q_result, attend.q_write, attend.q_rows,
                              only == nullptr ? nullptr : &only->q_rows);
    const Result kv = ResultOf(cp_rank, attend.kv_result, attend.kv_write, attend.kv_rows,
                               only == nullptr ? nullptr : &only->keys);
    const Terms terms{group.q_heads(), static_cast<int64_t>(group.kv_heads.size()), q, kv};
    for (const auto& [of, seconds] : known.seconds) {
      if (of == terms) return seconds;
    }
    known.seconds.emplace_back(terms, SecondsOf(attend, calls, group, terms));
    return known.seconds.back().second;
  }

  double SecondsOf(const Attend& attend, const std::vector<AttendCall>& calls, const HeadGroup& group,
                   const Terms& terms) {
    const Result &q = terms.q, &kv = terms.kv;
    const bool forward = plan_.pass == Pass::kForward;
    const bool direct = whole_ || (q.at_once && q.rounded && (forward || (kv.at_once && kv.rounded)));
    double seconds = 0;
    if (!direct) {
      seconds += AroundSeconds(q, group.q_heads(), forward ? layer_.v_head_dim : layer_.head_dim, true);
      if (kv.exists) seconds += AroundSeconds(kv, terms.kv_heads, KvColumns(layer_), !kv.at_once);
    }
    if (layer_.latent.has_value()) {
      int64_t keys = 0;
      for (const AttendCall& call : calls) keys += call.keys.size();
      const Expansion expansion{.rows = keys, .heads = group.q_heads(), .gradients = AccumOf(layer_.dtype)};
      seconds += ExpansionSeconds(layer_, plan_.pass, expansion, machine_);
    }
    const std::vector<double> pairs = PairsOf(attend, calls);
    for (size_t i = 0; i < calls.size(); ++i) {
      seconds += CallSeconds(calls[i], group, pairs[i] * static_cast<double>(group.q_heads()));
      seconds += direct ? WholeSeconds(calls[i], group) : AddSeconds(calls[i], group, kv.at_once);
    }
    return seconds;
  }

  // By call, of one head: what full and causal blocks have, and the rest by area.
  std::vector<double> PairsOf(const Attend& attend, const std::vector<AttendCall>& calls) const {
    const auto area = [](const AttendCall& call) {
      return static_cast<double>(call.q_rows.size()) * static_cast<double>(call.keys.size());
    };
    double left = 0, general_area = 0;
    for (const BlockPair& pair : attend.pairs) left += static_cast<double>(pair.pairs);
    std::vector<double> pairs;
    for (const AttendCall& call : calls) {
      const double rows = static_cast<double>(call.q_rows.size());
      const double known = call.shape == MaskShape::kFull     ? area(call)
                           : call.shape == MaskShape::kCausal ? rows * (rows + 1) / 2
                                                              : 0;
      pairs.push_back(known * static_cast<double>(layer_.sequences.batch));
      left -= pairs.back();
      if (call.shape == MaskShape::kGeneral) general_area += area(call);
    }
    for (size_t i = 0; i < calls.size(); ++i) {
      if (calls[i].shape == MaskShape::kGeneral) pairs[i] = left * area(calls[i]) / general_area;
    }
    return pairs;
  }

  // Of the program that the machine's rates are from: it has the kernels that they are of.
  AttentionKernel KernelOf(const AttendCall& call) const {
    AttentionKernelCase there = KernelCaseOf(layer_, plan_.pass, call.shape);
    there.cudnn = knows_cudnn_, there.hopper = knows_hopper_;
    return ChooseAttentionKernel(there);
  }

  double CallSeconds(const AttendCall& call, const HeadGroup& group, double pairs) {
    if (pairs <= 0 || group.q_heads() == 0) return 0;
    const AttentionKernel kernel = KernelOf(call);
    const CallCase rates{
        .kernel = kernel,
        .determinism = OrdersSums(kernel, plan_.pass) ? layer_.determinism : Determinism::kOff,
        .pass = plan_.pass,
        .shape = call.shape,
        .head_dim = layer_.head_dim,
        .v_head_dim = layer_.v_head_dim};
    // The library's backward is three kernels, and the LSE is copied before; rates of our own hold all of it.
    const bool library = kernel == AttentionKernel::kCudnn;
    const int launches = !library ? 0 : plan_.pass == Pass::kForward ? 1 : 4;
    const AttentionTiles tiles = TilesOf(kernel, plan_.pass, layer_.head_dim);
    const double work = tiles.queries == 1 ? pairs
                                           : WorkOf(tiles, machine_.multiprocessors, group.q_heads(),
                                                    seen_.By(call, tiles.queries));
    return work / PairRate(machine_, rates, work) + launches * machine_.launch_seconds;
  }

  // A call that makes its results whole, in the compute dtype, as the library does anyway, and Hopper's
  // forward. Our own kernels add to emptied ones else, and round outputs themselves but not gradients.
  double WholeSeconds(const AttendCall& call, const HeadGroup& group) const {
    const AttentionKernel kernel = KernelOf(call);
    if (kernel == AttentionKernel::kCudnn) return 0;
    if (kernel == AttentionKernel::kHopper && plan_.pass == Pass::kForward) return 0;
    const double queries = Elements(call.q_rows.size(), group.q_heads(), 1),
                 keys = Elements(call.keys.size(), KvHeadsOf(group), 1);
    const double dim = static_cast<double>(layer_.head_dim), v_dim = static_cast<double>(layer_.v_head_dim);
    if (plan_.pass == Pass::kForward) return PassSeconds(accum_bytes_ * queries * v_dim);
    double seconds = 0;
    for (const double elements : {queries * dim, keys * dim, keys * v_dim})
      seconds += PassSeconds(accum_bytes_ * elements) + RoundSeconds(elements);
    return seconds;
  }

  int64_t KvHeadsOf(const HeadGroup& group) const {
    return layer_.latent.has_value() ? group.q_heads() : static_cast<int64_t>(group.kv_heads.size());
  }

  // The library's results are its own: passes add them up, or write them where nothing is yet. Other kernels
  // add.
  double AddSeconds(const AttendCall& call, const HeadGroup& group, bool kv_at_once) const {
    const int64_t kv_heads = KvHeadsOf(group);
    const bool library = KernelOf(call) == AttentionKernel::kCudnn;
    const double add = library ? compute_bytes_ + 2 * accum_bytes_ : 0;
    const double kv = !kv_at_once ? add : library ? compute_bytes_ + accum_bytes_ : accum_bytes_;
    const auto queries = [&](int64_t dim) { return Elements(call.q_rows.size(), group.q_heads(), dim); };
    const auto keys = [&](int64_t dim) { return Elements(call.keys.size(), kv_heads, dim); };
    if (plan_.pass == Pass::kForward) return PassSeconds(add * queries(layer_.v_head_dim));
    return PassSeconds(add * queries(layer_.head_dim)) + PassSeconds(kv * keys(layer_.head_dim)) +
           PassSeconds(kv * keys(layer_.v_head_dim));
  }

  const AttentionCase& layer_;
  const ExchangePlan& plan_;
  const MachineProfile& machine_;
  const RowBytes row_bytes_;
  const double compute_bytes_, accum_bytes_;  // of an element
  const bool whole_;                          // nothing is exchanged or carried
  const bool knows_cudnn_, knows_hopper_;
  KeysSeen seen_;
  std::map<std::pair<int, int>, std::vector<KnownCalls>> calls_;
  std::vector<KnownCalls> own_calls_;  // of the last attend whose calls no other has
};

}  // namespace

double FlopsPerPair(Pass pass, int64_t head_dim, int64_t v_head_dim) {
  const int64_t products = pass == Pass::kForward ? head_dim + v_head_dim : 3 * head_dim + 2 * v_head_dim;
  return 2.0 * static_cast<double>(products);
}

double ExpansionSeconds(const AttentionCase& layer, Pass pass, const Expansion& expansion,
                        const MachineProfile& machine) {
  const LatentShape& latent = *layer.latent;
  const double tokens = static_cast<double>(expansion.rows * layer.sequences.batch);
  const double heads = static_cast<double>(expansion.heads);
  const double expanded = tokens * heads * static_cast<double>(latent.nope + latent.v);
  const double keys_and_values = tokens * heads * static_cast<double>(layer.head_dim + layer.v_head_dim);
  const auto pass_seconds = [&](double bytes) {
    return bytes > 0 ? machine.launch_seconds + bytes / RateAt(machine.copy, bytes) : 0;
  };
  const ProductRates rates = ProductRatesOf(machine, layer.device, layer.dtype);
  const double flops = 2 * expanded * static_cast<double>(latent.columns);
  const double element = static_cast<double>(SizeOf(layer.dtype));
  double seconds = machine.launch_seconds + flops / RateAt(rates.forward, flops) +
                   pass_seconds((expanded + keys_and_values) * element);
  if (pass == Pass::kForward) return seconds;
  // The gradients of latents and of the up-projection.
  seconds += 2 * machine.launch_seconds + 2 * flops / RateAt(rates.gradients, 2 * flops);
  return seconds + pass_seconds(expanded * element +
                                keys_and_values * static_cast<double>(SizeOf(expansion.gradients)));
}

std::vector<std::vector<double>> ComputeSecondsOf(const AttentionCase& layer, const ExchangePlan& plan,
                                                  const MachineProfile& machine) {
  StepCost cost(layer, plan, machine);
  std::vector<std::vector<double>> seconds;
  for (size_t r = 0; r < plan.ranks.size(); ++r) {
    const RankPlan& rank = plan.ranks[r];
    std::vector<double>& of_rank = seconds.emplace_back(rank.steps.size());
    double* first = nullptr;
    double* last = nullptr;
    for (size_t s = 0; s < rank.steps.size(); ++s) {
      if (!IsCompute(rank.steps[s].kind)) continue;
      of_rank[s] = cost.Of(static_cast<int>(r), rank.steps[s]);
      if (first == nullptr) first = &of_rank[s];
      last = &of_rank[s];
    }
    if (first == nullptr) continue;
    *first += cost.BeforeSeconds(rank);
    *last += cost.AfterSeconds(rank);
  }
  return seconds;
}

}  // namespace annulus
