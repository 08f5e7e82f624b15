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

// Panels of 128 bytes, whatever they hold.
template <typename Panels>
cudaError_t Make(const Panels& x, CUtensorMapDataType type, int box_rows, int box_panels, CUtensorMap* map) {
  constexpr cuuint64_t kBytes = sizeof(*x.data);
  constexpr cuuint32_t kPanel = 128 / kBytes;
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
  void* data = const_cast<void*>(static_cast<const void*>(x.data));
  const CUresult made = encode(map, type, 4, data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t MakeTensorMap(const PanelsRef& x, int box_rows, int box_panels, CUtensorMap* map) {
  return Make(x, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, box_rows, box_panels, map);
}

cudaError_t MakeTensorMap(const SumPanelsRef& x, int box_rows, int box_panels, CUtensorMap* map) {
  return Make(x, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, box_rows, box_panels, map);
}

}  // namespace annulus::kernels
