#include "kernels/common/tensor_map.h"
#include "src/device/cuda_call.h"

namespace annulus::kernels {
namespace {

constexpr unsigned kEncodeVersion = 12000;  // of the driver API
using Encode = decltype(&cuTensorMapEncodeTiled);

Encode EncodeFunction() {
  static const Encode encode = [] {
    const absl::StatusOr<void*> found = DriverFunction("cuTensorMapEncodeTiled", kEncodeVersion);
    return found.ok() ? reinterpret_cast<Encode>(*found) : nullptr;
  }();
  return encode;
}

}  // namespace

cudaError_t MakeTensorMap(const PanelsRef& x, int box_rows, int box_panels, CUtensorMap* map) {
  constexpr cuuint32_t kPanel = 64;
  constexpr cuuint64_t kBytes = sizeof(__nv_bfloat16);
  const Encode encode = EncodeFunction();
  if (encode == nullptr) return cudaErrorNotSupported;
  // The stride of a dimension of one may be anything; the driver wants one that it could use.
  const auto stride = [](int64_t count, int64_t elements) {
    return (count > 1 ? static_cast<cuuint64_t>(elements) : kPanel) * kBytes;
  };
  const cuuint64_t sizes[] = {kPanel, static_cast<cuuint64_t>(x.rows), static_cast<cuuint64_t>(x.panels),
                              static_cast<cuuint64_t>(x.batch)};
  const cuuint64_t strides[] = {stride(x.rows, x.row_stride), kPanel * kBytes,
                                stride(x.batch, x.batch_stride)};
  const cuuint32_t box[] = {kPanel, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(box_panels),
                            1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const CUresult made =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<__nv_bfloat16*>(x.data), sizes, strides,
             box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace annulus::kernels
