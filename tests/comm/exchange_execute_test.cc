#include "comm/exchange_execute_checks.h"

namespace annulus {
namespace {

class LoopbackExchange : public ::testing::TestWithParam<int> {};

TEST_P(LoopbackExchange, ComputesEveryPairOnce) { testing::OnLoopback(GetParam(), testing::CheckExecute); }
TEST_P(LoopbackExchange, SurvivesAFailingAttend) {
  testing::OnLoopback(GetParam(), testing::CheckFailingAttend);
}
TEST_P(LoopbackExchange, RefusesDifferentPlans) { testing::OnLoopback(GetParam(), testing::CheckAgreement); }

INSTANTIATE_TEST_SUITE_P(Ranks, LoopbackExchange, ::testing::Range(1, 9));

}  // namespace
}  // namespace annulus
