#pragma once

// What every backend must do, written once over a Communicator: run by each thread of a loopback group and by
// each process of an MPI job. Values are small integers, so every sum is exact.

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include "annulus/base/random.h"
#include "annulus/comm/communicator.h"
#include "support/loopback.h"

namespace annulus::testing {

template <typename T>
TensorRef RefOf(std::vector<T>& values) {
  return TensorRef(values.data(), DTypeOf<T>(), Device{}, Shape{static_cast<int64_t>(values.size())});
}

template <typename T>
T FromInteger(uint64_t value) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return ToBFloat16(static_cast<float>(value));
  else
    return static_cast<T>(value);
}

// Of integers that T holds.
template <typename T>
T Combined(ReduceOp op, T a, T b) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return ToBFloat16(Combined(op, ToFloat(a), ToFloat(b)));
  else
    return op == ReduceOp::kSum   ? static_cast<T>(a + b)
           : op == ReduceOp::kMax ? std::max(a, b)
                                  : std::min(a, b);
}

// Small integers that depend on (seed, rank, index).
template <typename T>
std::vector<T> Integers(int rank, int64_t elements, uint64_t seed) {
  std::vector<T> values(static_cast<size_t>(elements));
  for (size_t i = 0; i < values.size(); ++i) {
    const uint64_t mixed =
        (i + 1) * 0x9e3779b97f4a7c15u + (seed + 7 * static_cast<uint64_t>(rank)) * 0xbf58476d1ce4e5b9u;
    values[i] = FromInteger<T>((mixed >> 40) % 7);
  }
  return values;
}

template <typename T>
void CheckAllReduce(Communicator comm, int64_t elements) {
  for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kMax, ReduceOp::kMin}) {
    std::vector<T> expected = Integers<T>(0, elements, 1);
    for (int r = 1; r < comm.size(); ++r) {
      const std::vector<T> theirs = Integers<T>(r, elements, 1);
      for (size_t i = 0; i < expected.size(); ++i) expected[i] = Combined(op, expected[i], theirs[i]);
    }
    std::vector<T> values = Integers<T>(comm.rank(), elements, 1);
    ASSERT_TRUE(comm.AllReduce(RefOf(values), op).ok());
    EXPECT_EQ(values, expected) << elements << " elements";
  }
}

template <typename T>
void CheckReduceScatter(Communicator comm, int64_t part) {
  std::vector<T> expected(static_cast<size_t>(part), FromInteger<T>(0));
  for (int r = 0; r < comm.size(); ++r) {
    const std::vector<T> theirs = Integers<T>(r, part * comm.size(), 2);
    for (size_t i = 0; i < expected.size(); ++i) {
      expected[i] =
          Combined(ReduceOp::kSum, expected[i], theirs[static_cast<size_t>(part * comm.rank()) + i]);
    }
  }
  std::vector<T> in = Integers<T>(comm.rank(), part * comm.size(), 2), out(static_cast<size_t>(part));
  ASSERT_TRUE(comm.ReduceScatter(RefOf(in), RefOf(out)).ok());
  EXPECT_EQ(out, expected) << part << " elements a rank";

  const int64_t begin = part * comm.rank();
  ASSERT_TRUE(comm.ReduceScatter(RefOf(in), RefOf(in).Rows(begin, begin + part)).ok());
  const auto first = in.begin() + static_cast<std::ptrdiff_t>(begin);
  EXPECT_EQ(std::vector<T>(first, first + static_cast<std::ptrdiff_t>(part)), expected)
      << part << " elements a rank, in place";
}

template <typename T>
void CheckAllGather(Communicator comm, int64_t part) {
  std::vector<T> expected;
  for (int r = 0; r < comm.size(); ++r) {
    const std::vector<T> theirs = Integers<T>(r, part, 3);
    expected.insert(expected.end(), theirs.begin(), theirs.end());
  }
  std::vector<T> in = Integers<T>(comm.rank(), part, 3), out(expected.size());
  ASSERT_TRUE(comm.AllGather(RefOf(in), RefOf(out)).ok());
  EXPECT_EQ(out, expected) << part << " elements a rank";

  std::vector<T> in_place(expected.size());
  const int64_t begin = part * comm.rank();
  std::copy(in.begin(), in.end(), in_place.begin() + static_cast<std::ptrdiff_t>(begin));
  ASSERT_TRUE(comm.AllGather(RefOf(in_place).Rows(begin, begin + part), RefOf(in_place)).ok());
  EXPECT_EQ(in_place, expected) << part << " elements a rank, in place";
}

