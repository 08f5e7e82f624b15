#pragma once

// Naive layers that hand states along the sequence, for model_rounded.h: Mamba-2, lightning attention, BASED
// and gated DeltaNet.

#include "annulus/ops/delta_rule.h"
#include "annulus/ops/mamba_gates.h"
#include "annulus/ops/silu.h"
#include "annulus/ops/taylor_features.h"
#include "gpu/rounded_scan.h"

namespace annulus::testing {

// Gradients of time steps and decays, [tokens, heads], and where those of what they come from go.
struct RoundedGates {
  ConstTensorRef ddt, da;
  MatrixRef draw;
  RoundedOps::Weights dt_bias, a_log;
};
inline void GatesBackward(RoundedOps& ops, const MambaGates& gates, const RoundedGates& to) {
  const auto rows = []<class Byte>(BasicMatrixRef<Byte> m, int64_t begin, int64_t end) {
    using Double = std::conditional_t<std::is_const_v<Byte>, const double, double>;
    m.data = static_cast<Double*>(m.data) + begin * m.stride;
    m.rows = end - begin;
    return m;
  };
  const bool wide = ops.rounding().gate_sums == Rounding::GateSums::kWide;
  const int64_t tokens = gates.raw.rows, step = wide ? tokens : 1;
  for (int64_t t = 0; t < tokens; t += step) {
    MambaGates some = gates;
    some.raw = rows(gates.raw, t, t + step);
    ANNULUS_CHECK_OK(
        MambaGatesBackward(ops.ctx, some, to.ddt.defined() ? to.ddt.Rows(t, t + step) : ConstTensorRef(),
                           to.da.Rows(t, t + step), rows(to.draw, t, t + step), to.dt_bias.dw, to.a_log.dw));
    if (!wide) ops.Stored(to.dt_bias.dw), ops.Stored(to.a_log.dw);
  }
}

class RoundedMamba : public RoundedBranch {
 public:
  RoundedMamba(RoundedOps& ops, const std::string& prefix)
      : ops_(ops),
        mamba_(ops.spec.mamba),
        bcx_(ops.Of(prefix + "b.weight", prefix + "x.weight")),
        zdt_(ops.Of(prefix + "z.weight", prefix + "dt.weight")),
        a_log_(ops.Of(prefix + "a_log")),
        skip_(ops.Of(prefix + "d")),
        dt_bias_(ops.Of(prefix + "dt_bias")),
        conv_(ops, {PartOf(ops, prefix, "b"), PartOf(ops, prefix, "c"), PartOf(ops, prefix, "x")}),
        output_(ops, prefix, Gate::kSiluBefore, mamba_.groups) {}

  void Forward(TensorRef x, TensorRef y) override {
    x_ = x;
    const TensorRef bcx = ops_.Linear(x, bcx_);
    zdt_products_ = ops_.Linear(x, zdt_);
    convolved_ = ops_.NewColumns(conv_columns());
    conv_.Forward(bcx, convolved_);
    dt_ = ops_.NewColumns(mamba_.heads), a_ = ops_.NewColumns(mamba_.heads);
    ANNULUS_CHECK_OK(MambaGatesForward(ops_.ctx, Gates(), PerToken(dt_), PerToken(a_)));
    const TensorRef o = ops_.NewColumns(inner());
    scan_.Forward(ops_,
                  {.x = Values(convolved_),
                   .b = Keys(convolved_, 0),
                   .c = Keys(convolved_, bc()),
                   .dt = dt_,
                   .a = a_,
                   .skip = skip_.w,
                   .ages = ops_.geometry.Ages(ops_.ctx),
                   .segments = SegmentsOf(ops_.geometry),
                   .chunk = mamba_.chunk},
                  o, HeadsOf(o, 0, mamba_.heads, mamba_.head_dim));
    output_.Forward(o, MatrixRef(zdt_products_).Cols(0, inner()), y);
  }
  void Backward(TensorRef dy, Write write, TensorRef dx) override {
    const TensorRef dzdt = ops_.New(zdt_products_.shape()), dconvolved = ops_.New(convolved_.shape());
    const TensorRef d_o = output_.Backward(dy, MatrixRef(dzdt).Cols(0, inner()));
    const TensorRef ddt = ops_.New(dt_.shape()), da = ops_.New(a_.shape());
    scan_.Backward(ops_, HeadsOf(d_o, 0, mamba_.heads, mamba_.head_dim),
                   {.dx = Values(dconvolved),
                    .db = Keys(dconvolved, 0),
                    .dc = Keys(dconvolved, bc()),
                    .ddt = ddt,
                    .da = da,
                    .dskip = skip_.dw});
    ops_.Stored(dconvolved);
    GatesBackward(ops_, Gates(),
                  {.ddt = PerToken(ddt),
                   .da = PerToken(da),
                   .draw = MatrixRef(dzdt).Cols(inner(), inner() + mamba_.heads),
                   .dt_bias = dt_bias_,
                   .a_log = a_log_});
    const TensorRef dbcx = ops_.New(convolved_.shape());
    conv_.Backward(dconvolved, dbcx);
    ops_.LinearBackward(ops_.Stored(dzdt), x_, zdt_, write, dx);
    ops_.LinearBackward(dbcx, x_, bcx_, Write::kAccumulate, dx);
  }

