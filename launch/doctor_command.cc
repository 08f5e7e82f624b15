// `annulus doctor`: what this machine has for Annulus, what is missing and how to get it.

#include <cblas.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <set>
#include <thread>

#include "absl/base/config.h"
#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "annulus/base/file.h"
#include "annulus/comm/exchange_transport.h"
#include "annulus/comm/gpu_communicator.h"
#include "annulus/device/gpu.h"
#include "annulus/ops/attention.h"
#include "annulus/train/config.h"
#include "commands.h"

namespace annulus {
namespace {

#ifdef __clang__
constexpr char kCompiler[] = "clang";
#else
constexpr char kCompiler[] = "gcc";
#endif

// Value of `key` in a "key : value" file of /proc; empty if there is none.
std::string ProcValue(const char* path, absl::string_view key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const std::vector<std::string> parts = absl::StrSplit(line, absl::MaxSplits(':', 1));
    if (parts.size() == 2 && absl::StartsWith(parts[0], key)) {
      return std::string(absl::StripAsciiWhitespace(parts[1]));
    }
  }
  return "";
}

void Item(const char* name, const std::string& value) { std::printf("%-10s %s\n", name, value.c_str()); }

// First line that `mpirun --version` prints; empty when there is no mpirun.
std::string MpirunVersion() {
  std::FILE* pipe = popen("mpirun --version 2>/dev/null", "r");
  if (pipe == nullptr) return "";
  char line[256] = {};
  const bool read = std::fgets(line, sizeof(line), pipe) != nullptr;
  pclose(pipe);
  return read ? std::string(absl::StripAsciiWhitespace(line)) : "";
}

// The last word of "Open MPI v4.1.4" or "mpirun (Open MPI) 4.1.4", without a leading v.
absl::string_view VersionIn(absl::string_view text) {
  const size_t space = text.rfind(' ');
  if (space != absl::string_view::npos) text.remove_prefix(space + 1);
  absl::ConsumePrefix(&text, "v");
  return text;
}

// Says what mpirun there is; false if it is missing or does not fit the MPI library that is linked.
bool CheckMpirun() {
  const std::string mpirun = MpirunVersion(), library = MpiLibraryVersion();
  Item("mpi", library);
  if (mpirun.empty()) {
    Item("mpirun", "MISSING: apt-get install openmpi-bin");
    return false;
  }
  const bool fits = VersionIn(mpirun) == VersionIn(library);
  Item("mpirun",
       absl::StrCat(mpirun, fits ? "" : ": DIFFERS from the MPI library; build again with this mpirun's"));
  return fits;
}

// "hopper", "cuda mma, cudnn": of both passes and every mask.
std::string AttentionKernelsOf(int gpu) {
  std::set<absl::string_view> names;
  AttentionKernelCase c{.device = DeviceKind::kCuda,
                        .hopper = RunsHopperKernels({DeviceKind::kCuda, gpu}),
                        .dtype = DType::kBF16};
  for (const auto& [dim, v_dim] : {std::pair(64, 64), {128, 128}, {192, 128}}) {
    for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
      for (const MaskShape shape : {MaskShape::kGeneral, MaskShape::kFull, MaskShape::kCausal}) {
        c.dim = dim, c.v_dim = v_dim, c.pass = pass, c.mask_shape = shape;
        names.insert(Name(ChooseAttentionKernel(c)));
      }
    }
  }
  return absl::StrJoin(names, ", ");
}