template <typename T>
void CheckBroadcast(Communicator comm, int64_t elements) {
  for (int root = 0; root < comm.size(); ++root) {
    std::vector<T> values = Integers<T>(comm.rank(), elements, 4);
    ASSERT_TRUE(comm.Broadcast(RefOf(values), root).ok());
    EXPECT_EQ(values, Integers<T>(root, elements, 4)) << elements << " elements from " << root;
  }
}

// bf16 sums are rounded once: 256 + 1 + 1 is 258, though 256 + 1 rounds to 256.
inline void CheckSumRounding(Communicator comm) {
  std::vector<BFloat16> values(3, ToBFloat16(comm.rank() == 0 ? 256.0f : 1.0f));
  const BFloat16 expected = ToBFloat16(256.0f + static_cast<float>(comm.size() - 1));
  ASSERT_TRUE(comm.AllReduce(RefOf(values), ReduceOp::kSum).ok());
  EXPECT_EQ(values, std::vector<BFloat16>(values.size(), expected));
}

template <typename T>
void CheckCollectives(Communicator comm) {
  for (const int64_t elements : {0, 1, 2, 3, 5, 64, 1021}) {
    CheckAllReduce<T>(comm, elements);
    CheckAllGather<T>(comm, elements);
    CheckBroadcast<T>(comm, elements);
    CheckReduceScatter<T>(comm, elements);
  }
}

