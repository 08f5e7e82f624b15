// Plain text: one byte is one token. A document ends after each occurrence of the separator, which
// belongs to the document that it ends; occurrences do not overlap.

#include <string_view>

#include "annulus/base/check.h"
#include "token_store.h"
#include "token_type.h"

namespace annulus {
namespace {

class TextStore final : public TokenStore {
 public:
  TextStore(MappedFile file, std::string separator)
      : file_(std::move(file)), separator_(std::move(separator)) {}

  int64_t size() const override { return static_cast<int64_t>(file_.bytes().size()); }

  void Read(int64_t begin, absl::Span<int64_t> out) const override {
    ANNULUS_CHECK(begin >= 0 && begin <= size() - static_cast<int64_t>(out.size())) << "begin " << begin;
    WidenTokens(TokenType::kU8, file_.bytes().data() + begin, out);
  }

  std::vector<int64_t> DocumentStarts() const override {
    std::vector<int64_t> starts = {0};
    if (separator_.empty()) return starts;
    const std::string_view text(reinterpret_cast<const char*>(file_.bytes().data()), file_.bytes().size());
    for (size_t at = text.find(separator_); at != text.npos; at = text.find(separator_, at)) {
      at += separator_.size();
      if (at < text.size()) starts.push_back(static_cast<int64_t>(at));
    }
    return starts;
  }

  const std::string& path() const override { return file_.path(); }
  std::vector<const MappedFile*> files() const override { return {&file_}; }

 private:
  MappedFile file_;
  std::string separator_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<TokenStore>> OpenTextStore(const SourceSpec& spec) {
  ANNULUS_ASSIGN_OR_RETURN(MappedFile file, MappedFile::Open(spec.path));
  return std::make_unique<TextStore>(std::move(file), spec.document_separator);
}

}  // namespace annulus
