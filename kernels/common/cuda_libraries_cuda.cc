#include "kernels/common/cuda_libraries.h"

namespace annulus::kernels {
namespace {

template <typename Library>
std::unique_ptr<Library> Made(absl::StatusOr<std::unique_ptr<Library>> library) {
  ANNULUS_CHECK(library.ok()) << library.status();
  return std::move(library).value();
}

}  // namespace

CudaLibraries::CudaLibraries(Device device)
    : cublas_lt_(Made(CublasLt::Create())), cublas_lt_workspace_(device, kCublasLtWorkspaceBytes) {}

CudaLinearCall CudaLibraries::Linear(const Context& ctx) const {
  return {.library = cublas_lt_.get(),
          .workspace = {cublas_lt_workspace_.data(), cublas_lt_workspace_.bytes()},
          .stream = ctx.stream()};
}

#if ANNULUS_HAS_CUDNN
CudnnAttention& CudaLibraries::Cudnn() {
  if (cudnn_ == nullptr) cudnn_ = Made(CudnnAttention::Create());
  return *cudnn_;
}
#endif

CudaLibraries& LibrariesOf(Context& ctx) {
  if (ctx.ops == nullptr) ctx.ops = std::make_unique<CudaLibraries>(ctx.device);
  return static_cast<CudaLibraries&>(*ctx.ops);
}

}  // namespace annulus::kernels
