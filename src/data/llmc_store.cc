// llm.c token files:
//
//   i32[256]  header: magic, version, number of tokens, 253 unused
//   tokens    u16 with magic 20240520 version 1 (GPT-2), u32 with magic 20240801 version 7 (Llama 3)
//
// The file ends with the last token. A document starts at each occurrence of the source's start token.

#include <algorithm>

#include "annulus/base/check.h"
#include "token_store.h"
#include "token_type.h"

namespace annulus {
namespace {

constexpr int64_t kHeaderBytes = 256 * sizeof(int32_t);
constexpr int64_t kScanTokens = 1 << 16;  // widened at a time by the scan for documents: 512 KiB

struct Variant {
  int32_t magic;
  int32_t version;
  TokenType type;
};
constexpr Variant kVariants[] = {{20240520, 1, TokenType::kU16}, {20240801, 7, TokenType::kU32}};

class LlmCStore final : public TokenStore {
 public:
  LlmCStore(MappedFile file, TokenType type, int64_t size, int64_t start_token)
      : file_(std::move(file)), type_(type), size_(size), start_token_(start_token) {}

  int64_t size() const override { return size_; }

  void Read(int64_t begin, absl::Span<int64_t> out) const override {
    ANNULUS_CHECK(begin >= 0 && begin <= size_ - static_cast<int64_t>(out.size())) << "begin " << begin;
    WidenTokens(type_, file_.bytes().data() + kHeaderBytes + begin * SizeOf(type_), out);
  }

  std::vector<int64_t> DocumentStarts() const override {
    std::vector<int64_t> starts = {0};
    if (start_token_ < 0) return starts;
    std::vector<int64_t> chunk;
    for (int64_t begin = 1; begin < size_; begin += kScanTokens) {
      chunk.resize(static_cast<size_t>(std::min(kScanTokens, size_ - begin)));
      Read(begin, absl::MakeSpan(chunk));
      for (size_t i = 0; i < chunk.size(); ++i) {
        if (chunk[i] == start_token_) starts.push_back(begin + static_cast<int64_t>(i));
      }
    }
    return starts;
  }

  const std::string& path() const override { return file_.path(); }
  std::vector<const MappedFile*> files() const override { return {&file_}; }

 private:
  MappedFile file_;
  TokenType type_;
  int64_t size_;
  int64_t start_token_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<TokenStore>> OpenLlmCStore(const SourceSpec& spec) {
  ANNULUS_ASSIGN_OR_RETURN(MappedFile file, MappedFile::Open(spec.path));
  const int64_t bytes = static_cast<int64_t>(file.bytes().size());
  if (bytes < kHeaderBytes) {
    return Invalid(spec.path, ": bytes=", bytes, ": expected at least the header of ", kHeaderBytes);
  }
  const uint8_t* header = file.bytes().data();
  const auto magic = LoadUnaligned<int32_t>(header);
  const auto version = LoadUnaligned<int32_t>(header + 4);
  const auto tokens = LoadUnaligned<int32_t>(header + 8);

  const Variant* variant = std::find_if(std::begin(kVariants), std::end(kVariants),
                                        [&](const Variant& v) { return v.magic == magic; });
  if (variant == std::end(kVariants)) {
    return Invalid(spec.path, ": magic=", magic, ": expected ", kVariants[0].magic, " or ",
                   kVariants[1].magic);
  }
  if (version != variant->version) {
    return Invalid(spec.path, ": version=", version, ": expected ", variant->version, " for magic ", magic);
  }
  const int64_t width = SizeOf(variant->type);
  if (tokens < 0) return Invalid(spec.path, ": tokens=", tokens, ": expected at least 0");
  if (bytes != kHeaderBytes + width * tokens) {
    return Invalid(spec.path, ": tokens=", tokens, ": expected a file of ", kHeaderBytes + width * tokens,
                   " bytes (", kHeaderBytes, " and ", width, " a token), it has ", bytes);
  }
  return std::make_unique<LlmCStore>(std::move(file), variant->type, tokens, spec.document_start_token);
}

}  // namespace annulus
