// States and halos handed along sequences of every layout, against what one pass over all segments in order
// gives.

#include "annulus/parallel/state_passing.h"

#include <gtest/gtest.h>

#include <cmath>

#include "annulus/base/random.h"
#include "annulus/device/transfer.h"
#include "parallel/sequences.h"
#include "support/loopback.h"

namespace annulus::testing {
namespace {

constexpr int64_t kHeads = 3, kKeys = 2, kValues = 4;  // heads: of all sequences of the batch
enum class Kind { kDecay, kMatrix };

// By place in the chain of segments.
struct Chain {
  Kind kind;
  StateOrder order;
  int64_t transition_elements() const { return kHeads * (kind == Kind::kDecay ? 1 : kKeys * kKeys); }
  static constexpr int64_t kStateElements = kHeads * kKeys * kValues;

  std::vector<double> Transition(int64_t place) const {
    return Normal("transition", place, transition_elements());
  }
  std::vector<double> State(int64_t place) const { return Normal("state", place, kStateElements); }

  // What a segment makes of the state before it.
  std::vector<double> Advance(int64_t place, const std::vector<double>& in) const {
    const std::vector<double> t = Transition(place);
    std::vector<double> out = State(place);
    for (int64_t h = 0; h < kHeads; ++h) {
      for (int64_t k = 0; k < kKeys; ++k) {
        for (int64_t j = 0; j < kKeys; ++j) {
          double factor = k == j ? t[static_cast<size_t>(h % transition_elements())] : 0;
          if (kind == Kind::kMatrix) {
            const int64_t row = order == StateOrder::kForward ? k : j,
                          column = order == StateOrder::kForward ? j : k;
            factor = t[static_cast<size_t>((h * kKeys + row) * kKeys + column)];
          }
          for (int64_t v = 0; v < kValues; ++v) {
            out[static_cast<size_t>((h * kKeys + k) * kValues + v)] +=
                factor * in[static_cast<size_t>((h * kKeys + j) * kValues + v)];
          }
        }
      }
    }
    return out;
  }

  // What comes to each of `places` segments.
  std::vector<std::vector<double>> Incoming(int64_t places) const {
    std::vector<std::vector<double>> incoming(static_cast<size_t>(places));
    std::vector<double> state(kStateElements, 0.0);
    for (int64_t i = 0; i < places; ++i) {
      const int64_t place = order == StateOrder::kForward ? i : places - 1 - i;
      incoming[static_cast<size_t>(place)] = state;
      state = Advance(place, state);
    }
    return incoming;
  }

