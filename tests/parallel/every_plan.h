#pragma once

// Attention layers on real kernels by every exchange plan that can be named, on any device and in any dtype
// T, judged by the rule of the house:
//   max |got - f64| <= 2 max |naive - f64| + atol
// f64 is a plain loop over the whole sequence (ReferenceAttention), which knows neither layouts nor plans;
// naive is the same loop in f32 that rounds to T what kernels may (BlockGradients). Sums are in f32, so atol
// is four of its epsilons of what is summed: a naive result may by luck be exact.
//
// A maximum says little of how errors grow, so that they do not is judged by their root mean squares over all
// ranks: those of naive, whatever the plan, ranks and parts, but for what JudgedLayer::most_growth() allows.
//
//   ExpectEveryPlan<BFloat16>(ctx, cp, {TransportKind::kHost}, BlockGradients::kRounded);

#include <map>
#include <memory>
#include <set>
#include <string>

#include "annulus/parallel/context_attention.h"
#include "gpu/gpu_harness.h"
#include "ops/attention_harness.h"
#include "parallel/sequences.h"

namespace annulus::testing {

struct LayerKind {
  const char* name;
  LayoutKind layout;
  int64_t rows, batch;  // of a rank, about; nothing that tiles divide, and the last ones are padding
  int64_t window;
  Documents documents;
  Lengths lengths;
  int64_t head_dim;
};
inline constexpr LayerKind kLayerKinds[] = {
    {"causal", LayoutKind::kZigzag, 200, 1, 0, Documents::kNone, Lengths::kFull, 64},
    {"window", LayoutKind::kContiguous, 200, 1, 101, Documents::kNone, Lengths::kFull, 64},
    {"documents", LayoutKind::kStriped, 100, 2, 0, Documents::kRandom, Lengths::kRandom, 64},
    {"causal, heads of 128", LayoutKind::kZigzag, 200, 1, 0, Documents::kNone, Lengths::kFull, 128}};

inline constexpr int64_t kPlanHeads = 4, kPlanKvHeads = 2;
inline constexpr int kPieces = 4;  // of a layout chunk: two parts each way

// All kinds, directions, parts, widths of partial outputs, and splits of heads: those of different names.
inline std::vector<PlanChoice> EveryPlan(int ranks) {
  std::vector<PlanChoice> plans;
  std::set<std::string> names;
  for (PlanChoice choice : AllChoices(ranks, kPlanHeads)) {
    for (const RingDirection direction : {RingDirection::kTowardLower, RingDirection::kTowardHigher}) {
      for (const int parts : {1, 2}) {
        for (const Width width : {Width::kAccumulator, Width::kCompute}) {
          choice.direction = direction, choice.parts = parts, choice.output_width = width;
          if (names.insert(NameOf(choice, ranks)).second) plans.push_back(choice);
        }
      }
    }
  }
  return plans;
}

// What kernels do to the gradients of keys and values that a block of queries gives.
enum class BlockGradients {
  kSummed,  // our own add them up in f32, over blocks, heads and ranks
  // cuDNN gives them in 16 bits, and adds up from 16 bits the query heads that share keys. (Asked for f32,
  // 9.14 refuses heads that share keys, and writes 16 bits for others.) Sums over blocks are ours, in f32.
  // Roundings of the summands are independent and in proportion to them, so together they are as one rounding
  // of the sum, however many blocks there are. Naive has them for the smallest that a plan has here
  // (kPieces).
  kRounded
};

// A layer, its operands as T holds them, and its results. Tensors are of all tokens: position * batch + item.
template <typename T>
class JudgedLayer {
 public:
  JudgedLayer(const LayerKind& kind, int ranks, BlockGradients gradients, int pieces = kPieces)
      : block_gradients(gradients),
        layout(kind.layout, kind.rows * ranks - 3, ranks),
        sequences(RandomSequences(3, layout.length(), kind.batch, kind.lengths, kind.documents)),
        shape{.heads = kPlanHeads,
              .kv_heads = kPlanKvHeads,
              .head_dim = kind.head_dim,
              .v_head_dim = kind.head_dim,
              .window = kind.window,
              .scale = 1 / std::sqrt(static_cast<double>(kind.head_dim))} {
    const AttentionProblem p = Problem();
    in = {Normal<T>(p.q_elements(), "q"), Normal<T>(p.k_elements(), "k"), Normal<T>(p.v_elements(), "v"),
          Normal<T>(p.out_elements(), "dout")};
    exact = ReferenceAttention<double>(p, in);
    AttentionResults<float> rounded = ReferenceAttention<float>(p, CastAll<float>(in), Round);
    if (gradients == BlockGradients::kRounded) RoundBlocks(p, pieces, &rounded);
    naive = {Cast<double>(rounded.out), Cast<double>(rounded.lse), Cast<double>(rounded.dq),
             Cast<double>(rounded.dk), Cast<double>(rounded.dv)};
  }

