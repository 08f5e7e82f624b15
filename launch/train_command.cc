#include <unistd.h>

#include <cstdio>

#include "annulus/base/file.h"
#include "annulus/train/run.h"
#include "commands.h"

namespace annulus {
namespace {

// How long other ranks leave an error to rank 0, which prints what all agreed on and ends the job.
constexpr unsigned kGraceSeconds = 2;

// Rank 0 reads, all ranks check: a wrong file gives every rank the same error.
absl::StatusOr<ResolvedConfig> LoadEverywhere(Communicator world, const Arguments& arguments) {
  const std::string& path = arguments.operand();
  absl::StatusOr<std::string> text = world.rank() == 0 ? ReadFile(path) : std::string();
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(text.status()));
  ANNULUS_ASSIGN_OR_RETURN(const std::string agreed, world.BroadcastString(*text, 0));
  return LoadConfig(path, agreed, arguments.All("--set"), world.size());
}

absl::Status Train(Communicator world, const Arguments& arguments, const std::string& command_line) {
  ANNULUS_ASSIGN_OR_RETURN(const ResolvedConfig config, LoadEverywhere(world, arguments));
  return TrainRun(world, config,
                  {.run_dir = arguments.Last("--run_dir", ""),
                   .start = arguments.Has("--resume") ? StartFrom::kLatestCheckpoint : StartFrom::kScratch,
                   .command = command_line});
}

absl::Status Run(const Arguments& arguments, const std::string& command_line) {
  InstallStopSignals();
  ANNULUS_ASSIGN_OR_RETURN(MpiSession session, MpiSession::Start(nullptr, nullptr));
  const int rank = session.world().rank();
  const absl::Status status = Train(session.world(), arguments, command_line);
  if (status.ok()) return status;
  // Another rank may be inside a collective that will never complete: the job ends here, not in MPI_Finalize.
  if (rank != 0) sleep(kGraceSeconds);
  const std::string where = rank == 0 ? "" : absl::StrCat("rank ", rank, ": ");
  std::fprintf(stderr, "error: %s%s\n", where.c_str(), std::string(status.message()).c_str());
  MpiSession::Abort(1);
}

}  // namespace

Command TrainCommand() {
  return {{"train",
           "CONFIG",
           "trains the model of a configuration on all ranks of mpirun",
           {{"--set", Option::Takes::kValue, "PATH=VALUE", "overrides a field, e.g. optim.steps=100; repeatable"},
            {"--run_dir", Option::Takes::kValue, "DIR", "run directory (default: <runs_dir>/<name>-<UTC>-<hash>)"},
            {"--resume", Option::Takes::kNothing, "", "goes on from the newest checkpoint of --run_dir"}}},
          Run};
}

}  // namespace annulus
