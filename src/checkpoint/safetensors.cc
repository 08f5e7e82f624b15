#include "annulus/train/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <tuple>
#include <utility>

#include "strict_json.h"
#include "tensor_entry.h"

namespace annulus {
namespace {

using nlohmann::json;

static_assert(std::endian::native == std::endian::little, "the format is little-endian");

constexpr size_t kLengthBytes = sizeof(uint64_t);
constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // of the format
constexpr size_t kHeaderPadding = 8;               // data starts 8-byte aligned, as other writers do
constexpr int kHeaderDepth = 3;                    // header { tensor { shape [
constexpr absl::string_view kMetadataKey = "__metadata__";

struct Entry {
  std::string name;
  TensorType type;
  int64_t begin = 0;  // relative to the end of the header
  int64_t end = 0;
};

std::string Where(absl::string_view file, absl::string_view tensor) {
  return absl::StrCat(file, ": tensor \"", tensor, "\"");
}

absl::StatusOr<Entry> ParseEntry(absl::string_view file, const std::string& name, const json& value) {
  const std::string where = Where(file, name);
  ANNULUS_RETURN_IF_ERROR(ExpectKeys(value, where, {"dtype", "shape", "data_offsets"}));
  Entry entry;
  entry.name = name;
  ANNULUS_ASSIGN_OR_RETURN(entry.type, TensorTypeFromJson(value["dtype"], value["shape"], where));
  const json& offsets = value["data_offsets"];
  ANNULUS_RETURN_IF_ERROR(ExpectArray(offsets, absl::StrCat(where, ": data_offsets")));
  if (offsets.size() != 2)
    return Invalid(where, ": data_offsets has ", offsets.size(), " entries: expected [begin, end]");
  ANNULUS_ASSIGN_OR_RETURN(entry.begin, AsCount(offsets[0], absl::StrCat(where, ": data_offsets[0]")));
  ANNULUS_ASSIGN_OR_RETURN(entry.end, AsCount(offsets[1], absl::StrCat(where, ": data_offsets[1]")));
  if (entry.end < entry.begin || entry.end - entry.begin != entry.type.bytes())
    return Invalid(where, ": data_offsets=", offsets.dump(), ": expected ", entry.type.bytes(), " bytes for ",
                   ToString(entry.type));
  return entry;
}

absl::StatusOr<std::map<std::string, std::string>> ParseMetadata(absl::string_view file, const json& value) {
  std::map<std::string, std::string> metadata;
  const std::string where = absl::StrCat(file, ": ", kMetadataKey);
  if (!value.is_object()) return Invalid(where, ": expected an object");
  for (const auto& [key, text] : value.items()) {
    ANNULUS_ASSIGN_OR_RETURN(metadata[key], AsString(text, absl::StrCat(where, " \"", key, "\"")));
  }
  return metadata;
}

// The ranges follow one another from 0 to the end of the data.
absl::Status CheckRanges(absl::string_view file, const std::vector<Entry>& entries, int64_t data_bytes) {
  std::vector<const Entry*> order;
  for (const Entry& entry : entries) order.push_back(&entry);
  std::sort(order.begin(), order.end(), [](const Entry* a, const Entry* b) {
    return std::tie(a->begin, a->end) < std::tie(b->begin, b->end);
  });
  int64_t expected = 0;
  for (const Entry* entry : order) {
    if (entry->begin != expected)
      return Invalid(
          Where(file, entry->name), " begins at data byte ", entry->begin, ": expected ", expected,
          entry->begin < expected ? " (it overlaps another tensor)" : " (there is a hole before it)");
    expected = entry->end;
  }
  if (expected != data_bytes)
    return Invalid(
        file, ": ", data_bytes, " bytes of data: expected ", expected,
        expected > data_bytes ? "; the file is truncated" : "; there is data after the last tensor");
  return absl::OkStatus();
}

absl::StatusOr<absl::string_view> FindHeader(absl::string_view file, absl::Span<const uint8_t> bytes) {
  if (bytes.size() < kLengthBytes)
    return Invalid(file, ": ", bytes.size(), " bytes: expected at least ", kLengthBytes,
                   " of a safetensors file");
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), kLengthBytes);
  if (length > kMaxHeaderBytes)
    return Invalid(file, ": header length ", length, ": expected at most ", kMaxHeaderBytes,
                   "; is it a safetensors file?");
  if (length > bytes.size() - kLengthBytes)
    return Invalid(file, ": header length ", length, ": only ", bytes.size() - kLengthBytes,
                   " bytes follow; the file is truncated");
  const absl::string_view header(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes, length);
  if (header.empty() || header[0] != '{') return Invalid(file, ": header: expected it to start with '{'");
  return header;
}

absl::StatusOr<std::string> QuotedJson(const std::string& text) { return ToJsonText(json(text), -1); }

