// Megatron indexed data sets, two files for one prefix. PREFIX.bin holds the tokens of sequences, PREFIX.idx
// says where, with S sequences and D = documents + 1:
//
//   0        "MMIDIDX\0\0"
//   9        u64 version, 1
//   17       u8 dtype
//   18       u64 S
//   26       u64 D
//   34       i32[S] tokens of each sequence
//   34+4S    i64[S] byte offset of each sequence in PREFIX.bin
//   34+12S   i64[D] first sequence of each document, then S
//   34+12S+8D  i8[S] modes, optional and unused here
//
// Token positions number the tokens of all sequences in the order of the index. Writers lay sequences out
// one after another; then a position is a byte offset and the index stays on disk. Otherwise the first
// position of every sequence is kept in memory.

#include <algorithm>
#include <cstring>

#include "absl/strings/escaping.h"
#include "annulus/base/check.h"
#include "token_store.h"
#include "token_type.h"

namespace annulus {
namespace {

constexpr char kMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', '\0', '\0'};
constexpr int64_t kHeaderBytes = 34;

// The arrays of a checked index, as they lie in the file.
struct Index {
  MappedFile file;
  TokenType type;
  int64_t sequences;
  int64_t boundaries;

  int64_t Length(int64_t s) const { return LoadUnaligned<int32_t>(At(kHeaderBytes + 4 * s)); }
  int64_t Offset(int64_t s) const { return LoadUnaligned<int64_t>(At(kHeaderBytes + 4 * sequences + 8 * s)); }
  int64_t Boundary(int64_t d) const {
    return LoadUnaligned<int64_t>(At(kHeaderBytes + 12 * sequences + 8 * d));
  }

 private:
  const uint8_t* At(int64_t byte) const { return file.bytes().data() + byte; }
};

class MegatronStore final : public TokenStore {
 public:
  // Needs an index whose sequences lie inside `bin` and whose lengths add up to `size`.
  MegatronStore(Index index, MappedFile bin, int64_t size)
      : index_(std::move(index)), bin_(std::move(bin)), size_(size) {
    if (IsContiguous()) return;
    first_token_.reserve(static_cast<size_t>(index_.sequences));
    int64_t position = 0;
    for (int64_t s = 0; s < index_.sequences; ++s) {
      first_token_.push_back(position);
      position += index_.Length(s);
    }
  }

  int64_t size() const override { return size_; }

  void Read(int64_t begin, absl::Span<int64_t> out) const override {
    ANNULUS_CHECK(begin >= 0 && begin <= size_ - static_cast<int64_t>(out.size())) << "begin " << begin;
    if (out.empty()) return;
    if (first_token_.empty()) return ReadBytes(index_.Offset(0) + begin * SizeOf(index_.type), out);
    // The last sequence that starts at or before `begin`; an empty one shares its start with its successor.
    int64_t s = std::upper_bound(first_token_.begin(), first_token_.end(), begin) - first_token_.begin() - 1;
    int64_t inside = begin - first_token_[static_cast<size_t>(s)];
    while (!out.empty()) {
      const int64_t count = std::min(index_.Length(s) - inside, static_cast<int64_t>(out.size()));
      ReadBytes(index_.Offset(s) + inside * SizeOf(index_.type), out.first(static_cast<size_t>(count)));
      out.remove_prefix(static_cast<size_t>(count));
      inside = 0;
      ++s;
    }
  }

  std::vector<int64_t> DocumentStarts() const override {
    std::vector<int64_t> starts = {0};
    for (int64_t d = 0; d < index_.boundaries; ++d) {
      const int64_t start = FirstToken(index_.Boundary(d));
      if (start > starts.back() && start < size_) starts.push_back(start);  // empty documents vanish
    }
    return starts;
  }

  const std::string& path() const override { return bin_.path(); }
  std::vector<const MappedFile*> files() const override { return {&index_.file, &bin_}; }

 private:
  bool IsContiguous() const {
    for (int64_t s = 1; s < index_.sequences; ++s) {
      const int64_t end = index_.Offset(s - 1) + index_.Length(s - 1) * SizeOf(index_.type);
      if (index_.Offset(s) != end) return false;
    }
    return true;
  }

  // First token position of sequence s; size() for s = S.
  int64_t FirstToken(int64_t s) const {
    if (s == index_.sequences) return size_;
    if (!first_token_.empty()) return first_token_[static_cast<size_t>(s)];
    return (index_.Offset(s) - index_.Offset(0)) / SizeOf(index_.type);
  }

  void ReadBytes(int64_t offset, absl::Span<int64_t> out) const {
    WidenTokens(index_.type, bin_.bytes().data() + offset, out);
  }

