// Attention over latents, by every exchange plan, against the absorbed form in f64: scores and sums are taken
// on latents, and no key or value is ever made.

#include <map>

#include "parallel/exchange_plan_cases.h"

namespace annulus::testing {
namespace {

constexpr LatentShape kLatent{.columns = 7, .nope = 3, .rope = 2, .v = 6};

struct LatentCase {
  LayerCase layer;  // kv columns: of the latents
  LatentShape latent;

  int64_t up_rows() const { return layer.shape.heads * (latent.nope + latent.v); }
};

LatentCase Of(LayerCase c, const LatentShape& latent) {
  c.shape.kv_heads = 1;
  c.shape.head_dim = latent.nope + latent.rope, c.shape.v_head_dim = latent.v;
  c.shape.latent = latent;
  return {std::move(c), latent};
}

std::vector<double> Normal(const char* stream, size_t n) {
  const RandomStream random(9, stream);
  std::vector<double> values(n);
  for (size_t i = 0; i < n; ++i) values[i] = random.Normal(i);
  return values;
}

// Rows of columns, one a token: token = position * batch + item.
struct WholeLatents {
  std::vector<double> q, latents, dout, up;  // inputs
  std::vector<double> out, dq, dlatents, dup;
};
WholeLatents MakeLatents(const LatentCase& c) {
  const size_t tokens = c.layer.tokens(), row = static_cast<size_t>(c.latent.row());
  const auto q = static_cast<size_t>(c.layer.q_columns()), out = static_cast<size_t>(c.layer.out_columns());
  const auto up = static_cast<size_t>(c.up_rows() * c.latent.columns);
  return {.q = Normal("q", tokens * q),
          .latents = Normal("latents", tokens * row),
          .dout = Normal("dout", tokens * out),
          .up = Normal("up", up),
          .out = std::vector<double>(tokens * out),
          .dq = std::vector<double>(tokens * q),
          .dlatents = std::vector<double>(tokens * row),
          .dup = std::vector<double>(up)};
}

// ---- The absorbed form --------------------------------------------------------------------------

// y += a x for vectors of n.
void Add(double a, const double* x, int64_t n, double* y) {
  for (int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}
double Product(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// One query of one head. With q~ = W_k^T q_n: s = tau (q~ c + q_r k_r), u = sum p c, o = W_v u.
void AbsorbedQuery(const LatentCase& c, int64_t item, int64_t position, int64_t head, WholeLatents* whole) {
  const LatentShape& l = c.latent;
  const ContextAttentionShape& s = c.layer.shape;
  const int64_t batch = c.layer.sequences.batch, token = position * batch + item, n = l.columns;
  const size_t at_q = static_cast<size_t>(token * c.layer.q_columns() + head * s.head_dim);
  const size_t at_out = static_cast<size_t>(token * c.layer.out_columns() + head * s.v_head_dim);
  const size_t at_key = static_cast<size_t>(head * (l.nope + l.v) * n);
  const size_t at_value = at_key + static_cast<size_t>(l.nope * n);
  const double *q = &whole->q[at_q], *dout = &whole->dout[at_out];
  const auto key_row = [&](int64_t key) { return static_cast<size_t>((key * batch + item) * l.row()); };
  std::vector<double> absorbed(static_cast<size_t>(n)), u(absorbed), du(absorbed), dabsorbed(absorbed);
  for (int64_t i = 0; i < l.nope; ++i)
    Add(q[i], &whole->up[at_key + static_cast<size_t>(i * n)], n, absorbed.data());
  for (int64_t i = 0; i < l.v; ++i)
    Add(dout[i], &whole->up[at_value + static_cast<size_t>(i * n)], n, du.data());
  std::vector<int64_t> keys;
  std::vector<double> weights;
  double sum = 0, mean = 0;
  for (int64_t key = 0; key < c.layer.layout.length(); ++key) {
    if (!Sees(c.layer.sequences, s.window, item, position, key)) continue;
    const double* latent = &whole->latents[key_row(key)];
    keys.push_back(key);
    weights.push_back(
        std::exp(s.scale * (Product(absorbed.data(), latent, n) + Product(q + l.nope, latent + n, l.rope))));
    sum += weights.back();
  }
  for (size_t j = 0; j < keys.size(); ++j) {
    weights[j] /= sum;
    Add(weights[j], &whole->latents[key_row(keys[j])], n, u.data());
  }
  mean = Product(du.data(), u.data(), n);
  for (int64_t i = 0; i < l.v; ++i) {
    whole->out[at_out + static_cast<size_t>(i)] =
        Product(&whole->up[at_value + static_cast<size_t>(i * n)], u.data(), n);
    Add(dout[i], u.data(), n, &whole->dup[at_value + static_cast<size_t>(i * n)]);
  }
  for (size_t j = 0; j < keys.size(); ++j) {
    const double* latent = &whole->latents[key_row(keys[j])];
    double* dlatent = &whole->dlatents[key_row(keys[j])];
    const double ds = s.scale * weights[j] * (Product(du.data(), latent, n) - mean);
    Add(weights[j], du.data(), n, dlatent);
    Add(ds, absorbed.data(), n, dlatent);
    Add(ds, q + l.nope, l.rope, dlatent + n);
    Add(ds, latent, n, dabsorbed.data());
    Add(ds, latent + n, l.rope, &whole->dq[at_q + static_cast<size_t>(l.nope)]);
  }
  for (int64_t i = 0; i < l.nope; ++i) {
    const size_t row = at_key + static_cast<size_t>(i * n);
    whole->dq[at_q + static_cast<size_t>(i)] = Product(&whole->up[row], dabsorbed.data(), n);
    Add(q[i], dabsorbed.data(), n, &whole->dup[row]);
  }
}

WholeLatents Absorbed(const LatentCase& c) {
  WholeLatents whole = MakeLatents(c);
  for (int64_t item = 0; item < c.layer.sequences.batch; ++item) {
    for (int64_t position = 0; position < c.layer.layout.padded_length(); ++position) {
      for (int64_t head = 0; head < c.layer.shape.heads; ++head)
        AbsorbedQuery(c, item, position, head, &whole);
    }
  }
  return whole;
}

// ---- Ranks --------------------------------------------------------------------------------------

// The rank's rows of whole tensors, on the host.
class RankRows {
 public:
  RankRows(const LayerCase& c, int cp_rank, int64_t columns, DType dtype)
      : c_(c),
        rank_(cp_rank),
        columns_(c.sequences.batch * columns),
        rows_(Device{}, dtype, {c.layout.local_rows(), c.sequences.batch, columns}) {
    Visit([&](auto* data) { std::fill_n(data, rows_.ref().elements(), std::nan("")); });
  }
  TensorRef ref() { return rows_.ref(); }
  TensorRef Load(const std::vector<double>& whole) {
    Visit([&](auto* data) {
      for (int64_t row = 0; row < c_.layout.local_rows(); ++row)
        std::copy_n(whole.data() + Place(row), columns_, data + row * columns_);
    });
    return ref();
  }
  void Store(std::vector<double>* whole) {
    Visit([&](auto* data) {
      for (int64_t row = 0; row < c_.layout.local_rows(); ++row)
        std::copy_n(data + row * columns_, columns_, whole->data() + Place(row));
    });
  }

 private:
  template <typename Fn>
  void Visit(Fn&& fn) {
    VisitFloat(rows_.ref().dtype(), [&]<class T>() { fn(rows_.ref().data<T>()); });
  }
  int64_t Place(int64_t row) const { return c_.layout.PositionOf(rank_, row) * columns_; }
  const LayerCase& c_;
  int rank_;
  int64_t columns_;  // of all items
  Tensor rows_;
};

// The gradient of the up-projection starts at one everywhere: it is added to.
void RunRank(const LatentCase& c, const WholeLatents& in, AttentionGeometry& geometry, WholeLatents* result,
             Tensor* dup) {
  Context ctx{Device{}};
  const DType dtype = dup->ref().dtype();
  const int rank = geometry.cp().rank();
  const LayerCase& l = c.layer;
  const auto rows = [&](int64_t columns) { return RankRows(l, rank, columns, dtype); };
  RankRows q = rows(l.q_columns()), dq = rows(l.q_columns()), out = rows(l.out_columns());
  RankRows latents = rows(c.latent.row()), dlatents = rows(c.latent.row());
  RankRows lse = rows(l.shape.heads), dout = rows(l.out_columns());
  const Tensor weights(Device{}, dtype, {c.up_rows(), c.latent.columns});
  VisitFloat(dtype, [&]<class T>() {
    std::copy(in.up.begin(), in.up.end(), weights.ref().data<T>());
    std::fill_n(dup->ref().data<T>(), dup->ref().elements(), T{1});
  });
  const LatentWeights up{.up = weights.ref(), .dup = dup->ref()};
  ExchangeStats stats;
  const TensorRef q_rows = q.Load(in.q), latent_rows = latents.Load(in.latents);
  ANNULUS_CHECK_OK(ContextAttentionForward(
      ctx, geometry, l.shape,
      {.q = q_rows, .kv = latent_rows, .out = out.ref(), .lse = lse.ref(), .latent = {.up = up.up}}, &stats));
  ANNULUS_CHECK_OK(ContextAttentionBackward(ctx, geometry, l.shape,
                                            {.q = q_rows,
                                             .kv = latent_rows,
                                             .out = out.ref(),
                                             .lse = lse.ref(),
                                             .dout = dout.Load(in.dout),
                                             .dq = dq.ref(),
                                             .dkv = dlatents.ref(),
                                             .latent = up},
                                            &stats));
  EXPECT_EQ(ctx.scratch.used_bytes(), 0);
  out.Store(&result->out), dq.Store(&result->dq), dlatents.Store(&result->dlatents);
}

WholeLatents RunRanks(const LatentCase& c, const ExchangeOptions& options, DType dtype = DType::kF64) {
  WholeLatents result = MakeLatents(c);
  const WholeLatents in = result;
  std::vector<Tensor> dups;
  for (int r = 0; r < c.layer.layout.ranks(); ++r)
    dups.emplace_back(Device{}, dtype, Shape{c.up_rows(), c.latent.columns});
  OnLoopback(c.layer.layout.ranks(), [&](Communicator cp) {
    AttentionGeometry geometry(c.layer.layout, cp, options);
    geometry.SetBatch(c.layer.sequences);
    RunRank(c, in, geometry, &result, &dups[static_cast<size_t>(cp.rank())]);
  });
  for (const Tensor& dup : dups) {
    VisitFloat(dtype, [&]<class T>() {
      for (size_t i = 0; i < result.dup.size(); ++i) result.dup[i] += dup.ref().data<T>()[i] - 1;
    });
  }
  return result;
}

void ExpectAbsorbed(const LatentCase& c, const ExchangeOptions& options) {
  const WholeLatents got = RunRanks(c, options), want = Absorbed(c);
  ExpectClose("out", got.out, want.out);
  ExpectClose("dq", got.dq, want.dq);
  ExpectClose("dlatents", got.dlatents, want.dlatents);
  ExpectClose("dup", got.dup, want.dup);
}

class LatentPlans : public ::testing::TestWithParam<std::tuple<size_t, LayoutKind, int>> {};

INSTANTIATE_TEST_SUITE_P(MasksLayoutsAndRanks, LatentPlans,
                         ::testing::Combine(::testing::Range<size_t>(0, std::size(kMasks)),
                                            ::testing::ValuesIn(kLayouts), ::testing::Range(1, 5)),
                         [](const auto& info) {
                           return std::string(kMasks[std::get<0>(info.param)].name) + "_" +
                                  NameOf(std::get<1>(info.param)) + "_" +
                                  std::to_string(std::get<2>(info.param));
                         });

TEST_P(LatentPlans, EqualTheAbsorbedForm) {
  const auto [mask, kind, ranks] = GetParam();
  uint64_t draw = 1000 * mask + 100 * static_cast<uint64_t>(kind) + 10 * static_cast<uint64_t>(ranks);
  for (const PlanChoice& choice : AllChoices(ranks, 8)) {
    const LatentCase c = Of(MakeCase(kMasks[mask], kind, ranks, ++draw), kLatent);
    for (const LatentExchange latents : {LatentExchange::kLatent, LatentExchange::kExpanded}) {
      SCOPED_TRACE(::testing::Message()
                   << NameOf(choice, ranks) << ", length " << c.layer.layout.length() << ", heads "
                   << c.layer.shape.heads << (latents == LatentExchange::kLatent ? ", latents" : ", keys"));
      ExpectAbsorbed(c, {.forward = {choice}, .backward = {choice}, .latents = latents});
    }
  }
}

// What AllChoices leaves at its default.
TEST(LatentPlanOptions, EqualTheAbsorbedForm) {
  uint64_t draw = 0;
  for (const int ranks : {3, 4, 6}) {
    for (const PlanChoice& plain : AllChoices(ranks, 8)) {
      PlanChoice choice = plain;
      choice.parts = 1 + static_cast<int>(++draw % 3);
      choice.buffers = 2 + static_cast<int>(draw % 2);
      choice.direction = draw % 2 ? RingDirection::kTowardHigher : RingDirection::kTowardLower;
      choice.output_width = draw % 3 ? Width::kCompute : Width::kAccumulator;
      const LatentCase c =
          Of(MakeCase(kMasks[draw % std::size(kMasks)], kLayouts[draw % std::size(kLayouts)], ranks, draw),
             kLatent);
      SCOPED_TRACE(NameOf(choice, ranks));
      ExpectAbsorbed(c, {.forward = {choice}, .backward = {choice}, .latents = LatentExchange::kLatent});
    }
  }
}

// ---- What travels -------------------------------------------------------------------------------

// Sent by both ranks of a KV ring in a pass, for each row.
int64_t BytesPerRow(const LatentCase& c, LatentExchange latents, Pass pass) {
  int64_t bytes = 0;
  OnLoopback(2, [&](Communicator cp) {
    AttentionGeometry geometry(c.layer.layout, cp, {.latents = latents});
    geometry.SetBatch(c.layer.sequences);
    Context ctx{Device{}};
    const ContextAttentionShape shape =
        latents == LatentExchange::kLatent ? c.layer.shape : Expanded(c.layer.shape);
    const int64_t sent = BytesSent(*geometry.ScheduleFor(ctx, shape, DType::kF32, pass).value(), cp.rank());
    const double all = cp.AllReduceValue(static_cast<double>(sent), ReduceOp::kSum).value();
    if (cp.rank() == 0) bytes = static_cast<int64_t>(all);
  });
  EXPECT_EQ(bytes % c.layer.layout.length(), 0);
  return bytes / c.layer.layout.length();
}

// DeepSeek-V3's sizes: 512 + 64 elements of a token in place of 128 (128 + 64 + 128).
TEST(LatentExchangeBytes, AreThoseOfLatents) {
  const LatentCase c =
      Of({.layout = SequenceLayout(LayoutKind::kContiguous, 16, 2),
          .sequences = {.batch = 1, .lengths = {16}, .document_starts = {}, .visibility = Visibility::kFull},
          .shape = {.heads = 128, .scale = 0.1}},
         {.columns = 512, .nope = 128, .rope = 64, .v = 128});
  EXPECT_EQ(BytesPerRow(c, LatentExchange::kLatent, Pass::kForward), 4 * 576);
  EXPECT_EQ(BytesPerRow(c, LatentExchange::kExpanded, Pass::kForward), 4 * 40960);
  // Out with the gradient coming home.
  EXPECT_EQ(BytesPerRow(c, LatentExchange::kLatent, Pass::kBackward), 2 * 4 * 576);
  EXPECT_EQ(BytesPerRow(c, LatentExchange::kExpanded, Pass::kBackward), 2 * 4 * 40960);
}

// ---- The choice ---------------------------------------------------------------------------------

bool ChoosesLatents(const LatentCase& c, LinkThrottle throttle) {
  bool latents = false;
  OnLoopback(2, [&](Communicator cp) {
    AttentionGeometry geometry(c.layer.layout, cp, {.machine = AssumedCpuCore(), .throttle = throttle});
    geometry.SetBatch(c.layer.sequences);
    Context ctx{Device{}};
    const bool mine = geometry.DecisionFor(ctx, c.layer.shape, DType::kF32, Pass::kForward).value()->latents;
    if (cp.rank() == 0) latents = mine;
  });
  return latents;
}

// Expanding costs arithmetic on every hop; latents pay where links are slow and heads many, and never where
// they are longer than keys and values.
TEST(LatentExchangeChoice, WeighsBytesAgainstArithmetic) {
  const auto case_of = [](int64_t heads, const LatentShape& latent) {
    return Of({.layout = SequenceLayout(LayoutKind::kZigzag, 2048, 2),
               .sequences = {.batch = 1, .lengths = {2048}, .document_starts = {}},
               .shape = {.heads = heads, .scale = 0.1}},
              latent);
  };
  const LatentShape usual{.columns = 128, .nope = 32, .rope = 16, .v = 32};
  const LatentShape longer{.columns = 512, .nope = 16, .rope = 16, .v = 16};
  const LinkThrottle slow{.bytes_per_second = 1e7};
  EXPECT_TRUE(ChoosesLatents(case_of(16, usual), slow));
  EXPECT_FALSE(ChoosesLatents(case_of(1, longer), slow));
  EXPECT_FALSE(ChoosesLatents(case_of(1, longer), {}));
}

// ---- Rounding -----------------------------------------------------------------------------------

// Of gradients of latents in f32 over so many ranks, from those in f64, relative to the largest.
double GradientError(int ranks) {
  const LatentCase c =
      Of({.layout = SequenceLayout(LayoutKind::kZigzag, 64, ranks),
          .sequences = {.batch = 1, .lengths = {64}, .document_starts = {}, .visibility = Visibility::kFull},
          .shape = {.heads = 4, .scale = 0.3}},
         kLatent);
  const WholeLatents exact = Absorbed(c);
  const WholeLatents got = RunRanks(c, {.latents = LatentExchange::kLatent}, DType::kF32);
  double worst = 0, largest = 0;
  for (size_t i = 0; i < exact.dlatents.size(); ++i) {
    worst = std::max(worst, std::abs(got.dlatents[i] - exact.dlatents[i]));
    largest = std::max(largest, std::abs(exact.dlatents[i]));
  }
  return worst / largest;
}

TEST(LatentGradients, AreNotLessExactWithMoreRanks) {
  const double one = GradientError(1);
  EXPECT_LT(one, 1e-5);
  for (const int ranks : {2, 4, 8, 16}) EXPECT_LE(GradientError(ranks), 2 * one) << ranks << " ranks";
}

}  // namespace
}  // namespace annulus::testing
