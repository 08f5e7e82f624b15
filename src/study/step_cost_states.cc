// Operations of layers that pass states, in the order of their mixers.

#include "annulus/ops/taylor_features.h"
#include "step_cost_branches.h"

namespace annulus {
namespace {

class StateLister : OpMaker {
 public:
  using OpMaker::OpMaker;

  // Before work that runs while states, or rows before a convolution, travel.
  void AddStates(BranchKind kind, StateOrder order, int64_t StateExchange::* bytes,
                 std::vector<Op>* ops) const {
    if (run_.cp == 1) return;
    const StateExchange sent = StateExchangeOf(
        spec_, kind, order, {.layout = layout_, .sequences = run_.sequences, .tp = tp_, .dtype = run_.dtype});
    if (sent.*bytes == 0) return;
    ops->push_back({.kind = OpKind::kStates, .size = Real(sent.*bytes), .overlaps_next = true});
  }

  BranchOps Mamba() const {
    const MambaSpec& mamba = spec_.mamba;
    constexpr BranchKind kKind = BranchKind::kMamba;
    const int64_t d = spec_.d_model, heads = mamba.heads / tp_, inner = heads * mamba.head_dim;
    const int64_t bcx = inner + 2 * std::max<int64_t>(1, mamba.groups / tp_) * mamba.state;
    const int64_t state = heads * mamba.state * mamba.head_dim;
    BranchOps ops;
    std::vector<Op>& forward = ops.forward;
    AddStates(kKind, StateOrder::kForward, &StateExchange::halo_bytes, &forward);
    forward.push_back(Linear(bcx, d, Again::kUnlessElementwise));
    forward.push_back(Linear(heads, d, Again::kUnlessElementwise));
    forward.push_back(Over(PassKind::kConvolution, 2 * Elements(bcx) * element_, Again::kUnlessNone));
    forward.push_back(
        Over(PassKind::kActivation, Elements(heads) * (element_ + 2 * accum_), Again::kUnlessNone));
    forward.push_back(Scan(ScanKernel::kSsd, Pass::kForward, state, Again::kUnlessNone));
    AddStates(kKind, StateOrder::kForward, &StateExchange::state_bytes, &forward);
    forward.push_back(Linear(inner, d, Again::kUnlessElementwise));
    forward.push_back(GatedNorm(inner));
    forward.push_back(Linear(d, inner));

    ops.backward = {LinearGradient(d, inner), GatedNorm(inner), GatedNormBackward(inner),
                    Scan(ScanKernel::kSsd, Pass::kBackward, state)};
    AddStates(kKind, StateOrder::kBackward, &StateExchange::state_bytes, &ops.backward);
    ops.backward.push_back(LinearGradient(d, inner));
    ops.backward.push_back(OverBack(PassKind::kActivation, Elements(heads) * (2 * element_ + 2 * accum_)));
    ops.backward.push_back(OverBack(PassKind::kConvolution, 3 * Elements(bcx) * element_));
    AddStates(kKind, StateOrder::kBackward, &StateExchange::halo_bytes, &ops.backward);
    ops.backward.push_back(LinearGradient(inner + heads, d));
    ops.backward.push_back(LinearGradient(inner + heads, d));
    AddInputGradients({{bcx, d}}, &ops);
    return ops;
  }
  Op GatedNorm(int64_t columns) const { return Over(PassKind::kGatedNorm, 3 * Elements(columns) * element_); }
  Op GatedNormBackward(int64_t columns) const {
    return OverBack(PassKind::kGatedNorm, 5 * Elements(columns) * element_);
  }

  BranchOps Lightning() const {
    const LinearSpec& linear = spec_.lightning;
    constexpr BranchKind kKind = BranchKind::kLightning;
    const int64_t d = spec_.d_model, heads = linear.heads / tp_, values = heads * linear.value_dim;
    const int64_t qkv = 2 * heads * linear.key_dim + values;
    const int64_t state = heads * linear.key_dim * linear.value_dim;
    const Op decays = Over(PassKind::kMove, Elements(heads) * accum_, Again::kUnlessNone);
    BranchOps ops;
    ops.forward = {Linear(qkv, d, Again::kUnlessElementwise),
                   Over(PassKind::kActivation, 2 * Elements(qkv) * element_, Again::kUnlessNone), decays,
                   Scan(ScanKernel::kSsd, Pass::kForward, state, Again::kUnlessNone)};
    AddStates(kKind, StateOrder::kForward, &StateExchange::state_bytes, &ops.forward);
    ops.forward.push_back(Linear(values, d, Again::kUnlessElementwise));
    ops.forward.push_back(GatedNorm(values));
    ops.forward.push_back(Linear(d, values));

    ops.backward = {LinearGradient(d, values), GatedNorm(values), GatedNormBackward(values), decays,
                    Scan(ScanKernel::kSsd, Pass::kBackward, state)};
    AddStates(kKind, StateOrder::kBackward, &StateExchange::state_bytes, &ops.backward);
    ops.backward.push_back(LinearGradient(d, values));
    ops.backward.push_back(OverBack(PassKind::kActivation, 3 * Elements(qkv) * element_));
    AddInputGradients({{qkv, d}, {values, d}}, &ops);
    return ops;
  }

