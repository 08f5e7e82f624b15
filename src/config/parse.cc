#include "parse.h"

#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>

#include <map>
#include <tuple>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "path.h"

namespace annulus::config {
namespace {

namespace pb = google::protobuf;
using Severity = SyntaxError::Severity;

constexpr int kNestingLimit = 32;    // the schema nests 5 deep
constexpr size_t kMostErrors = 100;  // more unknown fields than this help nobody

// A field name in the text: where it stands and what it names.
struct FieldToken {
  int line, column;  // from 0
  std::string name, path;
  const pb::Descriptor* parent;      // null below an unknown field
  const pb::FieldDescriptor* field;  // null if unknown
};

class Quiet : public pb::io::ErrorCollector {
  void AddError(int, int, const std::string&) override {}
};

// Finds the field names of a text by its tokens alone, so that an error that the parser places only by line
// and column gets the path of its field. A name is an identifier before ':', '{', '<' or '['.
class FieldScanner {
 public:
  FieldScanner(const std::string& text, absl::string_view path, const pb::Descriptor& type) {
    frames_.push_back({&type, std::string(path), nullptr});
    pb::io::ArrayInputStream stream(text.data(), static_cast<int>(text.size()));
    Quiet quiet;
    pb::io::Tokenizer tokenizer(&stream, &quiet);
    tokenizer.set_comment_style(pb::io::Tokenizer::SH_COMMENT_STYLE);
    tokenizer.set_allow_f_after_float(true);
    tokenizer.set_require_space_after_number(false);
    tokenizer.set_allow_multiline_strings(true);
    std::string last, before_last;
    while (tokenizer.Next() && frames_.size() <= kNestingLimit) {
      const std::string& token = tokenizer.current().text;
      const bool opens = token == "{" || token == "<";
      if ((opens || token == ":" || token == "[") &&
          tokenizer.previous().type == pb::io::Tokenizer::TYPE_IDENTIFIER) {
        Name(tokenizer.previous());
      }
      before_last = std::exchange(last, token);
      if (opens) Open();
      if ((token == "}" || token == ">") && frames_.size() > 1) frames_.pop_back();
    }
    // A text that is cut off can end in a name.
    const bool whole = tokenizer.current().type == pb::io::Tokenizer::TYPE_END;
    const bool value = before_last == ":" || before_last == "[" || before_last == ",";
    if (whole && !value && tokenizer.previous().type == pb::io::Tokenizer::TYPE_IDENTIFIER) {
      Name(tokenizer.previous());
    }
  }

  // The last name that starts before the position (from 0), or null.
  const FieldToken* Before(int line, int column) const {
    const FieldToken* found = nullptr;
    for (const FieldToken& token : tokens_) {
      if (std::tie(token.line, token.column) < std::tie(line, column)) found = &token;
    }
    return found;
  }

 private:
  struct Frame {
    const pb::Descriptor* type;
    std::string path;
    const pb::FieldDescriptor* field;  // the last one named here
  };

  std::string PathOf(const Frame& frame) const {
    if (frame.field == nullptr || !frame.field->is_repeated()) {
      return JoinPath(frame.path, frame.field == nullptr ? "" : frame.field->name());
    }
    const std::string all = JoinPath(frame.path, frame.field->name());
    const auto count = counts_.find(all);
    return absl::StrCat(all, "[", count == counts_.end() ? 0 : count->second, "]");
  }

  void Name(const pb::io::Tokenizer::Token& token) {
    Frame& frame = frames_.back();
    frame.field = frame.type == nullptr ? nullptr : frame.type->FindFieldByName(token.text);
    const std::string path = frame.field != nullptr  ? PathOf(frame)
                             : frame.type != nullptr ? JoinPath(frame.path, token.text)
                                                     : frame.path;
    tokens_.push_back({token.line, token.column, token.text, path, frame.type, frame.field});
  }