 private:
  static RoundedConv::Part PartOf(RoundedOps& ops, const std::string& prefix, const std::string& of) {
    return {ops.Of(prefix + "conv_" + of + ".weight"), ops.Of(prefix + "conv_" + of + ".bias")};
  }
  int64_t inner() const { return mamba_.heads * mamba_.head_dim; }
  int64_t bc() const { return mamba_.groups * mamba_.state; }
  int64_t conv_columns() const { return 2 * bc() + inner(); }
  HeadsRef Values(TensorRef t) const { return HeadsOf(t, 2 * bc(), mamba_.heads, mamba_.head_dim); }
  HeadsRef Keys(TensorRef t, int64_t begin) const { return HeadsOf(t, begin, mamba_.groups, mamba_.state); }
  TensorRef PerToken(TensorRef t) const { return t.Reshaped({ops_.tokens(), mamba_.heads}); }
  MambaGates Gates() const {
    return {.raw = MatrixRef(zdt_products_).Cols(inner(), inner() + mamba_.heads),
            .bias = dt_bias_.w,
            .a_log = a_log_.w,
            .low = mamba_.dt_min,
            .high = mamba_.dt_max};
  }

  RoundedOps& ops_;
  const MambaSpec& mamba_;
  RoundedOps::Weights bcx_, zdt_, a_log_, skip_, dt_bias_;
  RoundedConv conv_;
  RoundedGatedOutput output_;
  RoundedScan scan_;
  TensorRef x_, zdt_products_, convolved_, dt_, a_;
};

class RoundedLightning : public RoundedBranch {
 public:
  // layer: of those of the model that mix tokens, of which there are `layers`
  RoundedLightning(RoundedOps& ops, const std::string& prefix, int64_t layer, int64_t layers)
      : ops_(ops),
        linear_(ops.spec.lightning),
        qkv_(ops.Of(prefix + "q.weight", prefix + "v.weight")),
        gate_(ops.Of(prefix + "gate.weight")),
        output_(ops, prefix, Gate::kSigmoidAfter, linear_.heads) {
    const double depth = 1 - static_cast<double>(layer) / (static_cast<double>(layers) - 1 + 1e-5) + 1e-5;
    a_ = ops.NewColumns(linear_.heads);
    for (int64_t i = 0; i < a_.elements(); ++i) {
      const double head = static_cast<double>(i % linear_.heads + 1);
      a_.data<double>()[i] = -depth * std::exp2(-8 * head / static_cast<double>(linear_.heads));
    }
  }

