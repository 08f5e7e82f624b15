#include "collective.h"

#include <cstdio>

#include "annulus/base/file.h"
#include "annulus/device/gpu.h"
#include "annulus/train/config.h"
#include "annulus/train/placement.h"

namespace annulus {

absl::Status OnAllRanks(const std::function<absl::Status(Communicator world)>& run) {
  ANNULUS_ASSIGN_OR_RETURN(MpiSession session, MpiSession::Start(nullptr, nullptr));
  const absl::Status status = run(session.world());
  if (status.ok()) return status;
  if (!IsAgreed(status)) {
    std::fprintf(stderr, "error: rank %d: %s\n", session.world().rank(),
                 std::string(status.message()).c_str());
    MpiSession::Abort(1);
  }
  return session.world().rank() == 0 ? status : absl::CancelledError();
}

namespace {

absl::StatusOr<RunSpec> LoadSpec(const Arguments& arguments, int world) {
  std::string text =
      "name: \"bench\" model { pattern: \"A\" d_model: 64 attention { heads: 1 } mlp { d_ff: 1 } } "
      "data { train { text { path: \"-\" } } seq_len: 1 } "
      "optim { adamw { lr: 1 } steps: 1 sequences_per_step: 1 } step_deadline_seconds: 120";
  std::string name = "bench";
  if (arguments.Has("--config")) {
    name = arguments.Last("--config", "");
    ANNULUS_ASSIGN_OR_RETURN(text, ReadFile(name));
  }
  std::vector<std::string> overrides;
  if (!arguments.Has("--config")) overrides.push_back(absl::StrCat("parallel.cp=", world));
  const std::pair<const char*, const char*> fields[] = {
      {"--profile", "profile"}, {"--transport", "transport"}, {"--throttle", "throttle_gb_per_second"}};
  for (const auto& [option, field] : fields) {
    for (const std::string& value : arguments.All(option)) {
      overrides.push_back(absl::StrCat("parallel.exchange.", field, "=", value));
    }
  }
  for (const std::string& set : arguments.All("--set")) overrides.push_back(set);
  ANNULUS_ASSIGN_OR_RETURN(ResolvedConfig config, LoadConfig(name, text, overrides, world));
  return config.spec;
}

}  // namespace

absl::StatusOr<RunSpec> SpecOf(const Arguments& arguments, Communicator world, const absl::Status& checked) {
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(checked));
  absl::StatusOr<RunSpec> spec = LoadSpec(arguments, world.size());
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(spec.status()));
  ANNULUS_RETURN_IF_ERROR(ResolveDevice(world, GpuCount(), &*spec));
  return spec;
}

}  // namespace annulus
