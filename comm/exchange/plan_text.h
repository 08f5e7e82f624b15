#pragma once

// Text of single steps, for printed plans and error messages.

#include <string>

#include "annulus/comm/exchange_plan.h"

namespace annulus {

// "query", "kv", "output", "query gradient", "kv gradient"
const char* Name(Payload payload);
// "rank 2 step 5 (receive kv of block 1 rows [0, 8) into slot 2 from rank 3, message 12)"; also of steps that
// name slots that do not exist.
std::string StepText(const ExchangePlan& plan, int cp_rank, size_t step);
// "[0, 8)"
std::string RowsText(const RowRange& rows);
// "block 1 rows [0, 8)"
std::string RowsText(const BlockRows& rows);

}  // namespace annulus
