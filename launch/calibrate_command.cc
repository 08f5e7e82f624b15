// `annulus calibrate`: what this machine can do, as a profile that plans are chosen by.

#include <chrono>
#include <cstdio>

#include "annulus/base/file.h"
#include "annulus/train/calibrate.h"
#include "annulus/train/profile.h"
#include "collective.h"

namespace annulus {
namespace {

absl::Status IntOption(const Arguments& arguments, absl::string_view option, int64_t* value) {
  ANNULUS_ASSIGN_OR_RETURN(const std::optional<int64_t> given, arguments.PositiveInt(option));
  *value = given.value_or(*value);
  return absl::OkStatus();
}

// The heads that options ask for; none if they ask for no head dim.
absl::StatusOr<std::vector<CalibrationHeads>> HeadsOf(const Arguments& arguments, DeviceKind device) {
  const bool cpu = device == DeviceKind::kCpu;
  CalibrationHeads heads{.heads = cpu ? 4 : 16};
  ANNULUS_RETURN_IF_ERROR(IntOption(arguments, "--heads", &heads.heads));
  heads.kv_heads = heads.heads;
  ANNULUS_RETURN_IF_ERROR(IntOption(arguments, "--kv_heads", &heads.kv_heads));
  heads.head_dim = cpu ? 32 : 128;
  ANNULUS_RETURN_IF_ERROR(IntOption(arguments, "--head_dim", &heads.head_dim));
  heads.v_head_dim = heads.head_dim;
  ANNULUS_RETURN_IF_ERROR(IntOption(arguments, "--v_head_dim", &heads.v_head_dim));
  if (heads.heads % heads.kv_heads != 0) {
    return Invalid("--kv_heads=", heads.kv_heads, ": expected a divisor of --heads=", heads.heads);
  }
  for (const char* option : {"--heads", "--kv_heads", "--head_dim", "--v_head_dim"}) {
    if (!arguments.Has(option)) continue;
    const bool bf16 = AttentionSupports(device, DType::kBF16, heads.head_dim, heads.v_head_dim);
    heads.dtype = bf16 ? DType::kBF16 : DType::kF32;
    if (AttentionSupports(device, heads.dtype, heads.head_dim, heads.v_head_dim)) return std::vector{heads};
    return Invalid("--head_dim=", heads.head_dim, ", --v_head_dim=", heads.v_head_dim,
                   ": expected heads that there is a kernel for (on GPUs at most 256)");
  }
  return std::vector<CalibrationHeads>();
}

constexpr char kDefaultOut[] = "machine.textproto";

// Plans and their links are of no meaning here: links are measured as they are.
absl::Status CheckFields(const Arguments& arguments) {
  for (const std::string& set : arguments.All("--set")) {
    const std::string path = set.substr(0, set.find('='));
    if (path == "device" || path == "step_deadline_seconds") continue;
    return Invalid("annulus calibrate: --set ", set, ": ", path,
                   " means nothing to it: expected device or step_deadline_seconds");
  }
  return absl::OkStatus();
}

absl::Status RunOn(Communicator world, const Arguments& arguments) {
  const auto start = std::chrono::steady_clock::now();
  const bool root = world.rank() == 0;
  ANNULUS_ASSIGN_OR_RETURN(const RunSpec spec, SpecOf(arguments, world, CheckFields(arguments)));
  ANNULUS_ASSIGN_OR_RETURN(const Device device, PlaceRank(world, spec));
  const absl::StatusOr<std::vector<CalibrationHeads>> heads = HeadsOf(arguments, device.kind);
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(heads.status()));
  const absl::StatusOr<double> seconds = arguments.PositiveNumber("--seconds", 40);
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(seconds.status()));
  ANNULUS_RETURN_IF_ERROR(
      world.AgreeOk(root ? CheckOutputFile(arguments, "--out", kDefaultOut) : absl::OkStatus()));
  ANNULUS_ASSIGN_OR_RETURN(Machine machine, SetUpWatchedMachine(world, spec, device));
  ANNULUS_ASSIGN_OR_RETURN(
      const MachineProfile profile,
      Calibrate(machine, {.heads = *heads, .seconds = *seconds, .progress = [&](const auto& what) {
                            machine.ctx->recorder.Note("calibrate", what, nullptr);
                            if (root) std::fprintf(stderr, "measuring %s\n", what.c_str());
                          }}));
  const std::string path = arguments.Last("--out", kDefaultOut);
  ANNULUS_RETURN_IF_ERROR(
      world.AgreeOk(root ? WriteFileAtomically(path, ProfileText(profile)) : absl::OkStatus()));
  if (!root) return absl::OkStatus();
  const double took = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf(
      "%s\nwritten to %s after %.0f s; a run uses it with parallel { exchange { profile: \"%s\" } }\n",
      ProfileTable(profile).c_str(), path.c_str(), took, path.c_str());
  if (world.size() == 1)
    std::printf(
        "links were not measured, so AUTO cannot choose between plans of several ranks by this profile: for "
        "those measure with launch/mpirun -n 2 annulus calibrate, or more ranks\n");
  return absl::OkStatus();
}

absl::Status Run(const Arguments& arguments, const std::string&) {
  return OnAllRanks([&](Communicator world) { return RunOn(std::move(world), arguments); });
}

}  // namespace

Command CalibrateCommand() {
  return {{"calibrate",
           "",
           "measures kernels, copies and links on all ranks of mpirun, for the choice of plans",
           {{"--out", Option::Takes::kValue, "FILE", "the profile (default machine.textproto)"},
            {"--seconds", Option::Takes::kValue, "S",
             "fewer sizes of kernels once as long has passed (default 40)"},
            {"--heads", Option::Takes::kValue, "H", "query heads, in place of a choice of shapes"},
            {"--kv_heads", Option::Takes::kValue, "H", "KV heads (default: heads)"},
            {"--head_dim", Option::Takes::kValue, "D", "head dim (default 128, on CPUs 32)"},
            {"--v_head_dim", Option::Takes::kValue, "D", "head dim of values (default: head_dim)"},
            {"--set", Option::Takes::kValue, "PATH=VALUE",
             "overrides a field: device or step_deadline_seconds; repeatable"}}},
          Run};
}

}  // namespace annulus
