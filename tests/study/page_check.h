#pragma once

// Checks of texts: whether a page is well-formed and needs nothing but itself.

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace annulus::testing {

inline bool Has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

inline int64_t CountOf(const std::string& text, const std::string& part) {
  int64_t count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

// Of a CSV text; its last line ends too.
inline std::vector<std::string> LinesOf(const std::string& csv) {
  std::vector<std::string> lines = absl::StrSplit(csv, "\r\n");
  EXPECT_EQ(lines.back(), "");
  lines.pop_back();
  return lines;
}

// What is wrong with the text between tags: an ampersand must begin one of the entities that pages use.
inline std::string FlawOfText(const std::string& text) {
  for (size_t at = text.find('&'); at != std::string::npos; at = text.find('&', at + 1)) {
    bool known = false;
    for (const char* entity : {"&amp;", "&lt;", "&gt;", "&quot;", "&#39;"}) {
      known |= text.compare(at, std::string(entity).size(), entity) == 0;
    }
    if (!known) return absl::StrCat("bare ampersand: ", text.substr(at, 20));
  }
  return text.find('>') == std::string::npos ? "" : absl::StrCat("bare >: ", text.substr(0, 40));
}

// Of `name a="1" b="2"`: attributes are all quoted, and none asks for another file.
inline std::string FlawOfTag(const std::string& tag) {
  for (const char* banned : {"script", "link", "img", "iframe", "object", "embed", "use", "image"}) {
    const std::string name = tag.substr(0, tag.find(' '));
    if (name == banned) return absl::StrCat("<", tag, ">");
  }
  for (const char* banned : {"src=", "http:", "https:", "//", "url(", " on", "javascript:"}) {
    if (absl::StrContains(tag, banned)) return absl::StrCat("<", tag, ">: ", banned);
  }
  int64_t quotes = 0;
  for (size_t i = 0; i < tag.size(); ++i) {
    quotes += tag[i] == '"';
    if (tag[i] == '=' && quotes % 2 == 0 && (i + 1 == tag.size() || tag[i + 1] != '"'))
      return absl::StrCat("<", tag, ">: attribute without quotes");
  }
  return quotes % 2 == 0 ? FlawOfText(tag) : absl::StrCat("<", tag, ">: open quote");
}

// Empty: none.
inline std::string FlawOf(const std::string& page) {
  const std::string doctype = "<!DOCTYPE html>";
  if (page.rfind(doctype, 0) != 0) return "no doctype";
  for (const char* banned : {"@import", "url(", "@font-face"}) {
    if (absl::StrContains(page, banned)) return banned;
  }
  std::vector<std::string> open;
  for (size_t at = doctype.size(); at < page.size();) {
    const size_t begin = page.find('<', at);
    const bool in_style = !open.empty() && open.back() == "style";
    const std::string text = page.substr(at, begin == std::string::npos ? begin : begin - at);
    if (const std::string flaw = in_style ? "" : FlawOfText(text); !flaw.empty()) return flaw;
    if (begin == std::string::npos) break;
    const size_t end = page.find('>', begin);
    if (end == std::string::npos) return "open tag at the end";
    std::string tag = page.substr(begin + 1, end - begin - 1);
    at = end + 1;
    if (tag.empty() || tag.find('<') != std::string::npos) return absl::StrCat("tag in a tag: ", tag);
    if (tag[0] == '/') {
      if (open.empty() || open.back() != tag.substr(1))
        return absl::StrCat("<", tag, "> closes ", open.empty() ? "nothing" : open.back());
      open.pop_back();
      continue;
    }
    const bool closed = tag.back() == '/';
    if (closed) tag.pop_back();
    if (const std::string flaw = FlawOfTag(tag); !flaw.empty()) return flaw;
    if (!closed) open.push_back(tag.substr(0, tag.find(' ')));
  }
  return open.empty() ? "" : absl::StrCat("<", open.back(), "> is not closed");
}

}  // namespace annulus::testing
