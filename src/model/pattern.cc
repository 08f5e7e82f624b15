// The pattern language: how the layers of a model are written.
//
//   seq    := item item*                      "(A{w=128} -)^3 (A{rope=none} -)"
//   item   := unit ['^' n] | '(' seq ')' ['^' n]
//   unit   := branch ['{' attribute ',' ... '}']
//   branch := 'A' softmax attention | '-' SwiGLU MLP
//   attribute (of A) := 'w' '=' window, 0 for all keys | 'rope' '=' (theta | 'none')
//
// Spaces may stand between any two of these. Other branches (M, L, G, B, T, E), parallel branches joined by
// '+', the prefix meta=n and the attributes kv, tie, g and combine have their meaning reserved and are
// refused as planned.

#include <cmath>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "annulus/model/spec.h"

namespace annulus {
namespace {

constexpr int64_t kMostLayers = 10000;
constexpr int kDeepestNesting = 64;
constexpr int64_t kLargestWindow = int64_t{1} << 40;
constexpr double kLargestTheta = 1e15;

using Layers = std::vector<LayerSpec>;

// Planned branches, by letter.
absl::string_view PlannedBranch(char letter) {
  switch (letter) {
    case 'M':
      return "M (Mamba-2)";
    case 'L':
      return "L (lightning attention)";
    case 'G':
      return "G (gated DeltaNet)";
    case 'B':
      return "B (BASED linear attention)";
    case 'T':
      return "T (latent attention)";
    case 'E':
      return "E (mixture of experts)";
    default:
      return "";
  }
}

class Parser {
 public:
  Parser(absl::string_view text, const PatternDefaults& defaults) : text_(text), defaults_(defaults) {}

  absl::StatusOr<Layers> Parse() {
    SkipSpaces();
    if (absl::StartsWith(text_.substr(at_), "meta"))
      return Error(at_, "meta tokens (meta=n) are planned but not available");
    ANNULUS_ASSIGN_OR_RETURN(Layers layers, Sequence(0));
    if (!AtEnd()) return Unexpected("A, - or (");
    return layers;
  }

