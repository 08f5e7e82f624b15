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

TEST(Gpu, KernelsRunOnWhatTheyWereCompiledFor) {
  const auto runs = [](absl::string_view architectures, int major, int minor) {
    return CheckArchitectures(architectures, major, minor).ok();
  };
  EXPECT_TRUE(runs("80-real", 8, 0) && runs("80-real", 8, 9));
  EXPECT_FALSE(runs("80-real", 7, 5) || runs("80-real", 9, 0) || runs("89-real", 8, 6));
  EXPECT_TRUE(runs("80", 9, 0) && runs("80-virtual", 12, 1));
  EXPECT_FALSE(runs("80", 7, 5) || runs("100-virtual", 9, 0));
  EXPECT_TRUE(runs("90a-real", 9, 0) && runs("90a", 9, 0));
  EXPECT_FALSE(runs("90a-real", 8, 0) || runs("90a", 10, 0) || runs("90a-virtual", 10, 0));
  EXPECT_TRUE(runs("100-real", 10, 3) && runs("80-real,90a-real", 8, 0) && runs("80-real,90a-real", 9, 0));
  EXPECT_FALSE(runs("80-real,90a-real", 10, 0) || runs("", 9, 0));
}

TEST(Gpu, KernelsForHopperNeedBothItAndTheirArchitecture) {
  EXPECT_TRUE(HaveHopperKernels("90a-real", 9, 0) && HaveHopperKernels("80,90a", 9, 0));
  EXPECT_FALSE(HaveHopperKernels("80", 9, 0)) << "compiled by the driver they have no body";
  EXPECT_FALSE(HaveHopperKernels("90a-real", 10, 0) || HaveHopperKernels("80-real,90a-real", 8, 0));
  EXPECT_FALSE(HaveHopperKernels("", 9, 0) || RunsHopperKernels(Device{}));
}

TEST(Gpu, WithoutKernelsItIsSaidWhatToBuildWith) {
  const auto message = [](int major, int minor) {
    return std::string(CheckArchitectures("100-real,120-real", major, minor).message());
  };
  EXPECT_EQ(message(9, 0),
            "this program has kernels for 100-real,120-real, none for compute capability 9.0: build with "
            "-DANNULUS_CUDA_ARCHITECTURES=90a-real");
  EXPECT_NE(message(8, 6).find("=86-real"), std::string::npos) << message(8, 6);
  EXPECT_NE(message(7, 5).find("needs 8.0 or newer"), std::string::npos) << message(7, 5);
  EXPECT_EQ(GpuArchitectures().empty(), CudaVersion() == "none") << GpuArchitectures();
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
