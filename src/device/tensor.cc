#include "annulus/device/tensor.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace annulus {

std::string ToString(const Device& device) {
  return device.kind == DeviceKind::kCpu ? "cpu" : absl::StrCat("cuda:", device.index);
}

Shape::Shape(absl::Span<const int64_t> dims) : rank_(static_cast<int>(dims.size())) {
  ANNULUS_CHECK(rank_ <= kMaxRank) << "rank " << rank_;
  for (int i = 0; i < rank_; ++i) {
    ANNULUS_CHECK(dims[static_cast<size_t>(i)] >= 0) << "dim " << i << " is " << dims[static_cast<size_t>(i)];
    dims_[static_cast<size_t>(i)] = dims[static_cast<size_t>(i)];
  }
}

int64_t Shape::elements() const {
  int64_t n = 1;
  for (int i = 0; i < rank_; ++i)
    ANNULUS_CHECK(!__builtin_mul_overflow(n, dims_[static_cast<size_t>(i)], &n)) << ToString(*this);
  return n;
}

std::string ToString(const Shape& shape) { return absl::StrCat("[", absl::StrJoin(shape.dims(), ", "), "]"); }

}  // namespace annulus
