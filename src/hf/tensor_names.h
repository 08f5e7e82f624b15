#pragma once

// Which tensors a class of Transformers has and where our parameters lie in them. The names are data: one
// table serves export and import.

#include <string>
#include <vector>

#include "annulus/model/params.h"

namespace annulus {

enum class HfClass { kLlama, kDeepseekV3, kMamba2, kNemotronH, kFalconH1, kAnnulus };
inline constexpr HfClass kHfClasses[] = {HfClass::kLlama,     HfClass::kDeepseekV3, HfClass::kMamba2,
                                         HfClass::kNemotronH, HfClass::kFalconH1,   HfClass::kAnnulus};

// How a class groups our layers: so many of ours, with these branches, make one of its.
struct HfLayout {
  struct Place {
    BranchKind kind;
    const char* prefix;  // "self_attn."
  };
  enum class Takes { kAll, kOne, kSome };  // of the branches, by one of our layers
  struct Layer {
    const char* norm;
    std::vector<Place> branches;
    Takes takes = Takes::kAll;
  };
  const char* architecture;  // "LlamaForCausalLM"
  const char* model_type;    // "llama"
  const char* embedding;
  const char* layers;  // "model.layers."
  const char* final_norm;
  std::vector<Layer> block;
};
const HfLayout& LayoutOf(HfClass of);

// Where one of our parameters lies in a tensor, as matrices: its element (r, c) is the tensor's
// (row + r, column + c). Of rope_rows > 0: the last so many of every period rows are pairs of one rotation,
// in the tensor (2i, 2i + 1), here (i, i + rope_rows / 2).
struct HfPart {
  int param = 0;  // index in the table
  int64_t row = 0, column = 0;
  int64_t period = 0, rope_rows = 0;
};
struct HfTensor {
  std::string name;
  Shape shape;
  std::vector<HfPart> parts;  // disjoint; they cover it
};

enum class RopePairs { kHalves, kInterleaved };

// Every tensor of a model that fits the class. With a tied head there is no tensor for it.
std::vector<HfTensor> HfTensors(HfClass of, const ModelSpec& spec, const ParamTable& table, RopePairs pairs);

// A parameter's elements into their places in a tensor, and back. F32, F64 and BF16 are converted; data may
// be unaligned.
void Pack(const HfPart& part, ConstTensorRef param, TensorRef tensor);
void Unpack(const HfPart& part, ConstTensorRef tensor, TensorRef param);

}  // namespace annulus
