// The pattern language: how the layers of a model are written.
//
//   model  := ['meta' '=' n] seq                "meta=4 (M+A{w=128,combine=mean-norm} -)^3 (A{rope=none} -)"
//   seq    := item item*
//   item   := unit ['^' n] | '(' seq ')' ['^' n]
//   unit   := branch ('+' branch)* ['{' attribute ',' ... '}']        branches side by side on one input
//   branch := 'A' softmax attention | 'T' latent attention | 'M' Mamba-2 | 'L' lightning attention
//           | 'B' BASED | 'G' gated DeltaNet | '-' MLP
//   attribute := 'w' '=' window, 0 for all keys             of A and T
//              | 'rope' '=' (theta | 'none')                of A and T
//              | 'kv' '=' ('own' | '@-' k)                  of A: keys and values of k layers back
//              | 'g' '=' branches of the latent             of T
//              | 'tie' '=' name                             of all: one set of parameters
//              | 'combine' '=' ('sum' | 'mean-norm')        of several branches
//
// An attribute holds for those branches of its unit that have it. Spaces may stand between any two of these.
// The branch E (mixture of experts) has its meaning reserved and is refused as planned.

#include <algorithm>
#include <cmath>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/strip.h"
#include "annulus/model/spec.h"
#include "layer_checks.h"

namespace annulus {
namespace {

constexpr int64_t kMostLayers = 10000;
constexpr int64_t kMostMetaTokens = 65536;
constexpr int64_t kMostLatentGroups = 64;
constexpr int kDeepestNesting = 64;
constexpr int64_t kLargestWindow = int64_t{1} << 40;
constexpr double kLargestTheta = 1e15;
constexpr size_t kLongestTie = 32;
constexpr absl::string_view kBranches = "ATMLBG-";

// An attribute and the branches that it belongs to.
struct Attribute {
  absl::string_view name, of;
};
constexpr Attribute kAttributes[] = {{"w", "AT"}, {"rope", "AT"},     {"kv", "A"},
                                     {"g", "T"},  {"tie", kBranches}, {"combine", kBranches}};
constexpr absl::string_view kAttributeList =
    "w=window, rope=theta|none, kv=own|@-k, g=groups, tie=name or combine=sum|mean-norm";

// "A and T", "T".
std::string Spelled(absl::string_view letters) {
  if (letters.size() == 1) return std::string(letters);
  return absl::StrCat(letters.substr(0, 1), " and ", letters.substr(1));
}

// A layer and where in the text its relations to other layers stand.
struct Unit {
  LayerSpec layer;
  size_t kv_at = 0, tie_at = 0;

  std::string letters() const {
    std::string text;
    for (const BranchSpec& branch : layer.branches) {
      absl::StrAppend(&text, text.empty() ? "" : "+", std::string(1, static_cast<char>(branch.kind)));
    }
    return text;
  }
};
using Units = std::vector<Unit>;

class Parser {
 public:
  Parser(absl::string_view text, const PatternDefaults& defaults) : text_(text), defaults_(defaults) {}

