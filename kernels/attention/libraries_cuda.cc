#include "annulus/ops/attention.h"

#if ANNULUS_HAS_CUDNN
#include <cudnn.h>

#include "absl/strings/str_cat.h"
#endif

namespace annulus {

std::string CudnnVersion() {
#if ANNULUS_HAS_CUDNN
  const size_t version = cudnnGetVersion();  // 91900 for 9.19.0
  return absl::StrCat("cuDNN ", version / 10000, ".", version / 100 % 100, ".", version % 100);
#else
  return "left out: built without the headers of cuDNN's frontend; attention takes the own kernel";
#endif
}

}  // namespace annulus