  void Forward(TensorRef x, TensorRef y) override {
    x_ = x;
    products_ = ops_.Linear(x, qkv_);
    activated_ = ops_.New(products_.shape());
    ANNULUS_CHECK_OK(SiluForward(ops_.ctx, products_, activated_));
    ops_.Stored(activated_);
    const TensorRef o = ops_.NewColumns(values());
    scan_.Forward(ops_,
                  {.x = Values(activated_),
                   .b = Keys(activated_, keys()),
                   .c = Keys(activated_, 0),
                   .dt = {},
                   .a = a_,
                   .skip = {},
                   .ages = ops_.geometry.Ages(ops_.ctx),
                   .segments = SegmentsOf(ops_.geometry),
                   .chunk = linear_.chunk},
                  o, HeadsOf(o, 0, linear_.heads, linear_.value_dim));
    output_.Forward(o, ops_.Linear(x, gate_), y);
  }
  void Backward(TensorRef dy, Write write, TensorRef dx) override {
    const TensorRef dgate = ops_.NewColumns(values()), dqkv = ops_.New(products_.shape());
    const TensorRef d_o = output_.Backward(dy, dgate);
    scan_.Backward(ops_, HeadsOf(d_o, 0, linear_.heads, linear_.value_dim),
                   {.dx = Values(dqkv),
                    .db = Keys(dqkv, keys()),
                    .dc = Keys(dqkv, 0),
                    .ddt = {},
                    .da = ops_.New(a_.shape()),
                    .dskip = {}});
    ops_.Stored(dqkv);
    ANNULUS_CHECK_OK(SiluBackward(ops_.ctx, products_, dqkv, dqkv));
    ops_.LinearBackward(ops_.Stored(dqkv), x_, qkv_, write, dx);
    ops_.LinearBackward(dgate, x_, gate_, Write::kAccumulate, dx);
  }

 private:
  int64_t keys() const { return linear_.heads * linear_.key_dim; }
  int64_t values() const { return linear_.heads * linear_.value_dim; }
  HeadsRef Values(TensorRef t) const { return HeadsOf(t, 2 * keys(), linear_.heads, linear_.value_dim); }
  HeadsRef Keys(TensorRef t, int64_t begin) const {
    return HeadsOf(t, begin, linear_.heads, linear_.key_dim);
  }

  RoundedOps& ops_;
  const LinearSpec& linear_;
  RoundedOps::Weights qkv_, gate_;
  RoundedGatedOutput output_;
  RoundedScan scan_;
  TensorRef x_, products_, activated_, a_;
};

class RoundedBased : public RoundedBranch {
 public:
  RoundedBased(RoundedOps& ops, const std::string& prefix)
      : ops_(ops),
        based_(ops.spec.based),
        qk_(ops.Of(prefix + "q.weight", prefix + "k.weight")),
        v_(ops.Of(prefix + "v.weight")),
        out_(ops.Of(prefix + "out.weight")) {}

  void Forward(TensorRef x, TensorRef y) override {
    x_ = x;
    products_ = ops_.Linear(x, qk_);
    const TensorRef v = ops_.Linear(x, v_);
    features_ = ops_.NewColumns(2 * based_.heads * features());
    ones_ = ops_.NewColumns(based_.heads * (based_.value_dim + 1));
    sums_ = ops_.New(ones_.shape()), o_ = ops_.New(v.shape());
    ANNULUS_CHECK_OK(TaylorFeaturesForward(ops_.ctx, HeadsOf(products_, 0, 2 * based_.heads, based_.key_dim),
                                           HeadsOf(features_, 0, 2 * based_.heads, features())));
    ops_.Stored(features_);
    ANNULUS_CHECK_OK(AppendOnes(ops_.ctx, Heads(v, based_.value_dim), WithOnes(ones_)));
    scan_.Forward(ops_,
                  {.x = WithOnes(ones_),
                   .b = Features(features_, based_.heads * features()),
                   .c = Features(features_, 0),
                   .dt = {},
                   .a = ops_.NewColumns(based_.heads),
                   .skip = {},
                   .ages = ops_.geometry.Ages(ops_.ctx),
                   .segments = SegmentsOf(ops_.geometry),
                   .chunk = based_.chunk},
                  sums_, WithOnes(sums_));
    ANNULUS_CHECK_OK(NormaliseForward(ops_.ctx, WithOnes(sums_), kEps, Heads(o_, based_.value_dim)));
    ops_.Product(ops_.Stored(o_), out_.w, Write::kAccumulate, y);
  }
  void Backward(TensorRef dy, Write write, TensorRef dx) override {
    const TensorRef d_o = ops_.New(o_.shape()), dsums = ops_.New(sums_.shape());
    ops_.LinearBackward(dy, o_, out_, Write::kOverwrite, d_o);
    ANNULUS_CHECK_OK(
        NormaliseBackward(ops_.ctx, WithOnes(sums_), kEps, Heads(d_o, based_.value_dim), WithOnes(dsums)));
    ops_.Stored(dsums);
    const TensorRef dfeatures = ops_.New(features_.shape()), dones = ops_.New(ones_.shape());
    scan_.Backward(ops_, WithOnes(dsums),
                   {.dx = WithOnes(dones),
                    .db = Features(dfeatures, based_.heads * features()),
                    .dc = Features(dfeatures, 0),
                    .ddt = {},
                    .da = ops_.NewColumns(based_.heads),
                    .dskip = {}});
    ops_.Stored(dfeatures), ops_.Stored(dones);
    const TensorRef dqk = ops_.New(products_.shape()), dv = ops_.New(o_.shape());
    ANNULUS_CHECK_OK(TaylorFeaturesBackward(ops_.ctx, HeadsOf(products_, 0, 2 * based_.heads, based_.key_dim),
                                            HeadsOf(dfeatures, 0, 2 * based_.heads, features()),
                                            HeadsOf(dqk, 0, 2 * based_.heads, based_.key_dim)));
    ANNULUS_CHECK_OK(DropLastColumn(ops_.ctx, WithOnes(dones), Heads(dv, based_.value_dim)));
    ops_.LinearBackward(ops_.Stored(dqk), x_, qk_, write, dx);
    ops_.LinearBackward(dv, x_, v_, Write::kAccumulate, dx);
  }

