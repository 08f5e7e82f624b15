// `annulus doctor`: what this machine has for Annulus, what is missing and how to get it.

#include <cblas.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_split.h"
#include "annulus/base/file.h"
#include "annulus/comm/communicator.h"
#include "annulus/train/report.h"
#include "commands.h"

namespace annulus {
namespace {

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

bool OnPath(const std::string& program) {
  const char* path = std::getenv("PATH");
  for (absl::string_view folder : absl::StrSplit(path == nullptr ? "" : path, ':')) {
    if (access(absl::StrCat(folder, "/", program).c_str(), X_OK) == 0) return true;
  }
  return false;
}

void Item(const char* name, const std::string& value) { std::printf("%-10s %s\n", name, value.c_str()); }

absl::Status Run(const Arguments&, const std::string&) {
  int missing = 0;
  utsname system{};
  uname(&system);
  Item("system", absl::StrCat(system.sysname, " ", system.release, " ", system.machine));
  Item("cpu", absl::StrCat(ProcValue("/proc/cpuinfo", "model name"), ", ",
                           std::thread::hardware_concurrency(), " cores usable"));
  Item("memory", absl::StrCat("total ", ProcValue("/proc/meminfo", "MemTotal"), ", available ",
                              ProcValue("/proc/meminfo", "MemAvailable")));
  Item("compiler", absl::StrCat("built with gcc ", __VERSION__));
  Item("blas",
       absl::StrCat(openblas_get_config(), "; core ", openblas_get_corename(), "; ",
                    openblas_get_num_threads(), " threads (launch/mpirun sets OPENBLAS_NUM_THREADS=1)"));
  Item("mpi", MpiLibraryVersion());
  if (OnPath("mpirun")) {
    Item("mpirun", "found");
  } else {
    Item("mpirun", "MISSING: apt-get install openmpi-bin");
    ++missing;
  }
  // The CPU program needs no GPU; what is there is only reported.
  if (Exists("/proc/driver/nvidia/version")) {
    Item("gpu", "NVIDIA driver found; this build computes on CPUs only (the CUDA side is planned)");
  } else {
    Item("gpu", "none found; not needed: this build computes on CPUs");
  }
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
