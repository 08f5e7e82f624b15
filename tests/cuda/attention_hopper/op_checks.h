#pragma once

#include <string>

namespace annulus::testing {

// The kernel for Hopper, cuDNN and the portable kernel through the op on so many random shapes and masks:
// each within the rule of its f64 reference.
bool CheckAgreement(int cases);

// The op for Hopper gives the same bits every time where they are required.
bool CheckOpRepeats(int repeats);

// The op for Hopper with every operand and result before addresses that have no memory behind them: whatever
// is read or written past an end is a fault, and results are those of other memory. Ends the process where
// nothing was wrong, by reading there to see that it is a fault: with 0 if it is one.
bool CheckGuardPages();

// "agree", "repeats" or "guard".
bool CheckOp(const std::string& what);

}  // namespace annulus::testing
