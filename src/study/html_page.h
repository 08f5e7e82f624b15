#pragma once

// A page that needs no other file, no network and no script: its style sheet is inside, for light and dark
// screens, for phones and for paper. Every tag is closed, as in XML; all text is escaped here.

#include <string>
#include <vector>

#include "svg_chart.h"

namespace annulus {

std::string Escaped(const std::string& text);

struct HtmlTable {
  enum class Align { kText, kNumber };
  struct Column {
    std::string name;
    Align align = Align::kNumber;
  };
  std::string caption;
  std::vector<Column> columns;  // the first heads its row
  std::vector<std::vector<std::string>> rows = {};
};
std::string Html(const HtmlTable& table);

class HtmlPage {
 public:
  HtmlPage(const std::string& title, const std::string& lead);

  // A heading that the table of contents names.
  void Section(const std::string& title, const std::string& lead);
  void Paragraph(const std::string& text);
  void List(const std::vector<std::string>& items);
  void Table(const HtmlTable& table);

  // Charts with one legend and the table of their numbers: below them, or beside where there is one chart and
  // the screen is wide. Chart titles are shown where there are several.
  struct Panel {
    std::string title;
    std::string svg;
  };
  void Figure(const std::vector<Panel>& panels, const std::vector<LegendEntry>& legend,
              const HtmlTable& table);
  // Text as it is, folded away.
  void Folded(const std::string& title, const std::string& text);

  std::string Finish() const;

 private:
  std::string title_, lead_, contents_, body_;
  int sections_ = 0;
};

}  // namespace annulus
