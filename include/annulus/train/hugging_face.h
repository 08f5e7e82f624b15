#pragma once

// Models as folders of Hugging Face's Transformers: config.json and weights in safetensors, both ways.
//
//   LlamaForCausalLM       (A -)^n        rotary positions, plain, Llama-3 or YaRN
//   DeepseekV3ForCausalLM  (T -)^n        latent attention, without experts
//   Mamba2ForCausalLM      M^n
//   NemotronHForCausalLM   any of M, A, -  one branch a layer; no positions; squared ReLU
//   FalconH1ForCausalLM    (M+A -)^n
//   AnnulusForCausalLM     any of M, A, T, - and sums of them: a class of our own, whose code is written
//                          beside the weights (modeling_annulus.py)
//
// A latent's norms have an epsilon of 1e-6 there, whatever the model's. In a DeepseekV3 folder the pairs of a
// rotation may be neighbours ("rope_interleave"); they are put apart on import.

#include <memory>
#include <string>

#include "annulus/train/optimizer.h"

namespace annulus {

// The first class of the list above that can hold the model. InvalidArgument says what keeps it out of the
// most general one.
absl::StatusOr<std::string> HfArchitecture(const ModelSpec& spec);

struct HfExport {
  std::string directory;                   // made if need be
  DType dtype = DType::kF32;               // or BF16, F64; A_log, D and dt_bias are never BF16
  int64_t max_length = 0;                  // tokens; for information; 0: not said
  int64_t shard_bytes = int64_t{5} << 30;  // of a file of weights, and of memory
};
// Writes the model whose parameters `find` gives as whole host tensors.
absl::Status ExportHuggingFace(const ModelSpec& spec, const TensorFinder& find, const HfExport& to);

// A folder to import from; every tensor was found in it with the expected shape.
class HfFolder {
 public:
  static absl::StatusOr<HfFolder> Open(const std::string& directory);
  HfFolder(HfFolder&&) noexcept;
  ~HfFolder();

  const std::string& architecture() const { return architecture_; }
  const ModelSpec& spec() const { return spec_; }
  int64_t max_length() const { return max_length_; }
  // A whole parameter as F32 or F64.   info: of BuildParamTable(spec())
  absl::StatusOr<Tensor> Read(const ParamInfo& info, DType dtype) const;

 private:
  struct Contents;
  HfFolder();
  absl::Status CheckTensors() const;
  absl::Status CheckTiedHead() const;

  std::string architecture_;
  ModelSpec spec_;
  int64_t max_length_ = 0;
  std::unique_ptr<Contents> contents_;
};

// The section `model { ... }` of a configuration; LoadConfig gives the same spec.
std::string ModelText(const ModelSpec& spec);
// The same as an override of LoadConfig, in place of the model of another run.
std::string ModelOverride(const ModelSpec& spec);
// Its pattern, with repetitions as groups: "((M -)^3 T{g=2} -)^8".
std::string PatternText(const ModelSpec& spec);

}  // namespace annulus