// No GPU is needed; false if one that is there cannot be used.
bool CheckGpus() {
  bool usable = true;
  const std::string architectures = GpuArchitectures();
  Item("cuda", absl::StrCat(CudaVersion(), architectures.empty() ? "" : ", kernels for ", architectures));
  Item("nccl", NcclVersion());
  Item("cudnn", CudnnVersion());
  if (GpuCount() == 0) Item("gpu", absl::StrCat("none, training is on CPUs: ", WhyNoGpu()));
  for (int i = 0; i < GpuCount(); ++i) {
    const absl::StatusOr<GpuInfo> gpu = DescribeGpu(i);
    const absl::Status built =
        gpu.ok() ? CheckArchitectures(architectures, gpu->compute_major, gpu->compute_minor) : gpu.status();
    usable = usable && built.ok();
    std::string text = absl::StrCat(i, ": ");
    if (gpu.ok()) {
      absl::StrAppendFormat(&text, "%s, %.1f GiB, compute capability %d.%d", gpu->name,
                            static_cast<double>(gpu->memory_bytes) / (int64_t{1} << 30), gpu->compute_major,
                            gpu->compute_minor);
    }
    if (built.ok()) absl::StrAppend(&text, "; attention in bf16 by ", AttentionKernelsOf(i));
    if (!built.ok()) absl::StrAppend(&text, gpu.ok() ? "; " : "", "UNUSABLE: ", built.message());
    Item("gpu", text);
  }
  return usable;
}

// Which ways of exchanging attention blocks ranks on this host have.
std::string TransportsText() {
  const std::string host = absl::StrCat(Name(TransportKind::kHost), " (MPI)"),
                    nccl(Name(TransportKind::kNccl)), copies(Name(TransportKind::kCopyEngine));
  if (GpuCount() == 0) return absl::StrCat(host, "; ", nccl, " and ", copies, " need GPUs: ", WhyNoGpu());
  for (int from = 0; from < GpuCount(); ++from) {
    for (int to = 0; to < GpuCount(); ++to) {
      const absl::StatusOr<bool> maps = GpuMaps(from, to);
      if (maps.ok() && *maps) continue;
      return absl::StrCat(host, ", ", nccl, " for ranks with a GPU each; no ", copies, ": gpu ", from,
                          " cannot map the memory of gpu ", to);
    }
  }
  return absl::StrCat(host, ", ", copies, ", ", nccl, " for ranks with a GPU each");
}

absl::Status Run(const Arguments&, const std::string&) {
  int missing = 0;
  utsname system{};
  uname(&system);
  Item("system", absl::StrCat(system.sysname, " ", system.release, " ", system.machine));
  Item("cpu", absl::StrCat(ProcValue("/proc/cpuinfo", "model name"), ", ",
                           std::thread::hardware_concurrency(), " cores usable"));
  Item("memory", absl::StrCat("total ", ProcValue("/proc/meminfo", "MemTotal"), ", available ",
                              ProcValue("/proc/meminfo", "MemAvailable")));
  Item("annulus", absl::StrCat(ANNULUS_VERSION, ", built with ", kCompiler, " ", __VERSION__));
  Item("libraries", absl::StrCat("protobuf ", ProtobufVersion(), ", Abseil ", ABSL_LTS_RELEASE_VERSION, ".",
                                 ABSL_LTS_RELEASE_PATCH_LEVEL));
  Item("blas",
       absl::StrCat(openblas_get_config(), "; core ", openblas_get_corename(), "; ",
                    openblas_get_num_threads(), " threads (launch/mpirun sets OPENBLAS_NUM_THREADS=1)"));
  if (!CheckMpirun()) ++missing;
  if (!CheckGpus()) ++missing;
  Item("exchange", TransportsText());
  char directory[4096] = {};
  const bool writable = getcwd(directory, sizeof(directory)) != nullptr && access(directory, W_OK) == 0;
  Item("directory",
       absl::StrCat(directory, writable ? " (writable)" : " (NOT writable: runs need --run_dir elsewhere)"));
  if (!writable) ++missing;
  if (missing > 0)
    return absl::FailedPreconditionError(absl::StrCat(missing, " of the above must be mended"));
  std::printf("all that Annulus needs is here\n");
  return absl::OkStatus();
}

}  // namespace

Command DoctorCommand() {
  return {{"doctor", "", "says what this machine has, what is missing and how to get it", {}}, Run};
}

}  // namespace annulus