 private:
  static constexpr double kEps = 1e-12;
  int64_t features() const { return TaylorFeatures(based_.key_dim); }
  HeadsRef Heads(TensorRef t, int64_t dim) const { return HeadsOf(t, 0, based_.heads, dim); }
  HeadsRef WithOnes(TensorRef t) const { return Heads(t, based_.value_dim + 1); }
  HeadsRef Features(TensorRef t, int64_t begin) const { return HeadsOf(t, begin, based_.heads, features()); }

  RoundedOps& ops_;
  const LinearSpec& based_;
  RoundedOps::Weights qk_, v_, out_;
  RoundedScan scan_;
  TensorRef x_, products_, features_, ones_, sums_, o_;
};

class RoundedDeltaNet : public RoundedBranch {
 public:
  RoundedDeltaNet(RoundedOps& ops, const std::string& prefix)
      : ops_(ops),
        delta_(ops.spec.delta),
        qkv_(ops.Of(prefix + "q.weight", prefix + "v.weight")),
        gate_(ops.Of(prefix + "gate.weight")),
        small_(ops.Of(prefix + "beta.weight", prefix + "decay.weight")),
        a_log_(ops.Of(prefix + "a_log")),
        dt_bias_(ops.Of(prefix + "dt_bias")),
        output_(ops, prefix, Gate::kSiluAfter, delta_.heads) {
    if (delta_.conv > 0)
      conv_.emplace(ops, std::vector<RoundedConv::Part>{
                             {ops.Of(prefix + "conv_q.weight", prefix + "conv_v.weight"), {}}});
  }