// Tensors in file order; offsets follow from it.
absl::StatusOr<std::string> HeaderText(const std::vector<NamedTensor>& tensors,
                                       const std::map<std::string, std::string>& metadata) {
  std::string text = "{";
  if (!metadata.empty()) {
    ANNULUS_ASSIGN_OR_RETURN(const std::string values, ToJsonText(json(metadata), -1));
    absl::StrAppend(&text, "\"", kMetadataKey, "\":", values);
  }
  int64_t offset = 0;
  for (const NamedTensor& t : tensors) {
    ANNULUS_ASSIGN_OR_RETURN(const std::string name, QuotedJson(t.name));
    const int64_t end = offset + t.tensor.bytes();
    absl::StrAppend(&text, text.size() > 1 ? "," : "", name, ":{\"dtype\":\"",
                    SafetensorsName(t.tensor.dtype()), "\",\"shape\":", json(t.tensor.shape().dims()).dump(),
                    ",\"data_offsets\":[", offset, ",", end, "]}");
    offset = end;
  }
  text += "}";
  text.resize((text.size() + kHeaderPadding - 1) / kHeaderPadding * kHeaderPadding, ' ');
  if (text.size() > kMaxHeaderBytes)
    return Invalid("header of ", text.size(), " bytes: expected at most ", kMaxHeaderBytes);
  return text;
}

absl::Status SortForWriting(std::vector<NamedTensor>& tensors) {
  for (const NamedTensor& t : tensors) {
    ANNULUS_CHECK(t.tensor.device().kind == DeviceKind::kCpu)
        << t.name << " is on " << ToString(t.tensor.device());
    ANNULUS_CHECK(t.tensor.defined() || t.tensor.bytes() == 0) << t.name << " has no memory";
    if (t.name == kMetadataKey)
      return Invalid("tensor name \"", kMetadataKey, "\" is reserved by the format");
  }
  const auto by_name = [](const NamedTensor& a, const NamedTensor& b) { return a.name < b.name; };
  std::sort(tensors.begin(), tensors.end(), by_name);
  const auto twice = std::adjacent_find(tensors.begin(), tensors.end(),
                                        [](const auto& a, const auto& b) { return a.name == b.name; });
  if (twice != tensors.end()) return Invalid("tensor \"", twice->name, "\" is given twice");
  std::stable_sort(tensors.begin(), tensors.end(), [](const NamedTensor& a, const NamedTensor& b) {
    return SizeOf(a.tensor.dtype()) > SizeOf(b.tensor.dtype());
  });
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<WrittenFile> WriteSafetensors(const std::string& path, std::vector<NamedTensor> tensors,
                                             const std::map<std::string, std::string>& metadata) {
  ANNULUS_RETURN_IF_ERROR(Prefixed(SortForWriting(tensors), path + ": "));
  const absl::StatusOr<std::string> header = HeaderText(tensors, metadata);
  if (!header.ok()) return Prefixed(header.status(), path + ": ");
  const uint64_t length = header->size();

  ANNULUS_ASSIGN_OR_RETURN(DurableFile file, DurableFile::Create(path));
  ANNULUS_RETURN_IF_ERROR(file.Write(&length, sizeof(length)));
  ANNULUS_RETURN_IF_ERROR(file.Write(header->data(), static_cast<int64_t>(length)));
  for (const NamedTensor& t : tensors) ANNULUS_RETURN_IF_ERROR(file.Write(t.tensor.raw(), t.tensor.bytes()));
  ANNULUS_RETURN_IF_ERROR(file.Finish());
  return WrittenFile{.bytes = file.bytes_written(), .hash = file.hash()};
}

absl::StatusOr<SafetensorsFile> SafetensorsFile::Open(const std::string& path) {
  ANNULUS_ASSIGN_OR_RETURN(MappedFile mapped, MappedFile::Open(path));
  return Open(std::move(mapped));
}

absl::StatusOr<SafetensorsFile> SafetensorsFile::Open(MappedFile mapped) {
  ANNULUS_ASSIGN_OR_RETURN(SafetensorsFile file, Parse(mapped.path(), mapped.bytes()));
  file.file_ = std::move(mapped);  // the mapping, and with it every tensor, stays where it is
  return file;
}

absl::StatusOr<SafetensorsFile> SafetensorsFile::Parse(absl::string_view name,
                                                       absl::Span<const uint8_t> bytes) {
  ANNULUS_ASSIGN_OR_RETURN(const absl::string_view text, FindHeader(name, bytes));
  const absl::StatusOr<json> header = ParseStrictJson(text, kHeaderDepth);
  if (!header.ok()) return Prefixed(header.status(), absl::StrCat(name, ": header: "));

  SafetensorsFile file;
  file.name_ = std::string(name);
  file.bytes_ = bytes;
  std::vector<Entry> entries;
  for (const auto& [key, value] : header->items()) {
    if (key == kMetadataKey) {
      ANNULUS_ASSIGN_OR_RETURN(file.metadata_, ParseMetadata(name, value));
    } else {
      ANNULUS_ASSIGN_OR_RETURN(entries.emplace_back(), ParseEntry(name, key, value));
    }
  }
  const size_t data_at = kLengthBytes + text.size();
  ANNULUS_RETURN_IF_ERROR(CheckRanges(name, entries, static_cast<int64_t>(bytes.size() - data_at)));

  const uint8_t* data = bytes.data() + data_at;
  for (const Entry& entry : entries)  // sorted by name, as the JSON object is
    file.tensors_.push_back(
        {entry.name, ConstTensorRef(data + entry.begin, entry.type.dtype, Device{}, entry.type.shape)});
  return file;
}

absl::StatusOr<ConstTensorRef> SafetensorsFile::Find(absl::string_view name) const {
  const auto found = std::lower_bound(tensors_.begin(), tensors_.end(), name,
                                      [](const NamedTensor& t, absl::string_view n) { return t.name < n; });
  if (found == tensors_.end() || found->name != name)
    return absl::NotFoundError(absl::StrCat(Where(name_, name), " is not in this file"));
  return found->tensor;
}

}  // namespace annulus