  int64_t tokens() const { return layout.padded_length() * sequences.batch; }

  // The results that break the rule, with how.
  //
  // Plans whose partial outputs travel in T have no allowance of their own. Each partial output is rounded
  // once, and an output is their average by weights that sum to one: that moves it by at most half an epsilon
  // of the largest of them, which is what naive loses where it rounds the output. So twice naive covers both
  // roundings. Backward reads outputs only for delta = dout . out, where naive reads them rounded, too.
  std::map<std::string, std::string> Refused(const AttentionResults<double>& got) const {
    constexpr double kSum = 4 * 0x1p-23;
    const double v = MaxAbs(in.v), score = MaxAbs(in.dout) * std::max(v, 1.0);
    std::map<std::string, std::string> refused;
    const auto judge = [&](const char* name, std::vector<double> AttentionResults<double>::*result,
                           double atol) {
      const std::string why = WhyRefused(got.*result, naive.*result, exact.*result, atol);
      if (!why.empty()) refused[name] = why;
    };
    judge("out", &AttentionResults<double>::out, kSum * v);
    judge("lse", &AttentionResults<double>::lse, kSum * MaxAbs(exact.lse));
    judge("dq", &AttentionResults<double>::dq, kSum * score);
    judge("dk", &AttentionResults<double>::dk, kSum * score);
    judge("dv", &AttentionResults<double>::dv, kSum * score);
    return refused;
  }

  // Where blocks are rounded, so are partial outputs and gradients of queries, which in naive are not:
  // together that is as one rounding besides the one that it has.
  double most_growth(const std::string& result) const {
    const bool of_queries = result == "out" || result == "dq";
    return block_gradients == BlockGradients::kRounded && of_queries ? std::sqrt(2) : 1.1;
  }

  // Of these results, over those of naive: root mean squares of errors. `got` is exact but for one rank's
  // rows; collective over the ranks that have the others.
  std::map<std::string, double> Growth(const AttentionResults<double>& got, Communicator& cp) const {
    std::map<std::string, double> growth;
    const auto add = [&](const char* name, std::vector<double> AttentionResults<double>::*result) {
      const double squares = cp.AllReduceValue(Squares(got.*result, exact.*result), ReduceOp::kSum).value();
      growth[name] = std::sqrt(squares / Squares(naive.*result, exact.*result));
    };
    add("out", &AttentionResults<double>::out);
    add("dq", &AttentionResults<double>::dq);
    add("dk", &AttentionResults<double>::dk);
    add("dv", &AttentionResults<double>::dv);
    return growth;
  }

  static float Round(float x) { return static_cast<float>(ToDouble(FromDouble<T>(static_cast<double>(x)))); }

  BlockGradients block_gradients;
  SequenceLayout layout;
  SequenceBatch sequences;
  ContextAttentionShape shape;
  Operands<double> in;
  AttentionResults<double> exact, naive;

