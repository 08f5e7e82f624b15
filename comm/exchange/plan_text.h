#pragma once

// Text of single steps, for printed plans and error messages.

#include <string>

#include "annulus/comm/exchange_plan.h"

namespace annulus {

bool IsCompute(StepKind kind);   // runs on the compute lane
bool IsTransfer(StepKind kind);  // kSend, kReceive

// "rank 2 step 5 (receive block 1 rows [0, 8) into slot 2 from rank 3, message 12)"
std::string StepText(const ExchangePlan& plan, int cp_rank, size_t step);
// "[0, 8)"
std::string RowsText(const RowRange& rows);

}  // namespace annulus
