#pragma once

namespace annulus::testing {

// Prints what the compiler made of each kernel of the forward and the backward, and of their variants.
void PrintForwardResources();
void PrintBackwardResources();

}  // namespace annulus::testing
