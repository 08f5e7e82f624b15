#pragma once

namespace annulus {

// How a matrix enters a product.
enum class Transpose { kNo, kYes };

}  // namespace annulus
