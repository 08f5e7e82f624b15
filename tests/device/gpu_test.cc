// Holds with and without CUDA, with and without a GPU.
#include "annulus/device/gpu.h"

#include <gtest/gtest.h>

#include <utility>

namespace annulus {
namespace {

TEST(Gpu, PeaksAreThoseOfTheDatasheets) {
  const auto peak = [](absl::string_view name, double memory_gb) {
    const GpuPeak found = PeakOfGpu(name, static_cast<int64_t>(memory_gb * 1e9));
    return std::pair(found.bf16_tflops, found.memory_gb_per_second);
  };
  EXPECT_EQ(peak("NVIDIA H200", 151), std::pair(989.4, 4800.0));
  EXPECT_EQ(peak("NVIDIA H100 80GB HBM3", 85), std::pair(989.4, 3352.0));
  EXPECT_EQ(peak("NVIDIA H100 PCIe", 85), std::pair(756.0, 2039.0));
  EXPECT_EQ(peak("NVIDIA A100-SXM4-80GB", 85), std::pair(312.0, 2039.0));
  EXPECT_EQ(peak("NVIDIA A100-SXM4-40GB", 42.3), std::pair(312.0, 1555.0));
  for (const char* unknown : {"", "NVIDIA H200 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
                              "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "Tesla T4"}) {
    EXPECT_EQ(peak(unknown, 80), std::pair(0.0, 0.0)) << unknown;
  }
}

TEST(Gpu, AReasonIsGivenExactlyWhereThereIsNone) {
  EXPECT_EQ(WhyNoGpu().empty(), GpuCount() > 0) << WhyNoGpu();
  const int beyond = GpuCount();
  EXPECT_EQ(UseGpu(beyond).code(), absl::StatusCode::kNotFound) << UseGpu(beyond);
  EXPECT_EQ(DescribeGpu(beyond).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(UseGpu(-1).code(), absl::StatusCode::kNotFound);
  EXPECT_NE(UseGpu(beyond).message().find(absl::StrCat("cuda:", beyond)), absl::string_view::npos);
  EXPECT_EQ(MemoryOfGpu().ok(), GpuCount() > 0) << MemoryOfGpu().status();
  EXPECT_EQ(CudaVersion() == "none", WhyNoGpu() == "built without CUDA") << CudaVersion();
}

}  // namespace
}  // namespace annulus
