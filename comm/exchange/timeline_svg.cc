// From left to right: names of ranks and lanes, then time. A lane has as many rows as messages overlap in it,
// up to a few. Of many ranks' plans, whose bars are no wider than pixels, those of a row that are alike are
// one shape: the file stays below a megabyte.

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "annulus/comm/exchange_simulate.h"
#include "plan_text.h"

namespace annulus {
namespace {

// Pixels.
constexpr double kLeft = 128, kPlot = 1080, kRight = 16;
constexpr double kTitleY = 22, kLegendY = 46, kAxisY = 68, kFirstRankY = 76;
constexpr double kComputeHeight = 16, kArrivalHeight = 12, kLaneGap = 2, kRankGap = 10;
constexpr double kRowHeight = 10;   // where a lane has several
constexpr double kShortest = 0.4;   // width of a bar
constexpr double kLetterWidth = 6;  // of labels
constexpr size_t kMostRows = 4;     // of one lane
constexpr size_t kManyBars = 6000;  // of a plan: then bars have no titles and labels

// Bars are strokes as wide as their row; their colors go by class, so that two schemes can share them.
constexpr char kStyle[] = R"(<style>
svg{font-family:system-ui,sans-serif;font-size:11px}
text{fill:#222}.n{font-weight:600}.l{fill:#777;font-size:9px}.b{fill:#111;font-size:9px}.b.on{fill:#fff}
.bg{fill:#fff}.lane{fill:#f1f2f4}.grid{stroke:#aab;stroke-width:.5;opacity:.5}.end{stroke:#888;stroke-dasharray:3 3}
.attend{stroke:#4470a8}.copy{stroke:#a3a8b0}.reduce{stroke:#4d5560}.wait{stroke:#f4c9c9}
.query{stroke:#6cb35c}.kv{stroke:#5fb3ae}.output{stroke:#b288c8}.qgrad{stroke:#e0786c}.kvgrad{stroke:#e3a53f}
@media (prefers-color-scheme:dark){
text{fill:#e3e5e8}.l{fill:#9aa0a8}.b{fill:#111}
.bg{fill:#16181c}.lane{fill:#24272d}.grid{stroke:#667}
.attend{stroke:#4f83c4}.copy{stroke:#868c96}.reduce{stroke:#c3c9d2}.wait{stroke:#5c2f33}}
</style>
)";

struct Look {
  const char* style;
  const char* name;
};
constexpr Look kWait = {"wait", "waits for transfers"};

Look LookOf(const RankPlan& rank, const Step& step) {
  if (step.kind == StepKind::kAttend) return {"attend", "attends"};
  if (step.kind == StepKind::kCopy) return {"copy", "copies"};
  if (step.kind == StepKind::kReduce) return {"reduce", "adds results up"};
  switch (rank.slots[static_cast<size_t>(step.slot)].payload) {
    case Payload::kQuery:
      return {"query", "queries arrive"};
    case Payload::kKv:
      return {"kv", "keys and values arrive"};
    case Payload::kOutput:
      return {"output", "outputs arrive"};
    case Payload::kQueryGrad:
      return {"qgrad", "gradients of queries arrive"};
    case Payload::kKvGrad:
      return {"kvgrad", "gradients of keys and values arrive"};
  }
  return kWait;
}

std::string BlocksText(const std::vector<BlockRows>& rows) {
  std::set<int> blocks;
  for (const BlockRows& each : rows) blocks.insert(each.block);
  if (blocks.empty()) return "";
  if (blocks.size() == 1) return absl::StrCat(*blocks.begin());
  return absl::StrCat(*blocks.begin(), "..", *blocks.rbegin());
}

// "q 1, kv 2" of an attend; else the block.
std::string LabelOf(const Step& step) {
  if (step.kind != StepKind::kAttend) return absl::StrCat(step.rows.block);
  return absl::StrCat("q ", BlocksText(step.attend.q_rows), ", kv ", BlocksText(step.attend.kv_rows));
}

struct Bar {
  StepTiming timing;
  Look look;
  std::string title, label;
};

// Bars in rows such that those of a row do not overlap, while rows suffice.
std::vector<std::vector<Bar>> RowsOf(std::vector<Bar> bars) {
  std::stable_sort(bars.begin(), bars.end(),
                   [](const Bar& a, const Bar& b) { return a.timing.start < b.timing.start; });
  std::vector<std::vector<Bar>> rows(1);
  for (Bar& bar : bars) {
    const auto ends_first = [](const std::vector<Bar>& a, const std::vector<Bar>& b) {
      return !b.empty() && (a.empty() || a.back().timing.end < b.back().timing.end);
    };
    const auto free = std::find_if(rows.begin(), rows.end(), [&](const std::vector<Bar>& row) {
      return row.empty() || row.back().timing.end <= bar.timing.start;
    });
    if (free != rows.end()) {
      free->push_back(std::move(bar));
    } else if (rows.size() < kMostRows) {
      rows.push_back({std::move(bar)});
    } else {
      std::min_element(rows.begin(), rows.end(), ends_first)->push_back(std::move(bar));
    }
  }
  return rows;
}

class Picture {
 public:
  Picture(const ExchangePlan& plan, const Simulation& simulation, absl::string_view note)
      : plan_(plan),
        note_(note),
        simulation_(simulation),
        scale_(simulation.makespan > 0 ? kPlot / simulation.makespan : 0) {
    size_t steps = 0;
    for (const RankPlan& rank : plan.ranks) steps += rank.steps.size();
    many_bars_ = steps > kManyBars;
    // The unit in which the makespan has digits before the point.
    if (simulation.makespan < 1e-3) {
      unit_ = "us", per_second_ = 1e6;
    } else if (simulation.makespan < 1) {
      unit_ = "ms", per_second_ = 1e3;
    }
  }

  std::string Draw() {
    double y = kFirstRankY;
    for (size_t r = 0; r < plan_.ranks.size(); ++r) y = DrawRank(r, y);
    const std::string lanes = std::move(svg_);
    svg_.clear();
    const double width = kLeft + kPlot + kRight;
    absl::StrAppendFormat(
        &svg_,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%.0f\" height=\"%.0f\" "
        "viewBox=\"0 0 %.0f %.0f\">\n%s<rect class=\"bg\" width=\"100%%\" height=\"100%%\"/>\n",
        width, y, width, y, kStyle);
    DrawTitle();
    DrawLegend();
    svg_ += lanes;
    DrawAxis(y - kRankGap);
    return svg_ + "</svg>\n";
  }

 private:
  static std::string Escaped(const std::string& text) {
    return absl::StrReplaceAll(text, {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}});
  }
  std::string TimeText(double seconds) const {
    return absl::StrFormat("%.4g %s", seconds * per_second_, unit_);
  }
  std::string TimesText(const StepTiming& timing) const {
    return absl::StrCat(TimeText(timing.start), " to ", TimeText(timing.end), ", ",
                        TimeText(timing.end - timing.start));
  }

  void Text(double x, double y, const char* style, const std::string& text) {
    absl::StrAppendFormat(&svg_, "<text class=\"%s\" x=\"%.1f\" y=\"%.1f\">%s</text>\n", style, x, y,
                          Escaped(text));
  }

  void DrawTitle() {
    const double exposed = simulation_.exposed.empty()
                               ? 0
                               : *std::max_element(simulation_.exposed.begin(), simulation_.exposed.end());
    Text(8, kTitleY, "n",
         absl::StrCat(note_, note_.empty() ? "" : ": ", plan_.name, ", ",
                      plan_.pass == Pass::kForward ? "forward" : "backward", ", ", plan_.ranks.size(),
                      " ranks: ", Name(simulation_.source), " ", TimeText(simulation_.makespan), ", at most ",
                      TimeText(exposed), " exposed"));
  }

  // Of what was drawn.
  void DrawLegend() {
    double x = 8;
    for (const auto& [style, name] : seen_) {
      absl::StrAppendFormat(&svg_, "<path class=\"%s\" stroke-width=\"11\" d=\"M%.1f %.1fh11\"/>\n", style, x,
                            kLegendY - 4);
      Text(x + 15, kLegendY, "", name);
      x += 30 + kLetterWidth * static_cast<double>(name.size());
    }
  }

  // At 1, 2 or 5 times a power of ten, about ten of them.
  void DrawAxis(double bottom) {
    const double total = simulation_.makespan * per_second_;
    if (total <= 0) return;
    const double power = std::pow(10.0, std::floor(std::log10(total / 10)));
    double tick = power;
    for (const double factor : {2.0, 5.0, 10.0}) {
      if (total / tick > 12) tick = factor * power;
    }
    for (int i = 0; i * tick <= total; ++i) {
      const double x = kLeft + i * tick / per_second_ * scale_;
      absl::StrAppendFormat(&svg_, "<path class=\"grid\" d=\"M%.1f %.1fV%.1f\"/>\n", x, kAxisY + 2, bottom);
      Text(x + 2, kAxisY, "l", absl::StrFormat("%g %s", i * tick, unit_));
    }
    absl::StrAppendFormat(&svg_, "<path class=\"end\" d=\"M%.1f %.1fV%.1f\"/>\n", kLeft + kPlot, kAxisY + 2,
                          bottom);
  }

  double DrawRank(size_t r, double y) {
    const RankPlan& rank = plan_.ranks[r];
    std::vector<Bar> computing, operands, results;
    for (size_t s = 0; s < rank.steps.size(); ++s) {
      const Step& step = rank.steps[s];
      if (step.kind == StepKind::kSend) continue;
      const StepTiming& timing = simulation_.steps[r][s];
      const bool computes = IsCompute(step.kind);
      const bool result = !computes && IsResult(rank.slots[static_cast<size_t>(step.slot)].payload);
      (computes ? computing
       : result ? results
                : operands)
          .push_back({timing, LookOf(rank, step), TitleOf(r, s), many_bars_ ? "" : LabelOf(step)});
    }
    AddWaits(r, &computing);
    Text(8, y + kComputeHeight - 4, "n", absl::StrCat("rank ", r));
    y = DrawLane("computing", computing, kComputeHeight, y);
    if (!operands.empty()) y = DrawLane("operands", operands, kArrivalHeight, y);
    if (!results.empty()) y = DrawLane("results", results, kArrivalHeight, y);
    return y + kRankGap;
  }

  std::string TitleOf(size_t r, size_t s) const {
    return many_bars_ ? "" : StepText(plan_, static_cast<int>(r), s);
  }

  // Where the rank has begun its part, has not ended it and does not compute.
  void AddWaits(size_t r, std::vector<Bar>* computing) const {
    std::vector<Bar> waits;
    const auto add = [&](double start, double end) {
      if ((end - start) * scale_ < kShortest) return;
      waits.push_back({{start, end}, kWait, absl::StrCat("rank ", r, " waits for transfers"), ""});
    };
    double computed = 0, last = 0;
    for (const Bar& bar : *computing) {
      add(computed, bar.timing.start);
      computed = bar.timing.end;
    }
    for (const StepTiming& timing : simulation_.steps[r]) last = std::max(last, timing.end);
    add(computed, last);
    computing->insert(computing->end(), waits.begin(), waits.end());
  }

  double DrawLane(const char* name, std::vector<Bar> bars, double height, double y) {
    const std::vector<std::vector<Bar>> rows = RowsOf(std::move(bars));
    const double row_height = rows.size() > 1 ? kRowHeight : height;
    height = row_height * static_cast<double>(rows.size());
    Text(72, y + row_height - 3, "l", name);
    absl::StrAppendFormat(&svg_,
                          "<rect class=\"lane\" x=\"%.0f\" y=\"%.1f\" width=\"%.0f\" height=\"%.0f\"/>\n",
                          kLeft, y, kPlot, height);
    for (const std::vector<Bar>& row : rows) {
      absl::StrAppendFormat(&svg_, "<g transform=\"translate(%.0f %.1f)\" stroke-width=\"%.0f\">\n", kLeft,
                            y + row_height / 2, row_height);
      if (many_bars_) {
        DrawManyBars(row);
      } else {
        for (const Bar& bar : row) DrawBar(bar);
      }
      svg_ += "</g>\n";
      y += row_height;
    }
    return y + kLaneGap;
  }

  void DrawBar(const Bar& bar) {
    seen_.insert({bar.look.style, bar.look.name});
    const double x = bar.timing.start * scale_;
    // A gap tells neighbours apart where there is room for one.
    const double width = (bar.timing.end - bar.timing.start) * scale_;
    const double drawn = std::max(kShortest, width > 3 ? width - 0.6 : width);
    absl::StrAppendFormat(&svg_, "<path class=\"%s\" d=\"M%.1f 0h%.1f\"><title>%s: %s</title></path>\n",
                          bar.look.style, x, drawn, Escaped(bar.title), TimesText(bar.timing));
    const double text_width = kLetterWidth * static_cast<double>(bar.label.size());
    if (bar.label.empty() || text_width > width) return;
    const bool on_dark = bar.look.style == std::string("attend");
    Text(x + (width - text_width) / 2, 3.2, on_dark ? "b on" : "b", bar.label);
  }

  // Whole pixels; what touches is one.
  void DrawManyBars(const std::vector<Bar>& row) {
    struct Shape {
      std::string path;
      int64_t begin = 0, end = -1;  // not yet in the path
    };
    std::map<std::string, Shape> shapes;  // by style
    const auto close = [](Shape* shape) {
      if (shape->end > shape->begin)
        absl::StrAppend(&shape->path, "M", shape->begin, " 0h", shape->end - shape->begin);
    };
    for (const Bar& bar : row) {
      seen_.insert({bar.look.style, bar.look.name});
      Shape& shape = shapes[bar.look.style];
      const auto begin = static_cast<int64_t>(std::floor(bar.timing.start * scale_));
      const auto end = std::max(begin + 1, static_cast<int64_t>(std::floor(bar.timing.end * scale_)));
      if (begin > shape.end) {
        close(&shape);
        shape.begin = begin;
      }
      shape.end = std::max(shape.end, end);
    }
    for (auto& [style, shape] : shapes) {
      close(&shape);
      absl::StrAppend(&svg_, "<path class=\"", style, "\" d=\"", shape.path, "\"/>\n");
    }
  }

  const ExchangePlan& plan_;
  const std::string note_;
  const Simulation& simulation_;
  const double scale_;  // pixels per second
  bool many_bars_ = false;
  const char* unit_ = "s";
  double per_second_ = 1;
  std::set<std::pair<std::string, std::string>> seen_;  // style, name
  std::string svg_;
};

}  // namespace

std::string TimelineSvg(const ExchangePlan& plan, const Simulation& simulation, absl::string_view note) {
  return Picture(plan, simulation, note).Draw();
}

}  // namespace annulus