 private:
  static std::vector<double> Normal(const std::string& name, int64_t place, int64_t n) {
    const RandomStream random(static_cast<uint64_t>(place) + 1, name);
    std::vector<double> values;
    for (int64_t i = 0; i < n; ++i) values.push_back(0.7 * random.Normal(static_cast<uint64_t>(i)));
    return values;
  }
};

// Place of a chunk among all chunks of the sequence.
int64_t PlaceOf(const LayoutChunk& chunk) { return chunk.position / chunk.rows; }

void CheckStates(LayoutKind layout, int ranks, const Chain& chain, StateMethod method) {
  SCOPED_TRACE(absl::StrCat(NameOf(layout), ", ", ranks, " ranks, matrix ", chain.kind == Kind::kMatrix,
                            ", backward ", chain.order == StateOrder::kBackward, ", scan ",
                            method == StateMethod::kScan));
  OnLoopback(ranks, [&](Communicator cp) {
    Context ctx{Device{}};
    AttentionGeometry geometry(SequenceLayout(layout, 4 * ranks, ranks), cp);
    geometry.SetBatch({.batch = 1, .lengths = {4 * ranks}, .document_starts = {}});
    const std::vector<LayoutChunk> chunks = geometry.layout().chunks(cp.rank());
    const int64_t segments = static_cast<int64_t>(chunks.size());
    const Shape transition =
        chain.kind == Kind::kDecay ? Shape{segments, kHeads} : Shape{segments, kHeads, kKeys * kKeys};
    const Tensor t(Device{}, DType::kF64, transition),
        s(Device{}, DType::kF64, {segments, kHeads, kKeys, kValues});
    const Tensor incoming(Device{}, DType::kF64, s.ref().shape());
    for (int64_t i = 0; i < segments; ++i) {
      const int64_t place = PlaceOf(chunks[static_cast<size_t>(i)]);
      const std::vector<double> values = chain.Transition(place), states = chain.State(place);
      std::copy(values.begin(), values.end(), t.ref().data<double>() + i * chain.transition_elements());
      std::copy(states.begin(), states.end(), s.ref().data<double>() + i * Chain::kStateElements);
    }
    absl::StatusOr<StatePassing> passing =
        StatePassing::Start(ctx, geometry, chain.order, {t.ref(), s.ref()}, method);
    ANNULUS_CHECK_OK(passing.status());
    ANNULUS_CHECK_OK(passing->Finish(ctx, incoming.ref()));
    const int64_t all = segments * ranks;
    const std::vector<std::vector<double>> expected = chain.Incoming(all);
    for (int64_t i = 0; i < segments; ++i) {
      const std::vector<double>& want =
          expected[static_cast<size_t>(PlaceOf(chunks[static_cast<size_t>(i)]))];
      for (int64_t j = 0; j < Chain::kStateElements; ++j) {
        const double got = incoming.ref().data<double>()[i * Chain::kStateElements + j];
        EXPECT_NEAR(got, want[static_cast<size_t>(j)], 1e-10 * (1 + std::abs(want[static_cast<size_t>(j)])))
            << "rank " << cp.rank() << ", segment " << i << ", element " << j;
      }
    }
  });
}

// Of summaries; the method is chosen by the number of ranks.
int64_t MostStateBytes(LayoutKind layout, int ranks, StateOrder order) {
  int64_t most = 0;
  OnLoopback(ranks, [&](Communicator cp) {
    Context ctx{Device{}};
    AttentionGeometry geometry(SequenceLayout(layout, 4 * ranks, ranks), cp);
    const int64_t segments = static_cast<int64_t>(geometry.layout().chunks(0).size());
    const Tensor t(Device{}, DType::kF32, {segments, kHeads}),
        s(Device{}, DType::kF32, {segments, kHeads, 2, 4});
    const Tensor incoming(Device{}, DType::kF32, s.ref().shape());
    for (const Tensor* tensor : {&t, &s}) ZeroBytes(tensor->ref(), ctx.stream());
    absl::StatusOr<StatePassing> passing = StatePassing::Start(ctx, geometry, order, {t.ref(), s.ref()});
    ANNULUS_CHECK_OK(passing.status());
    ANNULUS_CHECK_OK(passing->Finish(ctx, incoming.ref()));
    const double sent = cp.AllReduceValue(static_cast<double>(passing->bytes_sent()), ReduceOp::kMax).value();
    if (cp.rank() == 0) most = static_cast<int64_t>(sent);
  });
  return most;
}

TEST(StateBytesSent, AreThoseOfTheRankThatSendsMost) {
  constexpr int64_t kSummary = kHeads * (1 + 2 * 4) * 4;
  for (const LayoutKind layout : {LayoutKind::kContiguous, LayoutKind::kZigzag}) {
    for (const int ranks : {1, 2, 3, 8, 9, 12}) {
      for (const StateOrder order : {StateOrder::kForward, StateOrder::kBackward}) {
        const SequenceLayout of_ranks(layout, 4 * ranks, ranks);
        EXPECT_EQ(StateBytesSent(of_ranks, order, kSummary), MostStateBytes(layout, ranks, order))
            << NameOf(layout) << ", " << ranks << " ranks, backward " << (order == StateOrder::kBackward);
      }
    }
  }
}

TEST(StatePassing, GivesEverySegmentTheStateBeforeIt) {
  for (const LayoutKind layout : {LayoutKind::kContiguous, LayoutKind::kZigzag}) {
    for (int ranks = 1; ranks <= 6; ++ranks) {
      for (const Kind kind : {Kind::kDecay, Kind::kMatrix}) {
        for (const StateOrder order : {StateOrder::kForward, StateOrder::kBackward}) {
          for (const StateMethod method : {StateMethod::kGather, StateMethod::kScan}) {
            CheckStates(layout, ranks, {kind, order}, method);
          }
        }
      }
    }
  }
}

// Many ranks scan: fewer bytes than gathering would send, and no more for longer sequences.
TEST(StatePassing, BytesDoNotGrowWithTheSequence) {
  const auto bytes = [](int64_t length, int ranks) {
    int64_t sent = 0;
    OnLoopback(ranks, [&](Communicator cp) {
      Context ctx{Device{}};
      AttentionGeometry geometry(SequenceLayout(LayoutKind::kZigzag, length, ranks), cp);
      geometry.SetBatch({.batch = 1, .lengths = {length}, .document_starts = {}});
      const Tensor t(Device{}, DType::kF64, {2, kHeads}),
          s(Device{}, DType::kF64, {2, kHeads, kKeys, kValues});
      absl::StatusOr<StatePassing> passing =
          StatePassing::Start(ctx, geometry, StateOrder::kForward, {t.ref(), s.ref()});
      ANNULUS_CHECK_OK(passing.status());
      const Tensor incoming(Device{}, DType::kF64, s.ref().shape());
      ANNULUS_CHECK_OK(passing->Finish(ctx, incoming.ref()));
      if (cp.rank() == ranks / 2) sent = passing->bytes_sent();
    });
    return sent;
  };
  const int64_t piece = 8 * (kHeads + kHeads * kKeys * kValues);
  EXPECT_EQ(bytes(64, 4), 2 * 3 * piece);
  EXPECT_EQ(bytes(6400, 4), 2 * 3 * piece);
  EXPECT_EQ(bytes(6400, 12), bytes(96, 12));
  EXPECT_LT(bytes(6400, 12), 2 * 11 * piece);
}

TEST(StatePassing, RefusesStripedLayouts) {
  EXPECT_TRUE(CheckSegments(LayoutKind::kStriped, 1).ok());
  const absl::Status status = CheckSegments(LayoutKind::kStriped, 2);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(std::string(status.message()).find("parallel.layout=STRIPED"), std::string::npos);
}

// Rows hold their position: halo rows must hold the positions before, 0 where there is none. The adjoint is
// checked by <halo(x), y> = <x, adjoint(y)> with integers.
void CheckHalo(LayoutKind layout, int ranks, int64_t length, int64_t width) {
  SCOPED_TRACE(absl::StrCat(NameOf(layout), ", ", ranks, " ranks, length ", length, ", width ", width));
  constexpr int64_t kBatch = 2, kColumns = 3;
  std::vector<double> forward(static_cast<size_t>(ranks)), adjoint(static_cast<size_t>(ranks));
  OnLoopback(ranks, [&](Communicator cp) {
    Context ctx{Device{}};
    AttentionGeometry geometry(SequenceLayout(layout, length, ranks), cp);
    geometry.SetBatch({.batch = kBatch, .lengths = {length, length}, .document_starts = {}});
    const std::vector<LayoutChunk> chunks = geometry.layout().chunks(cp.rank());
    const int64_t segments = static_cast<int64_t>(chunks.size());
    const Shape shape{segments, width, kBatch, kColumns};
    const Tensor edges(Device{}, DType::kF64, shape), halo(Device{}, DType::kF64, shape);
    const Tensor dhalo(Device{}, DType::kF64, shape), dedges(Device{}, DType::kF64, shape);
    const RandomStream random(static_cast<uint64_t>(cp.rank()) + 3, "halo");
    const auto at = [&](const Tensor& t, int64_t s, int64_t w, int64_t item, int64_t c) -> double& {
      return t.ref().data<double>()[((s * width + w) * kBatch + item) * kColumns + c];
    };
    const auto value = [](int64_t position, int64_t item, int64_t c) {
      return static_cast<double>(100 * position + 10 * item + c + 1);
    };
    for (int64_t s = 0; s < segments; ++s) {
      const LayoutChunk& chunk = chunks[static_cast<size_t>(s)];
      for (int64_t w = 0; w < width; ++w) {
        const int64_t row = chunk.rows - width + w;
        for (int64_t item = 0; item < kBatch; ++item) {
          for (int64_t c = 0; c < kColumns; ++c) {
            at(edges, s, w, item, c) = row < 0 ? std::nan("") : value(chunk.position + row, item, c);
            const uint64_t index = static_cast<uint64_t>(((s * width + w) * kBatch + item) * kColumns + c);
            at(dhalo, s, w, item, c) = static_cast<double>(random.Below(index, 9)) - 4;
          }
        }
      }
    }
    absl::StatusOr<HaloExchange> exchange = HaloExchange::Start(ctx, geometry, edges.ref(), halo.ref());
    ANNULUS_CHECK_OK(exchange.status());
    ANNULUS_CHECK_OK(exchange->Finish(ctx));
    absl::StatusOr<HaloExchange> back = HaloExchange::StartBackward(ctx, geometry, dhalo.ref(), dedges.ref());
    ANNULUS_CHECK_OK(back.status());
    ANNULUS_CHECK_OK(back->Finish(ctx));
    for (int64_t s = 0; s < segments; ++s) {
      const LayoutChunk& chunk = chunks[static_cast<size_t>(s)];
      for (int64_t w = 0; w < width; ++w) {
        const int64_t position = chunk.position - width + w, row = chunk.rows - width + w;
        for (int64_t item = 0; item < kBatch; ++item) {
          for (int64_t c = 0; c < kColumns; ++c) {
            EXPECT_EQ(at(halo, s, w, item, c), position < 0 ? 0 : value(position, item, c));
            forward[static_cast<size_t>(cp.rank())] += at(halo, s, w, item, c) * at(dhalo, s, w, item, c);
            if (row < 0) continue;
            adjoint[static_cast<size_t>(cp.rank())] += at(edges, s, w, item, c) * at(dedges, s, w, item, c);
          }
        }
      }
    }
  });
  double left = 0, right = 0;
  for (int r = 0; r < ranks; ++r)
    left += forward[static_cast<size_t>(r)], right += adjoint[static_cast<size_t>(r)];
  EXPECT_EQ(left, right);
}

TEST(HaloExchange, BringsTheRowsBeforeAndTakesTheirGradientsBack) {
  for (const LayoutKind layout : {LayoutKind::kContiguous, LayoutKind::kZigzag}) {
    for (int ranks = 1; ranks <= 5; ++ranks) {
      for (const int64_t length : {1, 7, 16, 41}) {
        for (const int64_t width : {1, 3, 5}) CheckHalo(layout, ranks, length, width);
      }
    }
  }
}

}  // namespace
}  // namespace annulus::testing
