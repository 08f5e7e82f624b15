// Checks what launchers do beyond the ops (tests/gpu) against f64 on the CPU, and times every kernel beside
// the ceilings of the device.
//     build/tests/cuda_check [parts]     e l a: checks of elementwise, linear, attention; E L A: their times,
//     S: those of recurrent layers

#include <cublasLt.h>
#if ANNULUS_HAS_CUDNN
#include <cudnn.h>
#endif

#include <chrono>

#include "cuda/harness.h"

int main(int argc, char** argv) {
  using namespace annulus::testing;
  const std::string parts = argc > 1 ? argv[1] : "elaELAS";
  setvbuf(stdout, nullptr, _IOLBF, 0);
  cudaDeviceProp device;
  Must(cudaGetDeviceProperties(&device, 0), "device");
  Must(cudaStreamCreateWithFlags(&g_stream, cudaStreamDefault), "stream");
  std::printf("%s, %d SMs, cuBLASLt %zu\n", device.name, device.multiProcessorCount, cublasLtGetVersion());
  const auto run = [&](char part, const char* name, void (*fn)()) {
    if (parts.find(part) == std::string::npos) return;
    const auto start = std::chrono::steady_clock::now();
    fn();
    std::printf("----  %s: %.1f s\n", name,
                std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  };
  run('E', "time elementwise", TimeElementwise);
  run('S', "time recurrent layers", TimeStateSpace);
  run('L', "time linear", TimeLinear);
#if ANNULUS_HAS_CUDNN
  std::printf("cuDNN %zu\n", cudnnGetVersion());
  run('A', "time attention", TimeAttention);
  run('a', "check attention", CheckAttention);
#endif
  run('l', "check linear", CheckLinear);
  run('e', "check elementwise", CheckElementwise);
  for (const Row& r : Table()) {
    std::printf("check %-36s %3d cases  error %.2e  allowed %.2e\n", r.name.c_str(), r.cases, r.error,
                r.allowed);
  }
  std::printf("%d checks, %d failures\n", g_checks, g_failures);
  return g_failures == 0 ? 0 : 1;
}