 private:
  // Gradients of keys and values, rounded for each block of queries and each query head.
  void RoundBlocks(const AttentionProblem& p, int pieces, AttentionResults<float>* results) const {
    std::vector<float> dk(results->dk.size()), dv(results->dv.size());
    for (int rank = 0; rank < layout.ranks(); ++rank) {
      const std::vector<int64_t> positions = layout.LocalPositions(rank);
      auto first = positions.begin();
      for (const LayoutChunk& chunk : layout.chunks(rank)) {
        for (int piece = 0; piece < pieces; ++piece) {
          const std::vector<int64_t> queries(first + chunk.rows * piece / pieces,
                                             first + chunk.rows * (piece + 1) / pieces);
          const AttentionResults<float> block =
              ReferenceAttention<float>(BlockOf(p, queries), BlockOperands(p, queries), Round);
          AddGroups(p, block.dk, p.shape.dim, &dk);
          AddGroups(p, block.dv, p.shape.v_dim, &dv);
        }
        first += chunk.rows;
      }
    }
    for (float& x : dk) x = Round(x);
    for (float& x : dv) x = Round(x);
    results->dk = std::move(dk), results->dv = std::move(dv);
  }
  // Only the queries at these positions; keys and values for each query head.
  static AttentionProblem BlockOf(const AttentionProblem& p, const std::vector<int64_t>& positions) {
    AttentionProblem block{.shape = p.shape, .positions = p.positions, .lo = {}, .hi = {}};
    block.shape.q_rows = static_cast<int64_t>(positions.size());
    block.shape.kv_heads = p.shape.heads;
    block.lo = RowsOf(p, p.lo, positions), block.hi = RowsOf(p, p.hi, positions);
    return block;
  }
  Operands<float> BlockOperands(const AttentionProblem& p, const std::vector<int64_t>& positions) const {
    Operands<float> block = CastAll<float>(in);
    block.q = RowsOf(p, block.q, positions), block.dout = RowsOf(p, block.dout, positions);
    for (auto [values, dim] : {std::pair{&block.k, p.shape.dim}, {&block.v, p.shape.v_dim}}) {
      std::vector<float> copies;
      ForEachHead(p, [&, all = values, columns = dim](int64_t kv_head) {
        const auto first = all->begin() + kv_head * columns;
        copies.insert(copies.end(), first, first + columns);
      });
      *values = std::move(copies);
    }
    return block;
  }
  template <typename U>
  static std::vector<U> RowsOf(const AttentionProblem& p, const std::vector<U>& all,
                               const std::vector<int64_t>& positions) {
    const auto columns = static_cast<int64_t>(all.size()) / p.shape.q_rows;
    std::vector<U> rows;
    for (const int64_t position : positions) {
      const auto first = all.begin() + position * columns;
      rows.insert(rows.end(), first, first + columns);
    }
    return rows;
  }
  // Rounds the sums over query heads that share keys, and adds them.
  static void AddGroups(const AttentionProblem& p, const std::vector<float>& apart, int64_t dim,
                        std::vector<float>* sums) {
    std::vector<float> of_block(sums->size());
    size_t next = 0;
    ForEachHead(p, [&](int64_t kv_head) {
      for (int64_t i = 0; i < dim; ++i) of_block[static_cast<size_t>(kv_head * dim + i)] += apart[next++];
    });
    for (size_t i = 0; i < sums->size(); ++i) (*sums)[i] += Round(of_block[i]);
  }
  // Calls fn(KV head, counted over all key rows) for each query head of each key row.
  static void ForEachHead(const AttentionProblem& p, const std::function<void(int64_t)>& fn) {
    const int64_t kv_heads = p.shape.kv_heads, group = p.shape.heads / kv_heads;
    for (int64_t row = 0; row < p.shape.k_rows * p.shape.batch; ++row) {
      for (int64_t head = 0; head < p.shape.heads; ++head) fn(row * kv_heads + head / group);
    }
  }
  static double Squares(const std::vector<double>& a, const std::vector<double>& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
    return sum;
  }

