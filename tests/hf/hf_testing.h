#pragma once

// Small folders of Transformers' models as tests/golden/make_hf_golden.py describes them, with its weights.

#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "annulus/base/file.h"
#include "annulus/train/hugging_face.h"
#include "checkpoint/checkpoint_testing.h"

namespace annulus::testing {

using Json = nlohmann::json;

inline const std::vector<std::string>& GoldenCases() {
  static const std::vector<std::string> cases = {
      "llama",      "llama_tied", "deepseek_v3", "deepseek_v3_plain", "mamba2",
      "nemotron_h", "falcon_h1",  "annulus",     "annulus_gated"};
  return cases;
}

inline Json ReadGolden(const std::string& name) {
  const auto text = ReadFile(std::string(ANNULUS_SOURCE_DIR) + "/tests/golden/hf_" + name + ".json");
  return Json::parse(text.value(), nullptr, /*allow_exceptions=*/false);
}

inline bool EndsWith(const std::string& text, absl::string_view end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end.data()) == 0;
}

// The script's formulas.
inline void FillWeights(int64_t t, const std::string& name, TensorRef value) {
  double* w = value.data<double>();
  double factor = 0.1, offset = 1.0;
  if (value.rank() > 1) {
    const bool plain = value.rank() == 3 || name.find("embed") != std::string::npos;
    factor = plain ? 1.0 : 2.0 / std::sqrt(static_cast<double>(value.dim(value.rank() - 1)));
    offset = 0.0;
  } else if (EndsWith(name, "A_log")) {
    factor = 1.0;
  } else if (EndsWith(name, "dt_bias")) {
    factor = 1.0, offset = -2.0;
  } else if (EndsWith(name, "bias")) {
    offset = 0.0;
  }
  for (int64_t i = 0; i < value.elements(); ++i) {
    const int64_t n = i + 1;
    const double wave = static_cast<double>((n * (37 * n + 11) + 101 * t) % 1009) / 504.0 - 1.0;
    w[i] = offset == 0.0 ? factor * wave : offset + factor * wave;
  }
}

inline Shape ShapeOf(const Json& dims) {
  const std::vector<int64_t> sizes = dims.get<std::vector<int64_t>>();
  return Shape(absl::Span<const int64_t>(sizes.data(), sizes.size()));
}

// The folder that the script's model would be saved as.
inline void WriteGoldenFolder(const Json& golden, const std::string& folder) {
  std::vector<Tensor> memory;
  std::vector<NamedTensor> tensors;
  for (const Json& entry : golden["tensors"]) {
    const std::string name = entry["name"];
    memory.emplace_back(Device{}, DType::kF64, ShapeOf(entry["shape"]));
    FillWeights(static_cast<int64_t>(tensors.size()), name, memory.back().ref());
    tensors.push_back({name, memory.back().ref()});
  }
  ANNULUS_CHECK_OK(MakeDirectories(folder));
  ANNULUS_CHECK_OK(
      WriteSafetensors(folder + "/model.safetensors", std::move(tensors), {{"format", "pt"}}).status());
  Overwrite(folder + "/config.json", golden["config"].dump());
}

// Every parameter of an imported model in doubles, as a finder.
class ImportedParameters {
 public:
  explicit ImportedParameters(const HfFolder& folder)
      : params_(Device{}, DType::kF64, BuildParamTable(folder.spec()), 1) {
    for (size_t i = 0; i < params_.table().params.size(); ++i) {
      const ParamInfo& info = params_.table().params[i];
      const absl::StatusOr<Tensor> value = folder.Read(info, DType::kF64);
      ANNULUS_CHECK(value.ok()) << value.status();
      const TensorRef to = params_.Value(static_cast<int>(i));
      std::memcpy(to.raw(), value->ref().raw(), static_cast<size_t>(to.bytes()));
    }
  }
  const ParamStore& params() const { return params_; }
  ConstTensorRef Of(absl::string_view name) const { return params_.Value(params_.table().IndexOf(name)); }
  TensorFinder finder() const {
    return [this](absl::string_view name) -> absl::StatusOr<ConstTensorRef> { return Of(name); };
  }

 private:
  ParamStore params_;
};

// "" if bit for bit the same.
inline std::string Difference(const ImportedParameters& got, const ImportedParameters& want) {
  for (const ParamInfo& info : want.params().table().params) {
    const ConstTensorRef a = got.Of(info.name), b = want.Of(info.name);
    if (std::memcmp(a.raw(), b.raw(), static_cast<size_t>(b.bytes())) != 0) return info.name;
  }
  return "";
}

}  // namespace annulus::testing
