#pragma once

// main() of an MPI test: every rank runs every test; a failure on any rank fails all of them.
//
//   // ranks: 1 2 3 4
//   #include "support/mpi_main.h"
//   TEST(Ring, Sums) { Communicator world = annulus::testing::World(); ... }

#include <gtest/gtest.h>

#include <cstdio>

#include "annulus/comm/communicator.h"

namespace annulus::testing {

inline Communicator& World() {
  static Communicator world;
  return world;
}

}  // namespace annulus::testing

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  absl::StatusOr<annulus::MpiSession> session = annulus::MpiSession::Start(&argc, &argv);
  if (!session.ok()) {
    std::fprintf(stderr, "%s\n", session.status().ToString().c_str());
    return 1;
  }
  annulus::testing::World() = session->world();
  if (session->world().rank() != 0) {
    auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
  }
  const int failed = RUN_ALL_TESTS();
  const absl::StatusOr<double> worst = session->world().AllReduceValue(failed, annulus::ReduceOp::kMax);
  annulus::testing::World() = annulus::Communicator();
  return worst.ok() ? static_cast<int>(*worst) : 1;
}
