#include "html_page.h"

#include "absl/strings/str_cat.h"
#include "annulus/base/check.h"
#include "html_style.h"

namespace annulus {
namespace {

bool IsControl(char c) { return static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\t'; }

}  // namespace

std::string Escaped(const std::string& text) {
  std::string html;
  for (const char c : text) {
    switch (c) {
      case '&':
        html += "&amp;";
        break;
      case '<':
        html += "&lt;";
        break;
      case '>':
        html += "&gt;";
        break;
      case '"':
        html += "&quot;";
        break;
      case '\'':
        html += "&#39;";
        break;
      default:
        html += IsControl(c) ? ' ' : c;
    }
  }
  return html;
}

std::string Html(const HtmlTable& table) {
  std::string html = absl::StrCat("<div class=\"scroll\" role=\"region\" tabindex=\"0\" aria-label=\"",
                                  Escaped(table.caption), "\"><table><caption>", Escaped(table.caption),
                                  "</caption><thead><tr>");
  const auto is_number = [&](size_t i) { return table.columns[i].align == HtmlTable::Align::kNumber; };
  for (size_t i = 0; i < table.columns.size(); ++i) {
    absl::StrAppend(&html, "<th scope=\"col\"", is_number(i) ? " class=\"n\"" : "", ">",
                    Escaped(table.columns[i].name), "</th>");
  }
  absl::StrAppend(&html, "</tr></thead><tbody>\n");
  for (const std::vector<std::string>& row : table.rows) {
    ANNULUS_CHECK(row.size() == table.columns.size()) << table.caption;
    absl::StrAppend(&html, "<tr>");
    for (size_t i = 0; i < row.size(); ++i) {
      const char* tag = i == 0 ? "th" : "td";
      absl::StrAppend(&html, "<", tag, i == 0 ? " scope=\"row\"" : "", is_number(i) ? " class=\"n\"" : "",
                      ">", Escaped(row[i]), "</", tag, ">");
    }
    absl::StrAppend(&html, "</tr>\n");
  }
  return absl::StrCat(html, "</tbody></table></div>\n");
}

HtmlPage::HtmlPage(const std::string& title, const std::string& lead)
    : title_(Escaped(title)), lead_(Escaped(lead)) {}

void HtmlPage::Section(const std::string& title, const std::string& lead) {
  if (sections_ > 0) absl::StrAppend(&body_, "</section>\n");
  const std::string id = absl::StrCat("part-", ++sections_);
  absl::StrAppend(&contents_, "<li><a href=\"#", id, "\">", Escaped(title), "</a></li>");
  absl::StrAppend(&body_, "<section id=\"", id, "\"><h2>", Escaped(title), "</h2>\n");
  if (!lead.empty()) Paragraph(lead);
}

void HtmlPage::Paragraph(const std::string& text) { absl::StrAppend(&body_, "<p>", Escaped(text), "</p>\n"); }

void HtmlPage::List(const std::vector<std::string>& items) {
  if (items.empty()) return;
  absl::StrAppend(&body_, "<ul>");
  for (const std::string& item : items) absl::StrAppend(&body_, "<li>", Escaped(item), "</li>");
  absl::StrAppend(&body_, "</ul>\n");
}

void HtmlPage::Table(const HtmlTable& table) { absl::StrAppend(&body_, Html(table)); }

void HtmlPage::Figure(const std::vector<Panel>& panels, const std::vector<LegendEntry>& legend,
                      const HtmlTable& table) {
  const bool alone = panels.size() == 1;
  absl::StrAppend(&body_, "<div class=\"", alone ? "pair" : "stack", "\"><div>",
                  legend.empty() ? "" : LegendHtml(legend), "<div class=\"panels\">\n");
  for (const Panel& panel : panels) {
    absl::StrAppend(&body_, "<figure>");
    if (!panel.title.empty()) absl::StrAppend(&body_, "<figcaption>", Escaped(panel.title), "</figcaption>");
    absl::StrAppend(&body_, panel.svg, "</figure>\n");
  }
  absl::StrAppend(&body_, "</div></div>\n", Html(table), "</div>\n");
}

void HtmlPage::Folded(const std::string& title, const std::string& text) {
  absl::StrAppend(&body_, "<details><summary>", Escaped(title), "</summary><pre>", Escaped(text),
                  "</pre></details>\n");
}

std::string HtmlPage::Finish() const {
  return absl::StrCat(
      "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/>\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n"
      "<meta name=\"color-scheme\" content=\"light dark\"/>\n<title>",
      title_, "</title>\n<style>", kHtmlStyle, "</style></head>\n<body>\n<header><h1>", title_, "</h1>\n<p>",
      lead_, "</p>\n<nav aria-label=\"Contents\"><ul>", contents_, "</ul></nav></header>\n<main>\n", body_,
      sections_ > 0 ? "</section>\n" : "", "</main>\n</body></html>\n");
}

}  // namespace annulus
