#include "model_checkpoint.h"

#include <algorithm>

#include "annulus/base/file.h"
#include "annulus/model/params.h"
#include "annulus/train/checkpoint.h"

namespace annulus {

absl::Status SaveModel(const std::string& run_dir, const ResolvedConfig& config,
                       std::vector<NamedTensor> parameters) {
  if (Exists(run_dir + "/metrics.jsonl")) {
    return Invalid("--out=", run_dir, ": already holds a run; expected a new directory");
  }
  int64_t most = 0;
  for (const NamedTensor& parameter : parameters) most = std::max(most, parameter.tensor.elements());
  // One piece of zeros stands for every moment.
  const DType dtype = parameters.front().tensor.dtype();
  const Tensor zeros(Device{}, dtype, {most});
  std::vector<NamedTensor> tensors = parameters;
  for (const NamedTensor& parameter : parameters) {
    const ConstTensorRef zero(zeros.ref().raw(), dtype, Device{}, parameter.tensor.shape());
    tensors.push_back({"optim.m." + parameter.name, zero});
    tensors.push_back({"optim.v." + parameter.name, zero});
  }
  const RunSpec& spec = config.spec;
  const CheckpointMeta meta{.step = 0,
                            .consumed_sequences = 0,
                            .seed = spec.seed,
                            .data_fingerprint = 0,
                            .model_fingerprint = Fingerprint(BuildParamTable(spec.model)),
                            .config = config.text};
  ANNULUS_RETURN_IF_ERROR(MakeDirectories(run_dir));
  Communicator alone = MakeLoopbackGroup(1)[0];
  ANNULUS_RETURN_IF_ERROR(SaveCheckpoint(alone, run_dir + "/ckpt", meta, std::move(tensors), 1));
  ANNULUS_RETURN_IF_ERROR(WriteFileAtomically(run_dir + "/config.textproto", config.text));
  return WriteFileAtomically(run_dir + "/metrics.jsonl", "");  // it marks a run
}

}  // namespace annulus
