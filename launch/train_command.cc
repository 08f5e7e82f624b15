#include <unistd.h>

#include <cstdio>

#include "annulus/base/file.h"
#include "annulus/device/gpu.h"
#include "annulus/train/placement.h"
#include "annulus/train/run.h"
#include "commands.h"

namespace annulus {
namespace {

// Rank 0 reads, all ranks check: a wrong file gives every rank the same error.
absl::StatusOr<ResolvedConfig> LoadEverywhere(Communicator world, const Arguments& arguments) {
  const std::string& path = arguments.operand();
  absl::StatusOr<std::string> text = world.rank() == 0 ? ReadFile(path) : std::string();
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(text.status()));
  ANNULUS_ASSIGN_OR_RETURN(const std::string agreed, world.BroadcastString(*text, 0));
  absl::StatusOr<ResolvedConfig> config = LoadConfig(path, agreed, arguments.All("--set"), world.size());
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(config.status()));
  return config;
}

// The other ranks may be inside a collective that will never complete: the job ends here and now.
[[noreturn]] void EndJob(int rank, const absl::Status& status) {
  std::fprintf(stderr, "error: rank %d: %s\n", rank, std::string(status.message()).c_str());
  MpiSession::Abort(1);
}

absl::Status Train(Communicator world, const Arguments& arguments, const std::string& command_line) {
  ANNULUS_ASSIGN_OR_RETURN(ResolvedConfig config, LoadEverywhere(world, arguments));
  ANNULUS_RETURN_IF_ERROR(ResolveDevice(world, GpuCount(), &config.spec));
  return TrainRun(world, config,
                  {.run_dir = arguments.Last("--run_dir", ""),
                   .start = arguments.Has("--resume") ? StartFrom::kLatestCheckpoint : StartFrom::kScratch,
                   .command = command_line,
                   .fail_alone = [&](const absl::Status& status) { EndJob(world.rank(), status); }});
}

absl::Status Run(const Arguments& arguments, const std::string& command_line) {
  ANNULUS_ASSIGN_OR_RETURN(MpiSession session, MpiSession::Start(nullptr, nullptr));
  const int rank = session.world().rank();
  InstallStopSignals(rank);
  const absl::Status status = Train(session.world(), arguments, command_line);
  if (status.ok()) return status;
  if (!IsAgreed(status)) EndJob(rank, status);
  if (rank == 0) return status;
  return absl::CancelledError();  // rank 0 reports it
}

}  // namespace

Command TrainCommand() {
  return {
      {"train",
       "CONFIG",
       "trains the model of a configuration on all ranks of mpirun",
       {{"--set", Option::Takes::kValue, "PATH=VALUE", "overrides a field, e.g. optim.steps=100; repeatable"},
        {"--run_dir", Option::Takes::kValue, "DIR",
         "run directory (default: <runs_dir>/<name>-<UTC>-<hash>)"},
        {"--resume", Option::Takes::kNothing, "", "goes on from the newest checkpoint of --run_dir"}}},
      Run};
}

}  // namespace annulus
