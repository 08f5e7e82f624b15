// Packs parameters into the tensors of a class and writes them, a file's worth of memory at a time.

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "annulus/base/file.h"
#include "annulus/train/hugging_face.h"
#include "model_config.h"
#include "modeling_code.h"

namespace annulus {
namespace {

using nlohmann::json;

absl::StatusOr<HfClass> ClassFor(const ModelSpec& spec) {
  for (const HfClass of : kHfClasses) {
    if (Misfits(of, spec).empty()) return of;
  }
  return Invalid("no class of Transformers can hold this model; the most general one falls short by\n",
                 Misfits(HfClass::kAnnulus, spec));
}

// Of state-space parameters the wide ones stay so.
DType DTypeOf(const HfTensor& tensor, const ParamTable& table, DType dtype) {
  const ParamInfo& first = table.params[static_cast<size_t>(tensor.parts.front().param)];
  const bool wide = table.buckets[static_cast<size_t>(first.bucket)].wide;
  return wide && dtype == DType::kBF16 ? DType::kF32 : dtype;
}

absl::Status CheckParameter(const ParamInfo& info, ConstTensorRef value) {
  const bool known = value.dtype() == DType::kF32 || value.dtype() == DType::kF64;
  if (known && value.shape() == info.logical) return absl::OkStatus();
  return Invalid("parameter ", info.name, ": ", Name(value.dtype()), " ", ToString(value.shape()),
                 ": expected f32 or f64 ", ToString(info.logical));
}

class Exporter {
 public:
  Exporter(HfClass of, const ModelSpec& spec, const TensorFinder& find, const HfExport& to)
      : of_(of), spec_(spec), find_(find), to_(to), table_(BuildParamTable(spec)) {}

  absl::Status Run() {
    ANNULUS_RETURN_IF_ERROR(MakeDirectories(to_.directory));
    const std::vector<std::vector<HfTensor>> shards = Shards();
    json index = {{"metadata", {{"total_size", 0}}}, {"weight_map", json::object()}};
    int64_t total = 0;
    for (size_t i = 0; i < shards.size(); ++i) {
      const std::string name = shards.size() == 1
                                   ? "model.safetensors"
                                   : absl::StrFormat("model-%05d-of-%05d.safetensors", i + 1, shards.size());
      ANNULUS_RETURN_IF_ERROR(WriteShard(to_.directory + "/" + name, shards[i]));
      for (const HfTensor& tensor : shards[i]) {
        index["weight_map"][tensor.name] = name;
        total += Bytes(tensor);
      }
    }
    index["metadata"]["total_size"] = total;
    if (shards.size() > 1) {
      ANNULUS_RETURN_IF_ERROR(
          WriteFileAtomically(to_.directory + "/model.safetensors.index.json", PythonJsonText(index)));
    }
    if (of_ == HfClass::kAnnulus) {
      ANNULUS_RETURN_IF_ERROR(WriteFileAtomically(to_.directory + "/modeling_annulus.py", ModelingCode()));
    }
    json config = HfConfigOf(of_, spec_, to_.max_length);
    config["torch_dtype"] = to_.dtype == DType::kBF16  ? "bfloat16"
                            : to_.dtype == DType::kF64 ? "float64"
                                                       : "float32";
    return WriteFileAtomically(to_.directory + "/config.json", PythonJsonText(config));
  }

 private:
  int64_t Bytes(const HfTensor& tensor) const {
    return tensor.shape.elements() * SizeOf(DTypeOf(tensor, table_, to_.dtype));
  }
  // In the order of the layers, each as full as its tensors let it be.
  std::vector<std::vector<HfTensor>> Shards() const {
    std::vector<std::vector<HfTensor>> shards(1);
    int64_t bytes = 0;
    for (HfTensor& tensor : HfTensors(of_, spec_, table_, RopePairs::kHalves)) {
      if (bytes > 0 && bytes + Bytes(tensor) > to_.shard_bytes) shards.emplace_back(), bytes = 0;
      bytes += Bytes(tensor);
      shards.back().push_back(std::move(tensor));
    }
    return shards;
  }
  absl::Status WriteShard(const std::string& path, const std::vector<HfTensor>& tensors) const {
    std::vector<Tensor> memory;
    std::vector<NamedTensor> named;
    for (const HfTensor& tensor : tensors) {
      memory.emplace_back(Device{}, DTypeOf(tensor, table_, to_.dtype), tensor.shape);
      for (const HfPart& part : tensor.parts) {
        const ParamInfo& info = table_.params[static_cast<size_t>(part.param)];
        ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef value, find_(info.name));
        ANNULUS_RETURN_IF_ERROR(CheckParameter(info, value));
        Pack(part, value, memory.back().ref());
      }
      named.push_back({tensor.name, memory.back().ref()});
    }
    return WriteSafetensors(path, std::move(named), {{"format", "pt"}}).status();
  }

  HfClass of_;
  const ModelSpec& spec_;
  const TensorFinder& find_;
  const HfExport& to_;
  ParamTable table_;
};

}  // namespace

absl::StatusOr<std::string> HfArchitecture(const ModelSpec& spec) {
  ANNULUS_ASSIGN_OR_RETURN(const HfClass of, ClassFor(spec));
  return std::string(LayoutOf(of).architecture);
}

absl::Status ExportHuggingFace(const ModelSpec& spec, const TensorFinder& find, const HfExport& to) {
  ANNULUS_ASSIGN_OR_RETURN(const HfClass of, ClassFor(spec));
  return Exporter(of, spec, find, to).Run();
}

}  // namespace annulus