  void Open() {
    const Frame& frame = frames_.back();
    if (frame.field == nullptr) {
      const std::string path = tokens_.empty() ? frame.path : tokens_.back().path;
      frames_.push_back({nullptr, path, nullptr});
      return;
    }
    Frame inner{frame.field->message_type(), PathOf(frame), nullptr};
    if (frame.field->is_repeated()) ++counts_[JoinPath(frame.path, frame.field->name())];
    frames_.push_back(std::move(inner));
  }

  std::vector<Frame> frames_;
  std::map<std::string, int> counts_;
  std::vector<FieldToken> tokens_;
};

struct Raw {
  Severity severity;
  int line, column;  // from 0
  std::string message;
};

class Collector : public pb::io::ErrorCollector {
 public:
  void AddError(int line, int column, const std::string& message) override {
    raw.push_back({Severity::kFatal, line, column, message});
  }
  void AddWarning(int line, int column, const std::string& message) override {
    if (raw.size() < kMostErrors) raw.push_back({Severity::kGoesOn, line, column, message});
  }
  std::vector<Raw> raw;
};

// The text between the first pair of double quotes.
std::string Quoted(const std::string& message) {
  const size_t open = message.find('"');
  if (open == std::string::npos) return "";
  return message.substr(open + 1, message.find('"', open + 1) - open - 1);
}

// The parser reports unknown names and values, and repetitions, at the token that follows: these are put
// back at the field's name. Everything else stays where the parser stopped.
SyntaxError Place(const Raw& raw, const FieldScanner& scanner) {
  SyntaxError error{raw.severity, raw.line + 1, raw.column + 1, raw.message};
  const FieldToken* token = scanner.Before(raw.line, raw.column);
  if (absl::EndsWith(error.message, "got: ")) absl::StrAppend(&error.message, "the end of the text");
  if (token == nullptr) return error;
  const auto at_name = [&](std::string message) {
    return SyntaxError{raw.severity, token->line + 1, token->column + 1, std::move(message)};
  };
  if (token->parent != nullptr && absl::StrContains(raw.message, "has no field named")) {
    return at_name(absl::StrCat(token->path, ": ", NoSuchField(*token->parent, token->name)));
  }
  if (token->field != nullptr && token->field->enum_type() != nullptr &&
      absl::StartsWith(raw.message, "Unknown enumeration value")) {
    const std::string value = Quoted(raw.message);
    return at_name(
        absl::StrCat(token->path, "=", value, ": ", NoSuchValue(*token->field->enum_type(), value)));
  }
  if (absl::StrContains(raw.message, "is specified multiple times")) {
    return at_name(absl::StrCat(token->path, ": expected once, found again"));
  }
  if (!error.message.empty()) error.message[0] = absl::ascii_tolower(error.message[0]);
  error.message = absl::StrCat(token->path, ": ", error.message);
  return error;
}

}  // namespace

std::vector<SyntaxError> ParseMessage(const std::string& text, absl::string_view path, pb::Message* message,
                                      pb::TextFormat::ParseInfoTree* tree) {
  Collector collector;
  pb::TextFormat::Parser parser;
  parser.RecordErrorsTo(&collector);
  parser.WriteLocationsTo(tree);
  parser.AllowUnknownField(true);  // reported as a warning, so that all of them are found at once
  parser.SetRecursionLimit(kNestingLimit);
  const bool parsed = parser.ParseFromString(text, message);
  if (!parsed && collector.raw.empty()) collector.AddError(0, 0, "cannot be parsed as protobuf text");
  std::vector<SyntaxError> errors;
  if (collector.raw.empty()) return errors;
  const FieldScanner scanner(text, path, *message->GetDescriptor());
  for (const Raw& raw : collector.raw) errors.push_back(Place(raw, scanner));
  if (!parsed && errors.back().severity != Severity::kFatal) errors.back().severity = Severity::kFatal;
  return errors;
}

bool ParseScalar(const std::string& text, const pb::FieldDescriptor& field, pb::Message* message) {
  Quiet quiet;
  pb::TextFormat::Parser parser;
  parser.RecordErrorsTo(&quiet);
  return parser.ParseFieldValueFromString(text, &field, message);
}

}  // namespace annulus::config