  // Bounds are said pair by pair, not by the masks of the library.
  AttentionProblem Problem() const {
    const int64_t rows = layout.padded_length();
    AttentionProblem problem{.shape = {.q_rows = rows,
                                       .k_rows = rows,
                                       .batch = sequences.batch,
                                       .heads = shape.heads,
                                       .kv_heads = shape.kv_heads,
                                       .dim = shape.head_dim,
                                       .v_dim = shape.v_head_dim},
                             .positions = {},
                             .lo = {},
                             .hi = {}};
    for (int64_t token = 0; token < tokens(); ++token) {
      const int64_t item = token % sequences.batch, position = token / sequences.batch;
      int64_t lo = 0, hi = 0;
      for (int64_t key = 0; key < rows; ++key) {
        if (!Sees(sequences, shape.window, item, position, key)) continue;
        if (hi == 0) lo = key;
        hi = key + 1;
      }
      problem.lo.push_back(lo);
      problem.hi.push_back(hi);
    }
    return problem;
  }
  static std::string WhyRefused(const std::vector<double>& got, const std::vector<double>& naive,
                                const std::vector<double>& exact, double atol) {
    for (size_t i = 0; i < exact.size(); ++i) {
      const bool infinite = std::isinf(got[i]) || std::isinf(exact[i]);
      if (std::isnan(got[i]) || (infinite && got[i] != exact[i]))
        return absl::StrCat(got[i], " at ", i, ", expected ", exact[i]);
    }
    const double error = MaxDifference(got, exact), naive_error = MaxDifference(naive, exact);
    if (error <= 2 * naive_error + atol) return "";
    return absl::StrCat("error ", error, ", naive ", naive_error, ", atol ", atol);
  }
};

// Computed once for each of these.
template <typename T>
const JudgedLayer<T>& JudgedLayerOf(const LayerKind& kind, int ranks, BlockGradients gradients) {
  static std::map<std::tuple<std::string, int, BlockGradients>, JudgedLayer<T>> all;
  return all.try_emplace({kind.name, ranks, gradients}, kind, ranks, gradients).first->second;
}

// One rank's rows on its device, between guards.
template <typename T>
class LayerOnRank {
 public:
  LayerOnRank(Context& ctx, const JudgedLayer<T>& judged, int cp_rank)
      : ctx_(ctx),
        judged_(judged),
        cp_rank_(cp_rank),
        q_(Make(DTypeOf<T>(), judged.shape.heads * judged.shape.head_dim)),
        kv_(Make(DTypeOf<T>(), judged.shape.kv_heads * (judged.shape.head_dim + judged.shape.v_head_dim))),
        dout_(Make(DTypeOf<T>(), judged.shape.heads * judged.shape.v_head_dim)),
        out_(Make(DTypeOf<T>(), judged.shape.heads * judged.shape.v_head_dim)),
        lse_(Make(DType::kF32, judged.shape.heads)),
        dq_(Make(DTypeOf<T>(), judged.shape.heads * judged.shape.head_dim)),
        dkv_(Make(DTypeOf<T>(), judged.shape.kv_heads * (judged.shape.head_dim + judged.shape.v_head_dim))) {
    const Operands<double>& in = judged.in;
    Load({&in.q}, &q_);
    Load({&in.k, &in.v}, &kv_);
    Load({&in.dout}, &dout_);
  }

  void Forward(AttentionGeometry& geometry, const ContextAttentionShape& shape) {
    ExchangeStats stats;
    ANNULUS_CHECK_OK(ContextAttentionForward(
        ctx_, geometry, shape, {.q = q_.ref(), .kv = kv_.ref(), .out = out_.ref(), .lse = lse_.ref()},
        &stats));
  }

  // Forward and backward with results that are NaN before. Rows of other ranks are exact.
  AttentionResults<double> Run(AttentionGeometry& geometry, const ContextAttentionShape& shape) {
    for (GuardedTensor* result : {&out_, &dq_, &dkv_}) Poison<T>(result);
    Poison<float>(&lse_);
    Forward(geometry, shape);
    ExchangeStats stats;
    ANNULUS_CHECK_OK(ContextAttentionBackward(ctx_, geometry, shape,
                                              {.q = q_.ref(),
                                               .kv = kv_.ref(),
                                               .out = out_.ref(),
                                               .lse = lse_.ref(),
                                               .dout = dout_.ref(),
                                               .dq = dq_.ref(),
                                               .dkv = dkv_.ref()},
                                              &stats));
    EXPECT_EQ(ctx_.scratch.used_bytes(), 0);
    AttentionResults<double> results = judged_.exact;
    Store<T>(&out_, {&results.out});
    Store<float>(&lse_, {&results.lse});
    Store<T>(&dq_, {&results.dq});
    Store<T>(&dkv_, {&results.dk, &results.dv});
    return results;
  }