inline double Dot(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

// <A x, y> = <x, A^T y>, summed over ranks: all-gather and reduce-scatter are each other's adjoint; the sum
// over all ranks is its own.
inline void CheckAdjoints(Communicator comm) {
  const int64_t part = 37, whole = part * comm.size();
  const auto total = [&](double value) { return comm.AllReduceValue(value, ReduceOp::kSum).value(); };
  std::vector<double> x = Integers<double>(comm.rank(), part, 5), y = Integers<double>(comm.rank(), whole, 6);
  std::vector<double> gathered(y.size()), scattered(x.size());
  ASSERT_TRUE(comm.AllGather(RefOf(x), RefOf(gathered)).ok());
  ASSERT_TRUE(comm.ReduceScatter(RefOf(y), RefOf(scattered)).ok());
  EXPECT_EQ(total(Dot(gathered, y)), total(Dot(x, scattered)));

  std::vector<double> u = Integers<double>(comm.rank(), part, 7), sum_x = x, sum_u = u;
  ASSERT_TRUE(comm.AllReduce(RefOf(sum_x), ReduceOp::kSum).ok());
  ASSERT_TRUE(comm.AllReduce(RefOf(sum_u), ReduceOp::kSum).ok());
  EXPECT_EQ(total(Dot(sum_x, u)), total(Dot(x, sum_u)));
}

// Sums of rounding operands are those of adding in rank order, at every position of a tensor of any size.
inline void CheckSumOrder(Communicator comm) {
  const int64_t elements = 5003;
  const RandomStream random(9, "sum order");
  const auto value = [&](int r, int64_t i) {
    return static_cast<float>(random.Normal(static_cast<uint64_t>(r * elements + i)));
  };
  std::vector<float> mine, expected;
  for (int64_t i = 0; i < elements; ++i) {
    mine.push_back(value(comm.rank(), i));
    float sum = value(0, i);
    for (int r = 1; r < comm.size(); ++r) sum += value(r, i);
    expected.push_back(sum);
  }
  ASSERT_TRUE(comm.AllReduce(RefOf(mine), ReduceOp::kSum).ok());
  EXPECT_EQ(mine, expected);
}

// Every pair, both ways at once, several messages per tag; receives of one pair and tag match in order.
inline void CheckMessages(Communicator comm) {
  constexpr int kMessages = 3;
  const int64_t elements = 20000;  // beyond what MPI sends eagerly
  const auto seed = [&](int from, int to, int m) {
    return static_cast<uint64_t>((from * 100 + to) * 10 + m);
  };
  std::vector<std::vector<int32_t>> sent, received, expected;
  for (int peer = 0; peer < comm.size(); ++peer) {
    for (int m = 0; m < kMessages; ++m) {
      sent.push_back(Integers<int32_t>(0, elements + m, seed(comm.rank(), peer, m)));
      expected.push_back(Integers<int32_t>(0, elements + m, seed(peer, comm.rank(), m)));
      received.emplace_back(expected.back().size());
    }
  }
  std::vector<Request> requests;
  for (int peer = 0; peer < comm.size(); ++peer) {
    for (int m = 0; m < kMessages; ++m) {
      const size_t i = static_cast<size_t>(peer * kMessages + m);
      const int tag = m == 2 ? Communicator::kMaxTag - 1 : 5;  // messages 0 and 1 share a tag
      absl::StatusOr<Request> receive = comm.Receive(RefOf(received[i]), peer, tag);
      absl::StatusOr<Request> send = comm.Send(RefOf(sent[i]), peer, tag);
      ASSERT_TRUE(receive.ok() && send.ok());
      requests.push_back(*std::move(receive));
      requests.push_back(*std::move(send));
    }
  }
  for (auto request = requests.rbegin(); request != requests.rend(); ++request)
    ASSERT_EQ(request->Wait(), absl::OkStatus());
  EXPECT_EQ(received, expected);
}

// Several collectives and a message under way at once; ranks wait for them in different orders.
inline void CheckBackground(Communicator comm) {
  const int64_t elements = 70001;
  const auto ones = [&](int64_t n) { return std::vector<float>(static_cast<size_t>(n), 1.0f); };
  std::vector<float> a = ones(elements), b = ones(elements), in = ones(elements * comm.size()),
                     out = ones(elements);
  std::vector<float> token(50000, static_cast<float>(comm.rank())), previous(token.size());
  const int next = (comm.rank() + 1) % comm.size(), last = (comm.rank() + comm.size() - 1) % comm.size();

  absl::StatusOr<Request> first = comm.IAllReduce(RefOf(a), ReduceOp::kSum);
  absl::StatusOr<Request> second = comm.IReduceScatter(RefOf(in), RefOf(out));
  absl::StatusOr<Request> third = comm.IAllReduce(RefOf(b), ReduceOp::kMax);
  ASSERT_TRUE(first.ok() && second.ok() && third.ok());
  if (comm.rank() % 2 == 1) {  // odd ranks send only after the sums that even ranks do not wait for yet
    ASSERT_TRUE(first->Wait().ok());
    ASSERT_TRUE(third->Wait().ok());
  }
  absl::StatusOr<Request> receive = comm.Receive(RefOf(previous), last, 0);
  absl::StatusOr<Request> send = comm.Send(RefOf(token), next, 0);
  ASSERT_TRUE(receive.ok() && send.ok());
  ASSERT_TRUE(receive->Wait().ok());
  ASSERT_TRUE(comm.Split(0, 0).ok());
  for (Request* request : {&*send, &*third, &*second, &*first}) ASSERT_TRUE(request->Wait().ok());

  const float size = static_cast<float>(comm.size());
  EXPECT_EQ(a, std::vector<float>(a.size(), size));
  EXPECT_EQ(out, std::vector<float>(out.size(), size));
  EXPECT_EQ(b, ones(elements));
  EXPECT_EQ(previous, std::vector<float>(previous.size(), static_cast<float>(last)));
}

inline void CheckAgreeOk(Communicator comm) {
  EXPECT_TRUE(comm.AgreeOk(absl::OkStatus()).ok());
  for (int failing = 0; failing < comm.size(); ++failing) {
    // `failing` and all above it fail; everyone sees the error of the lowest, by name unless all failed.
    const absl::Status mine =
        comm.rank() < failing ? absl::OkStatus() : absl::NotFoundError(absl::StrCat("file ", comm.rank()));
    const absl::Status agreed = comm.AgreeOk(mine);
    EXPECT_EQ(agreed.code(), absl::StatusCode::kNotFound);
    const std::string text = absl::StrCat("file ", failing);
    EXPECT_EQ(agreed.message(), failing == 0 ? text : absl::StrCat("rank ", failing, ": ", text));
    EXPECT_TRUE(IsAgreed(agreed));
    EXPECT_FALSE(IsAgreed(mine));
  }
}

inline void CheckStrings(Communicator comm) {
  const auto text = [](int r) {
    return r == 1 ? std::string() : std::string(static_cast<size_t>(3 * r + 1), 'a') + '\0';
  };
  for (int root = 0; root < comm.size(); ++root)
    EXPECT_EQ(comm.BroadcastString(text(comm.rank()), root).value(), text(root));
  std::vector<std::string> expected;
  for (int r = 0; r < comm.size(); ++r) expected.push_back(text(r));
  EXPECT_EQ(comm.AllGatherStrings(text(comm.rank())).value(), expected);
  EXPECT_EQ(comm.AllReduceValue(comm.rank() + 0.5, ReduceOp::kMax).value(), comm.size() - 0.5);
  EXPECT_TRUE(comm.Barrier().ok());
}

// Halves in reversed order, then halves of these; groups work side by side.
inline void CheckSplit(Communicator comm) {
  absl::StatusOr<Communicator> half = comm.Split(comm.rank() % 2, -comm.rank());
  ASSERT_TRUE(half.ok());
  const int members = (comm.size() + 1 - comm.rank() % 2) / 2;
  EXPECT_EQ(half->size(), members);
  EXPECT_EQ(half->rank(), members - 1 - comm.rank() / 2);
  EXPECT_EQ(half->AllReduceValue(comm.rank(), ReduceOp::kMin).value(), comm.rank() % 2);
  EXPECT_EQ(half->AllReduceValue(1, ReduceOp::kSum).value(), members);

  absl::StatusOr<Communicator> alone = half->Split(half->rank(), 0);
  ASSERT_TRUE(alone.ok());
  EXPECT_EQ(alone->size(), 1);
  EXPECT_EQ(alone->AllReduceValue(comm.rank(), ReduceOp::kSum).value(), comm.rank());
}

inline void CheckEveryDType(Communicator comm) {
  CheckCollectives<float>(comm);
  CheckCollectives<double>(comm);
  CheckCollectives<BFloat16>(comm);
  CheckCollectives<int32_t>(comm);
  CheckCollectives<int64_t>(comm);
  CheckCollectives<uint8_t>(comm);
}

inline void CheckCommunicator(Communicator comm) {
  CheckEveryDType(comm);
  CheckAdjoints(comm);
  CheckSumOrder(comm);
  CheckSumRounding(comm);
  CheckMessages(comm);
  CheckBackground(comm);
  CheckAgreeOk(comm);
  CheckStrings(comm);
  CheckSplit(comm);
}

// A message arrives no earlier than the delay after it was sent, however it is received.
inline void CheckDelay(Communicator comm) {
  constexpr double kDelayUs = 20000;
  Communicator slow = WithMessageDelay(comm, kDelayUs);
  CheckMessages(slow);
  absl::StatusOr<Communicator> split = slow.Split(0, slow.rank());
  ASSERT_TRUE(split.ok());
  for (Communicator* group : {&slow, &*split}) {
    std::vector<int64_t> out = {comm.rank()}, in = {-1};
    const int next = (comm.rank() + 1) % comm.size(), last = (comm.rank() + comm.size() - 1) % comm.size();
    ASSERT_TRUE(comm.Barrier().ok());
    const auto begin = std::chrono::steady_clock::now();
    absl::StatusOr<Request> receive = group->Receive(RefOf(in), last, 1);
    absl::StatusOr<Request> send = group->Send(RefOf(out), next, 1);
    ASSERT_TRUE(receive.ok() && send.ok());
    EXPECT_FALSE(receive->Test().value());
    ASSERT_TRUE(receive->Wait().ok());
    // The sender may have left the barrier a little earlier than this rank, hence the margin.
    EXPECT_GE(std::chrono::steady_clock::now() - begin,
              std::chrono::microseconds(static_cast<int>(kDelayUs) / 2));
    ASSERT_TRUE(send->Wait().ok());
    EXPECT_EQ(in[0], last);
  }
}

}  // namespace annulus::testing