 private:
  bool AtEnd() {
    SkipSpaces();
    return at_ == text_.size();
  }
  void SkipSpaces() {
    while (at_ < text_.size() && absl::ascii_isspace(text_[at_])) ++at_;
  }
  // The next character that is no space, 0 at the end; a zero byte in the text is refused like any other.
  char Peek() { return AtEnd() ? '\0' : text_[at_]; }
  bool Take(char c) {
    if (AtEnd() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  absl::Status Error(size_t at, absl::string_view message) const {
    return Invalid("column ", at + 1, ": ", message);
  }
  absl::Status Unexpected(absl::string_view expected) {
    if (AtEnd()) return Error(at_, absl::StrCat("the pattern ends; expected ", expected));
    return Error(at_, absl::StrCat("`", absl::CHexEscape(text_.substr(at_, 1)), "`: expected ", expected));
  }

  absl::StatusOr<Layers> Sequence(int depth) {
    if (depth > kDeepestNesting) {
      return Error(at_,
                   absl::StrCat("parentheses nest too deep; expected at most ", kDeepestNesting, " levels"));
    }
    Layers layers;
    do {
      const size_t start = at_;
      ANNULUS_ASSIGN_OR_RETURN(Layers item, Item(depth));
      ANNULUS_ASSIGN_OR_RETURN(const int64_t times, Repetitions());
      // Each factor is at most kMostLayers, so that the product cannot overflow.
      const int64_t total = static_cast<int64_t>(layers.size()) + static_cast<int64_t>(item.size()) * times;
      if (total > kMostLayers) {
        return Error(start, absl::StrCat("the pattern expands to ", total,
                                         " layers or more; expected at most ", kMostLayers));
      }
      for (int64_t i = 0; i < times; ++i) layers.insert(layers.end(), item.begin(), item.end());
    } while (!AtEnd() && Peek() != ')');
    return layers;
  }

  absl::StatusOr<Layers> Item(int depth) {
    if (Take('(')) {
      ANNULUS_ASSIGN_OR_RETURN(Layers layers, Sequence(depth + 1));
      if (!Take(')')) return Unexpected("A, -, ( or )");
      return layers;
    }
    ANNULUS_ASSIGN_OR_RETURN(const LayerSpec layer, Unit());
    return Layers{layer};
  }

  absl::StatusOr<int64_t> Repetitions() {
    if (!Take('^')) return 1;
    const std::string expected = absl::StrCat("a number of repetitions from 1 to ", kMostLayers);
    SkipSpaces();
    const size_t start = at_;
    while (at_ < text_.size() && absl::ascii_isdigit(text_[at_])) ++at_;
    if (at_ == start) return Unexpected(expected);
    int64_t times = 0;
    const absl::string_view digits = text_.substr(start, at_ - start);
    if (!absl::SimpleAtoi(digits, &times) || times < 1 || times > kMostLayers) {
      return Error(start, absl::StrCat("`", digits.substr(0, 20), "`: expected ", expected));
    }
    return times;
  }

  absl::StatusOr<LayerSpec> Unit() {
    const char letter = Peek();
    if (const absl::string_view planned = PlannedBranch(letter); !planned.empty()) {
      return Error(at_, absl::StrCat(planned, " is planned but not available; expected A or -"));
    }
    LayerSpec layer;
    if (Take('A')) {
      layer.branches = {{.window = defaults_.window, .rope_theta = defaults_.rope_theta}};
    } else if (Take('-')) {
      layer.branches = {{.kind = BranchKind::kMlp}};
    } else {
      return Unexpected("A, - or (");
    }
    if (Peek() == '+') return Error(at_, "`+`: parallel branches are planned but not available");
    if (Peek() == '{') {
      ANNULUS_RETURN_IF_ERROR(Attributes(&layer));
      if (Peek() == '+') return Error(at_, "`+`: parallel branches are planned but not available");
    }
    return layer;
  }

  // A run of characters that may stand in an attribute's name or value.
  absl::string_view Word() {
    SkipSpaces();
    const size_t start = at_;
    const auto belongs = [](char c) {
      return absl::ascii_isalnum(c) || c == '.' || c == '-' || c == '+' || c == '_' || c == '@';
    };
    while (at_ < text_.size() && belongs(text_[at_])) ++at_;
    return text_.substr(start, at_ - start);
  }

  absl::Status Attributes(LayerSpec* layer) {
    if (!Take('{')) return Unexpected("{");
    bool window_given = false, rope_given = false;
    do {
      SkipSpaces();
      const size_t start = at_;
      const absl::string_view name = Word();
      if (name == "kv" || name == "tie" || name == "g" || name == "combine") {
        return Error(
            start, absl::StrCat("the attribute ", name, " is planned but not available; expected w or rope"));
      }
      if (name != "w" && name != "rope") {
        at_ = start;
        return Unexpected("an attribute w=window or rope=theta|none");
      }
      if (layer->branches[0].kind != BranchKind::kAttention) {
        return Error(start, absl::StrCat("the attribute ", name, " belongs to A; expected none on -"));
      }
      bool& given = name == "w" ? window_given : rope_given;
      if (given) return Error(start, absl::StrCat("the attribute ", name, " is given twice; expected once"));
      given = true;
      if (!Take('=')) return Unexpected("=");
      ANNULUS_RETURN_IF_ERROR(name == "w" ? Window(layer) : Rope(layer));
    } while (Take(','));
    if (!Take('}')) return Unexpected(", or }");
    return absl::OkStatus();
  }

  absl::Status Window(LayerSpec* layer) {
    SkipSpaces();
    const size_t start = at_;
    const absl::string_view word = Word();
    const bool parsed = absl::SimpleAtoi(word, &layer->branches[0].window);
    if (parsed && layer->branches[0].window >= 0 && layer->branches[0].window <= kLargestWindow) return absl::OkStatus();
    return BadValue(start, "w", word, absl::StrCat("an integer from 0 (all keys) to ", kLargestWindow));
  }

  absl::Status Rope(LayerSpec* layer) {
    SkipSpaces();
    const size_t start = at_;
    const absl::string_view word = Word();
    if (word == "none") {
      layer->branches[0].rope_theta.reset();
      return absl::OkStatus();
    }
    double theta = 0;
    if (!absl::SimpleAtod(word, &theta) || !std::isfinite(theta) || theta < 1 || theta > kLargestTheta) {
      return BadValue(start, "rope", word, absl::StrCat("none or a number from 1 to ", kLargestTheta));
    }
    layer->branches[0].rope_theta = theta;
    return absl::OkStatus();
  }

  absl::Status BadValue(size_t start, absl::string_view name, absl::string_view word,
                        absl::string_view expected) {
    return Error(start, absl::StrCat(name, "=", word.substr(0, 40), ": expected ", expected));
  }

  absl::string_view text_;
  PatternDefaults defaults_;
  size_t at_ = 0;
};

}  // namespace

absl::StatusOr<Pattern> ParsePattern(absl::string_view pattern, const PatternDefaults& defaults) {
  ANNULUS_ASSIGN_OR_RETURN(Layers layers, Parser(pattern, defaults).Parse());
  return Pattern{.layers = std::move(layers)};
}

}  // namespace annulus
