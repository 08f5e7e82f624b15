#include "manifest.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "strict_json.h"

namespace annulus {
namespace {

using nlohmann::json;

constexpr absl::string_view kFormat = "annulus-checkpoint";
constexpr int64_t kVersion = 1;
constexpr int kManifestDepth = 6;  // manifest { files [ file { tensors [ tensor { shape [
constexpr absl::string_view kShardPrefix = "shard-", kShardSuffix = ".safetensors";

// Also keeps a forged manifest from naming files elsewhere.
bool IsShardName(absl::string_view name) {
  if (!absl::ConsumePrefix(&name, kShardPrefix) || !absl::ConsumeSuffix(&name, kShardSuffix)) return false;
  return !name.empty() && std::all_of(name.begin(), name.end(), [](char c) { return '0' <= c && c <= '9'; });
}

json ToJson(const ManifestFile& file) {
  json tensors = json::array();
  for (const ManifestTensor& t : file.tensors)
    tensors.push_back({{"name", t.name},
                       {"dtype", std::string(SafetensorsName(t.type.dtype))},
                       {"shape", t.type.shape.dims()}});
  return {{"name", file.name},
          {"bytes", file.bytes},
          {"hash", Hex64(file.hash)},
          {"tensors", std::move(tensors)}};
}

absl::StatusOr<ManifestTensor> TensorFromJson(const json& value, absl::string_view where) {
  ANNULUS_RETURN_IF_ERROR(ExpectKeys(value, where, {"name", "dtype", "shape"}));
  ManifestTensor tensor;
  ANNULUS_ASSIGN_OR_RETURN(tensor.name, AsString(value["name"], absl::StrCat(where, ".name")));
  ANNULUS_ASSIGN_OR_RETURN(tensor.type, TensorTypeFromJson(value["dtype"], value["shape"], where));
  return tensor;
}

absl::StatusOr<ManifestFile> FileFromJson(const json& value, absl::string_view where) {
  ANNULUS_RETURN_IF_ERROR(ExpectKeys(value, where, {"name", "bytes", "hash", "tensors"}));
  ManifestFile file;
  ANNULUS_ASSIGN_OR_RETURN(file.name, AsString(value["name"], absl::StrCat(where, ".name")));
  if (!IsShardName(file.name))
    return Invalid(where, ".name=", value["name"].dump(), ": expected ", kShardPrefix, "<digits>",
                   kShardSuffix);
  ANNULUS_ASSIGN_OR_RETURN(file.bytes, AsCount(value["bytes"], absl::StrCat(where, ".bytes")));
  ANNULUS_ASSIGN_OR_RETURN(file.hash, AsHex64(value["hash"], absl::StrCat(where, ".hash")));
  const json& tensors = value["tensors"];
  ANNULUS_RETURN_IF_ERROR(ExpectArray(tensors, absl::StrCat(where, ".tensors")));
  for (size_t i = 0; i < tensors.size(); ++i) {
    ANNULUS_ASSIGN_OR_RETURN(file.tensors.emplace_back(),
                             TensorFromJson(tensors[i], absl::StrCat(where, ".tensors[", i, "]")));
  }
  return file;
}

json ToJson(const CheckpointMeta& meta) {
  return {{"step", meta.step},
          {"consumed_sequences", meta.consumed_sequences},
          {"seed", meta.seed},
          {"data_fingerprint", Hex64(meta.data_fingerprint)},
          {"model_fingerprint", meta.model_fingerprint},
          {"config", meta.config}};
}

absl::StatusOr<CheckpointMeta> MetaFromJson(const json& value) {
  ANNULUS_RETURN_IF_ERROR(
      ExpectKeys(value, "meta",
                 {"step", "consumed_sequences", "seed", "data_fingerprint", "model_fingerprint", "config"}));
  CheckpointMeta meta;
  ANNULUS_ASSIGN_OR_RETURN(meta.step, AsCount(value["step"], "meta.step"));
  ANNULUS_ASSIGN_OR_RETURN(meta.consumed_sequences,
                           AsCount(value["consumed_sequences"], "meta.consumed_sequences"));
  ANNULUS_ASSIGN_OR_RETURN(meta.seed, AsUint64(value["seed"], "meta.seed"));
  ANNULUS_ASSIGN_OR_RETURN(meta.data_fingerprint,
                           AsHex64(value["data_fingerprint"], "meta.data_fingerprint"));
  ANNULUS_ASSIGN_OR_RETURN(meta.model_fingerprint,
                           AsString(value["model_fingerprint"], "meta.model_fingerprint"));
  ANNULUS_ASSIGN_OR_RETURN(meta.config, AsString(value["config"], "meta.config"));
  return meta;
}

absl::Status CheckUnique(const std::vector<ManifestFile>& files) {
  std::map<std::string, std::string> file_of;  // by tensor
  std::set<std::string> names;
  for (const ManifestFile& file : files) {
    if (!names.insert(file.name).second) return Invalid("file ", file.name, " is listed twice");
    for (const ManifestTensor& t : file.tensors)
      if (const auto [at, inserted] = file_of.emplace(t.name, file.name); !inserted)
        return Invalid("tensor \"", t.name, "\" is in ", at->second, " and in ", file.name);
  }
  return absl::OkStatus();
}

absl::StatusOr<Manifest> ManifestFromJson(const json& value) {
  ANNULUS_RETURN_IF_ERROR(ExpectKeys(value, "manifest", {"format", "version", "meta", "files"}));
  ANNULUS_ASSIGN_OR_RETURN(const std::string format, AsString(value["format"], "format"));
  ANNULUS_ASSIGN_OR_RETURN(const int64_t version, AsCount(value["version"], "version"));
  if (format != kFormat || version != kVersion)
    return Invalid("format=", value["format"].dump(), " version=", version, ": expected ", kFormat,
                   " version ", kVersion);
  Manifest manifest;
  ANNULUS_ASSIGN_OR_RETURN(manifest.meta, MetaFromJson(value["meta"]));
  const json& files = value["files"];
  ANNULUS_RETURN_IF_ERROR(ExpectArray(files, "files"));
  for (size_t i = 0; i < files.size(); ++i) {
    ANNULUS_ASSIGN_OR_RETURN(manifest.files.emplace_back(),
                             FileFromJson(files[i], absl::StrCat("files[", i, "]")));
  }
  ANNULUS_RETURN_IF_ERROR(CheckUnique(manifest.files));
  return manifest;
}

}  // namespace

std::string ShardName(int world_rank) {
  return absl::StrFormat("%s%05d%s", kShardPrefix, world_rank, kShardSuffix);
}

std::vector<ManifestTensor> Describe(const std::vector<NamedTensor>& tensors) {
  std::vector<ManifestTensor> described;
  for (const NamedTensor& t : tensors) described.push_back({t.name, {t.tensor.dtype(), t.tensor.shape()}});
  std::sort(described.begin(), described.end(),
            [](const ManifestTensor& a, const ManifestTensor& b) { return a.name < b.name; });
  return described;
}

absl::StatusOr<std::string> FileToText(const ManifestFile& file) { return ToJsonText(ToJson(file), -1); }

absl::StatusOr<ManifestFile> FileFromText(absl::string_view text) {
  ANNULUS_ASSIGN_OR_RETURN(const json value, ParseStrictJson(text, kManifestDepth));
  return FileFromJson(value, "file");
}

absl::StatusOr<std::string> ManifestToText(const Manifest& manifest) {
  ANNULUS_RETURN_IF_ERROR(CheckUnique(manifest.files));
  json files = json::array();
  for (const ManifestFile& file : manifest.files) files.push_back(ToJson(file));
  const json value = {{"format", std::string(kFormat)},
                      {"version", kVersion},
                      {"meta", ToJson(manifest.meta)},
                      {"files", std::move(files)}};
  ANNULUS_ASSIGN_OR_RETURN(std::string text, ToJsonText(value, 1));
  return text + "\n";
}

absl::StatusOr<Manifest> ManifestFromText(absl::string_view path, absl::string_view text) {
  const absl::StatusOr<json> value = ParseStrictJson(text, kManifestDepth);
  if (!value.ok()) return Prefixed(value.status(), absl::StrCat(path, ": "));
  absl::StatusOr<Manifest> manifest = ManifestFromJson(*value);
  if (!manifest.ok()) return Prefixed(manifest.status(), absl::StrCat(path, ": "));
  return manifest;
}

}  // namespace annulus
