// ranks: 2 3 4
#include "comm/exchange_execute_checks.h"
#include "support/mpi_main.h"

namespace annulus {
namespace {

TEST(MpiMessages, MoveAllFields) { testing::CheckMixedFields(testing::World()); }
TEST(MpiMessages, HoldThrottledLinks) { testing::CheckThrottledTimes(testing::World()); }

}  // namespace
}  // namespace annulus