  void Forward(TensorRef x, TensorRef y) override {
    x_ = x;
    products_ = ops_.Linear(x, qkv_), small_products_ = ops_.Linear(x, small_);
    convolved_ = ops_.New(products_.shape()), normalised_ = ops_.NewColumns(2 * keys());
    if (conv_.has_value()) {
      conv_->Forward(products_, convolved_);
    } else {
      ANNULUS_CHECK_OK(SiluForward(ops_.ctx, products_, convolved_));
      ops_.Stored(convolved_);
    }
    ANNULUS_CHECK_OK(L2NormForward(ops_.ctx, QueriesAndKeys(convolved_), kEps, QueriesAndKeys(normalised_)));
    ops_.Stored(normalised_);
    beta_ = ops_.NewColumns(delta_.heads), a_ = ops_.NewColumns(delta_.heads);
    ANNULUS_CHECK_OK(SigmoidForward(ops_.ctx, Betas(small_products_), PerToken(beta_)));
    ANNULUS_CHECK_OK(
        MambaGatesForward(ops_.ctx, Gates(), PerToken(ops_.NewColumns(delta_.heads)), PerToken(a_)));
    const TensorRef o = ops_.NewColumns(values());
    states_ = ops_.New({DeltaChunks(Rule()), States(), delta_.key_dim, delta_.value_dim});
    ANNULUS_CHECK_OK(
        DeltaForward(ops_.ctx, Rule(), {}, states_, HeadsOf(o, 0, delta_.heads, delta_.value_dim)));
    output_.Forward(ops_.Stored(o), ops_.Linear(x, gate_), y);
  }
  void Backward(TensorRef dy, Write write, TensorRef dx) override {
    const TensorRef dgate = ops_.NewColumns(values()), dsmall = ops_.New(small_products_.shape());
    const TensorRef d_o = output_.Backward(dy, dgate);
    const TensorRef dnormalised = ops_.New(normalised_.shape()), dconvolved = ops_.New(convolved_.shape());
    const TensorRef dbeta = ops_.New(beta_.shape()), da = ops_.New(a_.shape());
    const TensorRef none = ops_.New({1, States(), delta_.key_dim, delta_.value_dim});
    ANNULUS_CHECK_OK(DeltaBackward(ops_.ctx, Rule(), HeadsOf(d_o, 0, delta_.heads, delta_.value_dim), states_,
                                   none,
                                   {.dq = HeadsOf(dnormalised, 0, delta_.heads, delta_.key_dim),
                                    .dk = HeadsOf(dnormalised, keys(), delta_.heads, delta_.key_dim),
                                    .dv = HeadsOf(dconvolved, 2 * keys(), delta_.heads, delta_.value_dim),
                                    .dbeta = dbeta,
                                    .da = da}));
    ops_.Stored(dnormalised);
    ANNULUS_CHECK_OK(L2NormBackward(ops_.ctx, QueriesAndKeys(convolved_), kEps, QueriesAndKeys(dnormalised),
                                    QueriesAndKeys(dconvolved)));
    ops_.Stored(dconvolved);
    ANNULUS_CHECK_OK(SigmoidBackward(ops_.ctx, PerToken(beta_), PerToken(dbeta), Betas(dsmall)));
    GatesBackward(
        ops_, Gates(),
        {.ddt = {}, .da = PerToken(da), .draw = Decays(dsmall), .dt_bias = dt_bias_, .a_log = a_log_});
    const TensorRef dqkv = ops_.New(products_.shape());
    if (conv_.has_value()) {
      conv_->Backward(dconvolved, dqkv);
    } else {
      ANNULUS_CHECK_OK(SiluBackward(ops_.ctx, products_, dconvolved, dqkv));
      ops_.Stored(dqkv);
    }
    ops_.LinearBackward(dqkv, x_, qkv_, write, dx);
    ops_.LinearBackward(dgate, x_, gate_, Write::kAccumulate, dx);
    ops_.LinearBackward(ops_.Stored(dsmall), x_, small_, Write::kAccumulate, dx);
  }

 private:
  static constexpr double kEps = 1e-6;
  int64_t keys() const { return delta_.heads * delta_.key_dim; }
  int64_t values() const { return delta_.heads * delta_.value_dim; }
  int64_t States() const { return ops_.batch() * delta_.heads; }
  HeadsRef QueriesAndKeys(TensorRef t) const { return HeadsOf(t, 0, 2 * delta_.heads, delta_.key_dim); }
  MatrixRef Betas(TensorRef t) const { return MatrixRef(t).Cols(0, delta_.heads); }
  MatrixRef Decays(TensorRef t) const { return MatrixRef(t).Cols(delta_.heads, 2 * delta_.heads); }
  TensorRef PerToken(TensorRef t) const { return t.Reshaped({ops_.tokens(), delta_.heads}); }
  MambaGates Gates() const { return {.raw = Decays(small_products_), .bias = dt_bias_.w, .a_log = a_log_.w}; }
  DeltaRule Rule() const {
    return {.q = HeadsOf(normalised_, 0, delta_.heads, delta_.key_dim),
            .k = HeadsOf(normalised_, keys(), delta_.heads, delta_.key_dim),
            .v = HeadsOf(convolved_, 2 * keys(), delta_.heads, delta_.value_dim),
            .beta = beta_,
            .a = a_,
            .ages = ops_.geometry.Ages(ops_.ctx),
            .segments = SegmentsOf(ops_.geometry),
            .chunk = delta_.chunk};
  }

  RoundedOps& ops_;
  const LinearSpec& delta_;
  RoundedOps::Weights qkv_, gate_, small_, a_log_, dt_bias_;
  RoundedGatedOutput output_;
  std::optional<RoundedConv> conv_;
  TensorRef x_, products_, small_products_, convolved_, normalised_, beta_, a_, states_;
};

}  // namespace annulus::testing