 private:
  GuardedTensor Make(DType dtype, int64_t columns) {
    return {ctx_, dtype, {judged_.layout.local_rows(), judged_.sequences.batch, columns}, 0};
  }
  // Calls fn(element) for this rank's rows of tensors of all tokens, side by side, in the order of memory.
  template <typename Whole, typename Fn>
  void ForEach(const std::vector<Whole*>& wholes, const Fn& fn) const {
    const auto tokens = static_cast<size_t>(judged_.tokens()),
               batch = static_cast<size_t>(judged_.sequences.batch);
    for (const int64_t position : judged_.layout.LocalPositions(cp_rank_)) {
      for (size_t token = static_cast<size_t>(position) * batch, end = token + batch; token < end; ++token) {
        for (Whole* whole : wholes) {
          const size_t columns = whole->size() / tokens;
          for (size_t i = 0; i < columns; ++i) fn((*whole)[token * columns + i]);
        }
      }
    }
  }
  void Load(const std::vector<const std::vector<double>*>& wholes, GuardedTensor* mine) const {
    std::vector<T> values;
    ForEach(wholes, [&](double x) { values.push_back(FromDouble<T>(x)); });
    mine->Write(values);
  }
  template <typename U>
  void Store(GuardedTensor* mine, const std::vector<std::vector<double>*>& wholes) const {
    const std::vector<U> values = mine->Read<U>();
    size_t next = 0;
    ForEach(wholes, [&](double& x) { x = ToDouble(values[next++]); });
  }
  template <typename U>
  static void Poison(GuardedTensor* result) {
    result->Write(std::vector<U>(static_cast<size_t>(result->ref().elements()), FromDouble<U>(NAN)));
  }

  Context& ctx_;
  const JudgedLayer<T>& judged_;
  int cp_rank_;
  GuardedTensor q_, kv_, dout_, out_, lse_, dq_, dkv_;
};

// Collective.
template <typename T>
void ExpectEveryPlan(Context& ctx, Communicator cp, const std::vector<TransportKind>& kinds,
                     BlockGradients gradients) {
  const auto transports = std::make_shared<ExchangeTransports>(cp, LinkThrottle());
  for (const LayerKind& kind : kLayerKinds) {
    const JudgedLayer<T>& judged = JudgedLayerOf<T>(kind, cp.size(), gradients);
    LayerOnRank<T> layer(ctx, judged, cp.rank());
    for (const PlanChoice& choice : EveryPlan(cp.size())) {
      for (const TransportKind transport : kinds) {
        AttentionGeometry geometry(judged.layout, cp,
                                   {.forward = {choice}, .backward = {choice}, .transport = transport},
                                   transports);
        geometry.SetBatch(judged.sequences);
        const AttentionResults<double> got = layer.Run(geometry, judged.shape);
        const std::string what = absl::StrCat(kind.name, ", ", NameOf(choice, cp.size()), ", transport ",
                                              Name(transport), ", rank ", cp.rank());
        const auto refused = judged.Refused(got);
        EXPECT_TRUE(refused.empty()) << ::testing::PrintToString(refused) << "\n" << what;
        for (const auto& [result, growth] : judged.Growth(got, cp))
          EXPECT_LE(growth, judged.most_growth(result)) << result << ", " << what;
      }
    }
  }
}

// What the rule allows hides no mistake: where a window is one key too small, or the last chunk does not see
// all of the first, some rank refuses each result. Collective.
template <typename T>
void ExpectMissingKeysAreRefused(Context& ctx, Communicator cp, TransportKind transport,
                                 BlockGradients gradients) {
  for (const LayerKind& kind : kLayerKinds) {
    if (kind.documents != Documents::kNone) continue;
    SCOPED_TRACE(kind.name);
    const JudgedLayer<T>& judged = JudgedLayerOf<T>(kind, cp.size(), gradients);
    ContextAttentionShape wrong = judged.shape;
    wrong.window = wrong.window > 0 ? wrong.window - 1
                                    : judged.layout.padded_length() - judged.layout.chunks(0).front().rows;
    AttentionGeometry geometry(judged.layout, cp, {.transport = transport});
    geometry.SetBatch(judged.sequences);
    LayerOnRank<T> layer(ctx, judged, cp.rank());
    const auto refused = judged.Refused(layer.Run(geometry, wrong));
    for (const char* result : {"out", "lse", "dq", "dk", "dv"}) {
      const auto mine = static_cast<double>(refused.count(result));
      EXPECT_EQ(cp.AllReduceValue(mine, ReduceOp::kMax).value(), 1) << result;
    }
  }
}

}  // namespace annulus::testing
