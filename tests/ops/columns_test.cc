#include "annulus/ops/columns.h"

#include "ops/harness.h"

namespace annulus::testing {
namespace {

struct Move {
  const char* name;
  std::vector<ColumnRun> runs;
};

constexpr int64_t kFrom = 23, kTo = 17;  // columns of x and y
const std::vector<Move>& Moves() {
  static const std::vector<Move> moves = {
      {"nothing", {}},
      {"an empty run", {{4, 4, 0}}},
      {"one column", {{22, 0, 1}}},
      {"heads of keys and values", {{4, 0, 4}, {12, 4, 4}, {20, 9, 2}}},
      {"columns of x twice", {{3, 0, 5}, {3, 5, 5}}},
      {"columns of y twice", {{0, 2, 6}, {6, 2, 6}, {12, 8, 4}}},
      {"overlapping by a part, three times", {{0, 0, 8}, {8, 4, 8}, {16, 6, 4}}},
      {"every column on its own", [] {
         std::vector<ColumnRun> runs;
         for (int64_t i = 0; i < kTo; ++i) runs.push_back({kTo - 1 - i, i, 1});
         return runs;
       }()}};
  return moves;
}

template <typename T>
class ColumnsTest : public ::testing::Test {};
TYPED_TEST_SUITE(ColumnsTest, FloatTypes);

// Element by element, in the order of the runs.
template <typename To, typename From>
std::vector<To> Moved(const std::vector<From>& x, const std::vector<ColumnRun>& runs, Write write,
                      std::vector<To> y, size_t rows) {
  for (size_t row = 0; row < rows; ++row) {
    std::vector<bool> written(kTo, write == Write::kAccumulate);
    for (const ColumnRun& run : runs) {
      for (int64_t i = 0; i < run.columns; ++i) {
        const auto from = row * kFrom + static_cast<size_t>(run.from + i);
        const auto to = static_cast<size_t>(run.to + i);
        To& sum = y[row * kTo + to];
        sum = static_cast<To>(written[to] ? sum + x[from] : x[from]);
        written[to] = true;
      }
    }
  }
  return y;
}

template <typename From, typename To>
void ExpectMoves() {
  Context ctx{Device{}};
  for (const auto& [rows, batch] : {std::pair<int64_t, int64_t>{0, 2}, {1, 1}, {5, 3}}) {
    for (const Move& move : Moves()) {
      for (const Write write : {Write::kOverwrite, Write::kAccumulate}) {
        SCOPED_TRACE(::testing::Message() << move.name << ", " << rows << " rows, " << Name(DTypeOf<From>())
                                          << " to " << Name(DTypeOf<To>()));
        const auto before_x = NormalValues<From>(rows * batch * kFrom, "x");
        const auto before_y = NormalValues<To>(rows * batch * kTo, "y");
        Guarded<From> x({rows, batch, kFrom}, before_x);
        Guarded<To> y({rows, batch, kTo}, before_y);
        ANNULUS_CHECK_OK(MoveColumns(ctx, x.ref(), move.runs, write, y.ref()));
        EXPECT_EQ(y.values(), Moved(before_x, move.runs, write, before_y, static_cast<size_t>(rows * batch)));
        EXPECT_EQ(x.values(), before_x);
      }
    }
  }
}

TYPED_TEST(ColumnsTest, MoveAndAdd) {
  ExpectMoves<TypeParam, TypeParam>();
  ExpectMoves<TypeParam, Wide<float>>();
  ExpectMoves<TypeParam, float>();
}

TEST(Columns, PollsWhileItMoves) {
  Context ctx{Device{}};
  int polls = 0;
  ctx.progress = [&] { ++polls; };
  Guarded<float> x({1000, 1, 1000}, 1.0f), y({1000, 1, 1000}, 2.0f);
  const std::vector<ColumnRun> all = {{0, 0, 1000}};
  ANNULUS_CHECK_OK(MoveColumns(ctx, x.ref(), all, Write::kAccumulate, y.ref()));
  EXPECT_GE(polls, 10);
}

TEST(Columns, RefusesByName) {
  Context ctx{Device{}};
  Guarded<float> x({2, 3, 4}, 0.0f), y({2, 3, 5}, 0.0f), other({3, 2, 5}, 0.0f);
  const auto move = [&](const TensorRef& to, const ColumnRun& run) {
    return MoveColumns(ctx, x.ref(), {run}, Write::kOverwrite, to);
  };
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  ANNULUS_CHECK_OK(move(y.ref(), {0, 1, 4}));
  ExpectRefused(move(other.ref(), {0, 0, 1}), kInvalid, "y=[3, 2, 5]");
  ExpectRefused(move(y.ref(), {1, 0, 4}), kInvalid, "4 columns from 1 to 0");
  ExpectRefused(move(y.ref(), {0, 2, 4}), kInvalid, "4 columns from 0 to 2");
  ExpectRefused(move(y.ref(), {-1, 0, 2}), kInvalid, "2 columns from -1");
  ExpectRefused(move(y.ref(), {0, 0, -2}), kInvalid, "-2 columns");
  std::vector<int32_t> values(30);
  ExpectRefused(move(TensorRef(values.data(), DType::kI32, Device{}, {2, 3, 5}), {0, 0, 1}), kInvalid,
                "move_columns.y");
}

}  // namespace
}  // namespace annulus::testing
