#pragma once

#include <cstdint>

namespace annulus::kernels {

// Head dims, of keys and of values, for which there are kernels on tensor cores.
constexpr bool TensorCoreDims(int64_t dim, int64_t v_dim) {
  return (dim == 64 && v_dim == 64) || ((dim == 128 || dim == 192) && v_dim == 128);
}

}  // namespace annulus::kernels