  Index index_;
  MappedFile bin_;
  int64_t size_;
  std::vector<int64_t> first_token_;  // [S]; empty where the sequences are contiguous
};

absl::StatusOr<TokenType> TypeOfCode(const std::string& path, int code) {
  switch (code) {
    case 1: return TokenType::kU8;
    case 2: return TokenType::kI8;
    case 3: return TokenType::kI16;
    case 4: return TokenType::kI32;
    case 5: return TokenType::kI64;
    case 8: return TokenType::kU16;
    default:
      return Invalid(path, ": dtype=", code,
                     ": expected 1 (u8), 2 (i8), 3 (i16), 4 (i32), 5 (i64) or 8 (u16)",
                     code == 6 || code == 7 ? "; tokens cannot be floating-point numbers" : "");
  }
}

// Reads the header and compares the sizes that it states with the size of the file, without a product
// that could overflow.
absl::StatusOr<Index> ReadIndex(const std::string& path) {
  ANNULUS_ASSIGN_OR_RETURN(MappedFile file, MappedFile::Open(path));
  const uint64_t bytes = file.bytes().size();
  if (bytes < kHeaderBytes) {
    return Invalid(path, ": bytes=", bytes, ": expected at least the header of ", kHeaderBytes);
  }
  const uint8_t* header = file.bytes().data();
  if (std::memcmp(header, kMagic, sizeof(kMagic)) != 0) {
    const absl::string_view magic(reinterpret_cast<const char*>(header), sizeof(kMagic));
    return Invalid(path, ": magic=", absl::CHexEscape(magic), ": expected MMIDIDX\\x00\\x00");
  }
  const auto version = LoadUnaligned<uint64_t>(header + 9);
  if (version != 1) return Invalid(path, ": version=", version, ": expected 1");
  ANNULUS_ASSIGN_OR_RETURN(const TokenType type, TypeOfCode(path, header[17]));

  const auto sequences = LoadUnaligned<uint64_t>(header + 18);
  const auto boundaries = LoadUnaligned<uint64_t>(header + 26);
  const uint64_t body = bytes - kHeaderBytes;
  if (sequences > body / 12) {
    return Invalid(path, ": sequences=", sequences, ": expected at most ", body / 12, ", as the file has ",
                   bytes, " bytes");
  }
  const uint64_t after_sequences = body - 12 * sequences;
  if (boundaries < 1 || boundaries > after_sequences / 8) {
    return Invalid(path, ": document_boundaries=", boundaries, ": expected 1 to ", after_sequences / 8,
                   ", as the file has ", bytes, " bytes and ", sequences, " sequences");
  }
  const uint64_t rest = after_sequences - 8 * boundaries;
  if (rest != 0 && rest != sequences) {
    return Invalid(path, ": bytes=", bytes, ": expected ", bytes - rest, ", or ", bytes - rest + sequences,
                   " with modes, for sequences=", sequences, " and document_boundaries=", boundaries);
  }
  return Index{std::move(file), type, static_cast<int64_t>(sequences), static_cast<int64_t>(boundaries)};
}

// Sum of the sequence lengths, each checked to lie inside the tokens file.
absl::StatusOr<int64_t> CheckSequences(const Index& index, const MappedFile& bin) {
  const int64_t bin_bytes = static_cast<int64_t>(bin.bytes().size());
  const std::string& path = index.file.path();
  int64_t size = 0;
  for (int64_t s = 0; s < index.sequences; ++s) {
    const int64_t length = index.Length(s), offset = index.Offset(s);
    if (length < 0) return Invalid(path, ": length[", s, "]=", length, ": expected at least 0");
    const int64_t length_bytes = length * SizeOf(index.type);
    if (offset < 0 || offset > bin_bytes - length_bytes) {
      return Invalid(path, ": offset[", s, "]=", offset, ": expected ", length_bytes,
                     " bytes from there inside the ", bin_bytes, " of ", bin.path());
    }
    if (__builtin_add_overflow(size, length, &size)) {
      return Invalid(path, ": length[", s, "]=", length, ": expected a sum of lengths below 2^63");
    }
  }
  return size;
}

absl::Status CheckBoundaries(const Index& index) {
  int64_t previous = 0;
  for (int64_t d = 0; d < index.boundaries; ++d) {
    const int64_t boundary = index.Boundary(d);
    const bool in_order = d == 0 ? boundary == 0 : boundary >= previous && boundary <= index.sequences;
    if (!in_order) {
      return Invalid(index.file.path(), ": document_boundary[", d, "]=", boundary, ": expected ",
                     d == 0 ? "0" : absl::StrCat(previous, " to ", index.sequences));
    }
    previous = boundary;
  }
  if (previous != index.sequences) {
    return Invalid(index.file.path(), ": document_boundary[", index.boundaries - 1, "]=", previous,
                   ": expected the number of sequences, ", index.sequences);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<TokenStore>> OpenMegatronStore(const SourceSpec& spec) {
  ANNULUS_ASSIGN_OR_RETURN(Index index, ReadIndex(spec.path + ".idx"));
  ANNULUS_ASSIGN_OR_RETURN(MappedFile bin, MappedFile::Open(spec.path + ".bin"));
  ANNULUS_ASSIGN_OR_RETURN(const int64_t size, CheckSequences(index, bin));
  ANNULUS_RETURN_IF_ERROR(CheckBoundaries(index));
  return std::make_unique<MegatronStore>(std::move(index), std::move(bin), size);
}

}  // namespace annulus
