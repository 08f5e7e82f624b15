#include "comm/exchange_execute_checks.h"

namespace annulus {
namespace {

class LoopbackExchange : public ::testing::TestWithParam<int> {};

TEST_P(LoopbackExchange, ComputesEveryPairOnce) { testing::OnLoopback(GetParam(), testing::CheckExecute); }
TEST_P(LoopbackExchange, IsRightWhateverIsLate) { testing::OnLoopback(GetParam(), testing::CheckDelays); }
TEST_P(LoopbackExchange, IsRightOverThrottledLinks) {
  testing::OnLoopback(GetParam(), testing::CheckThrottledResults);
}
TEST_P(LoopbackExchange, SurvivesAFailingStep) {
  testing::OnLoopback(GetParam(), testing::CheckFailingStepByHost);
}
TEST_P(LoopbackExchange, RefusesDifferentPlans) { testing::OnLoopback(GetParam(), testing::CheckAgreement); }

INSTANTIATE_TEST_SUITE_P(Ranks, LoopbackExchange, ::testing::Range(1, 9));

class LoopbackMessages : public ::testing::TestWithParam<int> {};

TEST_P(LoopbackMessages, MoveAllFields) { testing::OnLoopback(GetParam(), testing::CheckMixedFields); }
TEST_P(LoopbackMessages, HoldThrottledLinks) {
  testing::OnLoopback(GetParam(), testing::CheckThrottledTimes);
}

INSTANTIATE_TEST_SUITE_P(Ranks, LoopbackMessages, ::testing::Range(2, 5));

}  // namespace
}  // namespace annulus