  absl::StatusOr<Pattern> Parse() {
    Pattern pattern;
    ANNULUS_ASSIGN_OR_RETURN(pattern.meta_tokens, MetaTokens());
    ANNULUS_ASSIGN_OR_RETURN(const Units units, Sequence(0));
    if (!AtEnd()) return Unexpected(BranchOr("("));
    for (const Unit& unit : units) pattern.layers.push_back(unit.layer);
    ANNULUS_RETURN_IF_ERROR(CheckRelations(units, pattern.layers));
    return pattern;
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
  static std::string BranchOr(absl::string_view other) {
    return absl::StrCat("A, T, M, L, B, G, - or ", other);
  }

  absl::Status CheckRelations(const Units& units, const std::vector<LayerSpec>& layers) const {
    for (size_t i = 0; i < units.size(); ++i) {
      if (const std::string problem = SharedKvProblem(layers, i); !problem.empty()) {
        return Error(units[i].kv_at, problem);
      }
      if (const std::string problem = TieProblem(layers, i); !problem.empty()) {
        return Error(units[i].tie_at, problem);
      }
    }
    return absl::OkStatus();
  }

  absl::StatusOr<int64_t> MetaTokens() {
    SkipSpaces();
    if (!absl::StartsWith(text_.substr(at_), "meta")) return 0;
    at_ += 4;
    if (!Take('=')) return Unexpected("=");
    return Number(kMostMetaTokens, "a number of meta tokens");
  }

  // Digits that are `what` from 1 to `most`.
  absl::StatusOr<int64_t> Number(int64_t most, absl::string_view what) {
    const std::string expected = absl::StrCat(what, " from 1 to ", most);
    SkipSpaces();
    const size_t start = at_;
    while (at_ < text_.size() && absl::ascii_isdigit(text_[at_])) ++at_;
    if (at_ == start) return Unexpected(expected);
    int64_t number = 0;
    const absl::string_view digits = text_.substr(start, at_ - start);
    if (!absl::SimpleAtoi(digits, &number) || number < 1 || number > most) {
      return Error(start, absl::StrCat("`", digits.substr(0, 20), "`: expected ", expected));
    }
    return number;
  }

  absl::StatusOr<Units> Sequence(int depth) {
    if (depth > kDeepestNesting) {
      return Error(at_,
                   absl::StrCat("parentheses nest too deep; expected at most ", kDeepestNesting, " levels"));
    }
    Units units;
    do {
      const size_t start = at_;
      ANNULUS_ASSIGN_OR_RETURN(Units item, Item(depth));
      int64_t times = 1;
      if (Take('^')) {
        ANNULUS_ASSIGN_OR_RETURN(times, Number(kMostLayers, "a number of repetitions"));
      }
      // Each factor is at most kMostLayers, so that the product cannot overflow.
      const int64_t total = static_cast<int64_t>(units.size()) + static_cast<int64_t>(item.size()) * times;
      if (total > kMostLayers) {
        return Error(start, absl::StrCat("the pattern expands to ", total,
                                         " layers or more; expected at most ", kMostLayers));
      }
      for (int64_t i = 0; i < times; ++i) units.insert(units.end(), item.begin(), item.end());
    } while (!AtEnd() && Peek() != ')');
    return units;
  }

  absl::StatusOr<Units> Item(int depth) {
    if (Take('(')) {
      ANNULUS_ASSIGN_OR_RETURN(Units units, Sequence(depth + 1));
      if (!Take(')')) return Unexpected(BranchOr("( or )"));
      return units;
    }
    ANNULUS_ASSIGN_OR_RETURN(Unit unit, ParseUnit());
    return Units{std::move(unit)};
  }

  absl::StatusOr<Unit> ParseUnit() {
    Unit unit;
    do {
      ANNULUS_ASSIGN_OR_RETURN(BranchSpec branch, Branch(unit));
      unit.layer.branches.push_back(std::move(branch));
    } while (Take('+'));
    if (Peek() == '{') {
      ANNULUS_RETURN_IF_ERROR(Attributes(&unit));
      if (Peek() == '+') return Error(at_, "`+`: expected attributes behind the last branch of the layer");
    }
    return unit;
  }

  absl::StatusOr<BranchSpec> Branch(const Unit& unit) {
    const char letter = Peek();
    if (letter == 'E') {
      return Error(at_, absl::StrCat("E (mixture of experts) is planned but not available; expected ",
                                     "A, T, M, L, B, G or -"));
    }
    if (letter == '\0' || !absl::StrContains(kBranches, letter)) {
      return Unexpected(unit.layer.branches.empty() ? BranchOr("(") : "A, T, M, L, B, G or -");
    }
    BranchSpec branch{.kind = static_cast<BranchKind>(letter)};
    if (FindBranch(unit.layer, branch.kind) != nullptr) {
      return Error(at_, absl::StrCat("`", std::string(1, letter), "`: expected each branch of a layer once"));
    }
    ++at_;
    if (branch.kind == BranchKind::kAttention) {
      branch.window = defaults_.window;
      branch.rope_theta = defaults_.rope_theta;
    } else if (branch.kind == BranchKind::kLatentAttention) {
      branch.rope_theta = defaults_.latent_rope_theta;
    }
    return branch;
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

  absl::Status Attributes(Unit* unit) {
    if (!Take('{')) return Unexpected("{");
    std::vector<absl::string_view> given;
    do {
      SkipSpaces();
      const size_t start = at_;
      const absl::string_view name = Word();
      const auto* attribute = std::find_if(std::begin(kAttributes), std::end(kAttributes),
                                           [&](const Attribute& known) { return known.name == name; });
      if (attribute == std::end(kAttributes)) {
        if (name.empty()) return Unexpected(absl::StrCat("an attribute ", kAttributeList));
        return Error(start,
                     absl::StrCat("`", name.substr(0, 40), "`: expected an attribute ", kAttributeList));
      }
      if (unit->letters().find_first_of(std::string(attribute->of)) == std::string::npos) {
        return Error(start, absl::StrCat("the attribute ", name, " belongs to ", Spelled(attribute->of),
                                         "; expected none on ", unit->letters()));
      }
      if (name == "combine" && unit->layer.branches.size() < 2) {
        return Error(start, absl::StrCat("the attribute combine belongs to several branches joined by +; "
                                         "expected none on ",
                                         unit->letters()));
      }
      if (std::count(given.begin(), given.end(), name) > 0) {
        return Error(start, absl::StrCat("the attribute ", name, " is given twice; expected once"));
      }
      given.push_back(name);
      if (!Take('=')) return Unexpected("=");
      ANNULUS_RETURN_IF_ERROR(Value(start, *attribute, unit));
    } while (Take(','));
    if (!Take('}')) return Unexpected(", or }");
    return absl::OkStatus();
  }

  // The value of an attribute whose name stands at `name_at`, for all branches that have it.
  absl::Status Value(size_t name_at, const Attribute& attribute, Unit* unit) {
    SkipSpaces();
    const size_t start = at_;
    const absl::string_view word = Word();
    if (attribute.name == "kv") unit->kv_at = name_at;
    if (attribute.name == "tie") unit->tie_at = name_at;
    for (BranchSpec& branch : unit->layer.branches) {
      if (!absl::StrContains(attribute.of, static_cast<char>(branch.kind))) continue;
      const std::string expected = Set(attribute.name, word, &branch, &unit->layer);
      if (expected.empty()) continue;
      return Error(start, absl::StrCat(attribute.name, "=", word.substr(0, 40), ": expected ", expected));
    }
    return absl::OkStatus();
  }

  // Sets an attribute of a branch; returns what was expected if `word` is not.
  static std::string Set(absl::string_view name, absl::string_view word, BranchSpec* branch,
                         LayerSpec* layer) {
    if (name == "w") return SetWindow(word, branch);
    if (name == "rope") return SetRope(word, branch);
    if (name == "kv") return SetKv(word, branch);
    if (name == "tie") return SetTie(word, branch);
    if (name == "g") {
      const bool parsed = absl::SimpleAtoi(word, &branch->latent_groups);
      if (parsed && branch->latent_groups >= 1 && branch->latent_groups <= kMostLatentGroups) return "";
      return absl::StrCat("an integer from 1 to ", kMostLatentGroups);
    }
    layer->combine = word == "sum" ? Combine::kSum : Combine::kMeanNorm;
    return word == "sum" || word == "mean-norm" ? "" : "sum or mean-norm";
  }

  static std::string SetWindow(absl::string_view word, BranchSpec* branch) {
    const bool parsed = absl::SimpleAtoi(word, &branch->window);
    if (parsed && branch->window >= 0 && branch->window <= kLargestWindow) return "";
    return absl::StrCat("an integer from 0 (all keys) to ", kLargestWindow);
  }

  static std::string SetRope(absl::string_view word, BranchSpec* branch) {
    branch->rope_theta.reset();
    if (word == "none") return "";
    double theta = 0;
    const bool parsed = absl::SimpleAtod(word, &theta);
    if (!parsed || !std::isfinite(theta) || theta < 1 || theta > kLargestTheta) {
      return absl::StrCat("none or a number from 1 to ", kLargestTheta);
    }
    branch->rope_theta = theta;
    return "";
  }

  static std::string SetKv(absl::string_view word, BranchSpec* branch) {
    branch->kv_layers_back = 0;
    if (word == "own") return "";
    const bool parsed = absl::ConsumePrefix(&word, "@-") && absl::SimpleAtoi(word, &branch->kv_layers_back);
    if (parsed && branch->kv_layers_back >= 1 && branch->kv_layers_back < kMostLayers) return "";
    return absl::StrCat("own or @-k with k from 1 to ", kMostLayers - 1, " layers");
  }

  static std::string SetTie(absl::string_view word, BranchSpec* branch) {
    const auto allowed = [](char c) { return absl::ascii_isalnum(c) || c == '_'; };
    branch->tie = std::string(word);
    if (!word.empty() && word.size() <= kLongestTie && std::all_of(word.begin(), word.end(), allowed))
      return "";
    return absl::StrCat("a name of at most ", kLongestTie, " letters, digits or '_'");
  }

  absl::string_view text_;
  PatternDefaults defaults_;
  size_t at_ = 0;
};

}  // namespace

absl::StatusOr<Pattern> ParsePattern(absl::string_view pattern, const PatternDefaults& defaults) {
  return Parser(pattern, defaults).Parse();
}

}  // namespace annulus