  BranchOps Based() const {
    const LinearSpec& linear = spec_.based;
    constexpr BranchKind kKind = BranchKind::kBased;
    const int64_t d = spec_.d_model, heads = linear.heads / tp_, values = heads * linear.value_dim;
    const int64_t keys = heads * linear.key_dim, ones = values + heads;
    const int64_t features = heads * TaylorFeatures(linear.key_dim);
    const int64_t state = features * (linear.value_dim + 1);
    const Op featured = Over(PassKind::kActivation, Elements(keys + features) * element_, Again::kUnlessNone);
    const Op normalised = Over(PassKind::kMove, Elements(ones + values) * element_);
    const Op no_decay = Over(PassKind::kMove, Elements(heads) * accum_, Again::kUnlessNone);
    BranchOps ops;
    ops.forward = {Linear(keys + values, d, Again::kUnlessElementwise), featured,
                   Over(PassKind::kMove, Elements(values + ones) * element_, Again::kUnlessNone), no_decay,
                   Scan(ScanKernel::kSsd, Pass::kForward, state, Again::kUnlessNone)};
    AddStates(kKind, StateOrder::kForward, &StateExchange::state_bytes, &ops.forward);
    ops.forward.push_back(Linear(keys, d, Again::kUnlessElementwise));
    ops.forward.push_back(featured);
    ops.forward.push_back(normalised);
    ops.forward.push_back(Linear(d, values));

    ops.backward = {normalised, LinearGradient(d, values),
                    Over(PassKind::kMove, Elements(2 * ones + values) * element_), no_decay,
                    Scan(ScanKernel::kSsd, Pass::kBackward, state)};
    AddStates(kKind, StateOrder::kBackward, &StateExchange::state_bytes, &ops.backward);
    ops.backward.push_back(LinearGradient(d, values));
    ops.backward.insert(ops.backward.end(), 2,
                        OverBack(PassKind::kActivation, Elements(2 * keys + features) * element_));
    ops.backward.push_back(Over(PassKind::kMove, Elements(values + ones) * element_));
    AddInputGradients({{keys + values, d}, {keys, d}}, &ops);
    return ops;
  }

  BranchOps DeltaNet() const {
    const LinearSpec& linear = spec_.delta;
    constexpr BranchKind kKind = BranchKind::kDeltaNet;
    const int64_t d = spec_.d_model, heads = linear.heads / tp_, values = heads * linear.value_dim;
    const int64_t qk = 2 * heads * linear.key_dim, qkv = qk + values;
    const int64_t state = heads * linear.key_dim * linear.value_dim;
    const PassKind convolved = linear.conv > 0 ? PassKind::kConvolution : PassKind::kActivation;
    const auto scan = [&](Pass pass, Again again) {
      return Scan(ScanKernel::kDeltaRule, pass, state, again);
    };
    BranchOps ops;
    AddStates(kKind, StateOrder::kForward, &StateExchange::halo_bytes, &ops.forward);
    for (const Op& op :
         {Linear(qkv, d, Again::kUnlessElementwise), Linear(2 * heads, d, Again::kUnlessElementwise),
          Over(convolved, 2 * Elements(qkv) * element_, Again::kUnlessNone),
          Over(PassKind::kNorm, 2 * Elements(qk) * element_, Again::kUnlessNone),
          Over(PassKind::kActivation, Elements(heads) * 2 * (element_ + accum_), Again::kUnlessNone)}) {
      ops.forward.push_back(op);
    }
    // What a segment does to states is a scan of its own, which only ranks of a sequence need.
    if (run_.cp > 1) ops.forward.push_back(scan(Pass::kForward, Again::kNever));
    AddStates(kKind, StateOrder::kForward, &StateExchange::state_bytes, &ops.forward);
    for (const Op& op : {Linear(values, d, Again::kUnlessElementwise),
                         scan(Pass::kForward, Again::kUnlessNone), GatedNorm(values), Linear(d, values)}) {
      ops.forward.push_back(op);
    }

    ops.backward = {LinearGradient(d, values), GatedNorm(values), GatedNormBackward(values)};
    if (run_.cp > 1) ops.backward.push_back(scan(Pass::kForward, Again::kNever));
    AddStates(kKind, StateOrder::kBackward, &StateExchange::state_bytes, &ops.backward);
    for (const Op& op : {LinearGradient(d, values), scan(Pass::kBackward, Again::kNever),
                         OverBack(PassKind::kNorm, 4 * Elements(qk) * element_),
                         OverBack(PassKind::kActivation, Elements(heads) * 2 * (element_ + accum_)),
                         OverBack(convolved, 3 * Elements(qkv) * element_)}) {
      ops.backward.push_back(op);
    }
    AddStates(kKind, StateOrder::kBackward, &StateExchange::halo_bytes, &ops.backward);
    ops.backward.push_back(LinearGradient(values, d));
    ops.backward.push_back(LinearGradient(values, d));
    AddInputGradients({{qkv, d}, {2 * heads, d}}, &ops);
    return ops;
  }
};

}  // namespace

BranchOps StateBranch(const OpInputs& inputs, const BranchSpec& branch) {
  const StateLister lister(inputs);
  switch (branch.kind) {
    case BranchKind::kMamba:
      return lister.Mamba();
    case BranchKind::kLightning:
      return lister.Lightning();
    case BranchKind::kBased:
      return lister.Based();
    default:
      return lister.DeltaNet();
  }
}

}  // namespace annulus
