// Reads a folder: configuration, one file of weights or several with their index.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

#include "annulus/base/file.h"
#include "annulus/train/hugging_face.h"
#include "checkpoint/strict_json.h"
#include "model_config.h"

namespace annulus {
namespace {

using nlohmann::json;

constexpr int kIndexDepth = 4;
constexpr char kHead[] = "lm_head.weight";

bool AllFinite(ConstTensorRef values) {
  return VisitFloat(values.dtype(), [&]<class T>() {
    const T* begin = values.data<T>();
    return std::all_of(begin, begin + values.elements(), [](T x) { return std::isfinite(x); });
  });
}

// Names of the files of weights.
absl::StatusOr<std::set<std::string>> ShardNames(const std::string& directory) {
  const std::string index_path = directory + "/model.safetensors.index.json";
  if (!Exists(index_path)) return std::set<std::string>{"model.safetensors"};
  ANNULUS_ASSIGN_OR_RETURN(const std::string text, ReadFile(index_path));
  const absl::StatusOr<json> index = ParseStrictJson(text, kIndexDepth);
  if (!index.ok()) return Prefixed(index.status(), index_path + ": ");
  const json map = index->is_object() ? index->value("weight_map", json()) : json();
  if (!map.is_object()) return Invalid(index_path, ": weight_map: expected an object");
  std::set<std::string> names;
  for (const auto& [tensor, file] : map.items()) {
    ANNULUS_ASSIGN_OR_RETURN(const std::string name, AsString(file, index_path + ": weight_map"));
    if (name.find('/') != std::string::npos) {
      return Invalid(index_path, ": weight_map: \"", name, "\": expected a file of this folder");
    }
    names.insert(name);
  }
  return names;
}

}  // namespace

struct HfFolder::Contents {
  // A parameter's place in a tensor of the folder.
  struct Place {
    size_t tensor;
    HfPart part;
  };
  std::string directory;
  std::vector<SafetensorsFile> files;
  ParamTable table;
  std::vector<HfTensor> tensors;
  std::map<std::string, Place> places;  // by parameter

  // NotFound where no file has it.
  absl::StatusOr<ConstTensorRef> Find(const std::string& name) const {
    for (const SafetensorsFile& file : files) {
      const absl::StatusOr<ConstTensorRef> found = file.Find(name);
      if (found.ok()) return found;
    }
    const absl::string_view why = name == kHead ? ": expected it, as tie_word_embeddings=false says" : "";
    return absl::NotFoundError(
        absl::StrCat(directory, ": tensor \"", name, "\" is in no file of weights", why));
  }
};

HfFolder::HfFolder() : contents_(new Contents) {}
HfFolder::HfFolder(HfFolder&&) noexcept = default;
HfFolder::~HfFolder() = default;

absl::StatusOr<HfFolder> HfFolder::Open(const std::string& directory) {
  const std::string config_path = directory + "/config.json";
  ANNULUS_ASSIGN_OR_RETURN(const std::string text, ReadFile(config_path));
  const absl::StatusOr<json> config = ParsePythonJson(text);
  if (!config.ok()) return Prefixed(config.status(), config_path + ": ");
  absl::StatusOr<HfConfig> read = ReadHfConfig(*config);
  if (!read.ok()) return Prefixed(read.status(), directory + "/");

  HfFolder folder;
  folder.architecture_ = LayoutOf(read->of).architecture;
  folder.spec_ = std::move(read->spec);
  folder.max_length_ = read->max_length;
  Contents& contents = *folder.contents_;
  contents.directory = directory;
  ANNULUS_ASSIGN_OR_RETURN(const std::set<std::string> names, ShardNames(directory));
  for (const std::string& name : names) {
    ANNULUS_ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::Open(directory + "/" + name));
    contents.files.push_back(std::move(file));
  }
  contents.table = BuildParamTable(folder.spec_);
  contents.tensors = HfTensors(read->of, folder.spec_, contents.table, read->pairs);
  for (size_t t = 0; t < contents.tensors.size(); ++t) {
    for (const HfPart& part : contents.tensors[t].parts) {
      contents.places[contents.table.params[static_cast<size_t>(part.param)].name] = {t, part};
    }
  }
  ANNULUS_RETURN_IF_ERROR(folder.CheckTensors());
  return folder;
}

// All that the model needs are there, and no other: one that was left out would have had a meaning.
absl::Status HfFolder::CheckTensors() const {
  std::set<std::string> expected;
  for (const HfTensor& tensor : contents_->tensors) {
    ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef found, contents_->Find(tensor.name));
    const bool floating =
        found.dtype() == DType::kF32 || found.dtype() == DType::kF64 || found.dtype() == DType::kBF16;
    if (!floating || !(found.shape() == tensor.shape)) {
      return Invalid(contents_->directory, ": tensor \"", tensor.name, "\" is ", Name(found.dtype()), " ",
                     ToString(found.shape()), ": expected bf16, f32 or f64 ", ToString(tensor.shape),
                     ", as config.json says");
    }
    expected.insert(tensor.name);
  }
  if (spec_.tied_head) {
    ANNULUS_RETURN_IF_ERROR(CheckTiedHead());
    expected.insert(kHead);
  }
  for (const SafetensorsFile& file : contents_->files) {
    for (const NamedTensor& tensor : file.tensors()) {
      if (expected.count(tensor.name) > 0) continue;
      return Invalid(contents_->directory, ": tensor \"", tensor.name, "\" has no place in a ",
                     architecture_);
    }
  }
  return absl::OkStatus();
}

// Some writers repeat the embedding as the head.
absl::Status HfFolder::CheckTiedHead() const {
  const absl::StatusOr<ConstTensorRef> head = contents_->Find(kHead);
  if (absl::IsNotFound(head.status())) return absl::OkStatus();
  ANNULUS_RETURN_IF_ERROR(head.status());
  const std::string& name = contents_->tensors[contents_->places.at("embed.weight").tensor].name;
  ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef embedding, contents_->Find(name));
  const bool same = head->dtype() == embedding.dtype() && head->shape() == embedding.shape() &&
                    std::memcmp(head->raw(), embedding.raw(), static_cast<size_t>(embedding.bytes())) == 0;
  if (same) return absl::OkStatus();
  return Invalid(contents_->directory, ": tensor \"", kHead, "\" differs from \"", name,
                 "\": expected the same, as tie_word_embeddings=true says");
}

absl::StatusOr<Tensor> HfFolder::Read(const ParamInfo& info, DType dtype) const {
  const auto found = contents_->places.find(info.name);
  ANNULUS_CHECK(found != contents_->places.end()) << info.name;
  const Contents::Place& place = found->second;
  ANNULUS_ASSIGN_OR_RETURN(const ConstTensorRef tensor,
                           contents_->Find(contents_->tensors[place.tensor].name));
  Tensor param(Device{}, dtype, info.logical);
  Unpack(place.part, tensor, param.ref());
  if (!AllFinite(param.ref())) {
    return Invalid(contents_->directory, ": tensor \"", contents_->tensors[place.tensor].name,
                   "\" holds numbers that are not finite as ", Name(dtype), ": expected finite ones");
  }
  return param;
}

}  // namespace annulus
