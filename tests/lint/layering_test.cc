// Reads every #include of the shipped sources against the table of layers: a lower layer never includes a
// higher one, kernels and comm never include each other, and a third-party header appears only where the
// table says.

#include <optional>
#include <regex>

#include "lint/source_tree.h"

namespace annulus::testing {
namespace {

struct Layer {
  std::string name;
  int level;
  std::vector<std::string> folders;  // a file belongs to the layer with the longest matching folder
};

const std::vector<Layer>& Layers() {
  static const std::vector<Layer> layers = {
      {"base", 0, {"include/annulus/base", "src/base"}},
      {"device", 1, {"include/annulus/device", "src/device"}},
      {"ops", 2, {"include/annulus/ops", "kernels"}},
      {"comm", 2, {"include/annulus/comm", "comm"}},
      {"parallel", 3, {"include/annulus/parallel", "src/parallel"}},
      {"model", 4, {"include/annulus/model", "src/model"}},
      {"train",
       5,
       {"include/annulus/train", "src/config", "src/data", "src/optim", "src/checkpoint", "src/hf",
        "src/trainer"}},
      {"study", 6, {"include/annulus/study", "src/study"}},
      {"app", 7, {"launch"}},
  };
  return layers;
}

// The public headers (include/) stand in no folder list but Abseil's: they name no other library.
struct ThirdParty {
  std::string pattern;  // of the whole header name
  std::vector<std::string> folders;
};

const std::vector<ThirdParty>& ThirdParties() {
  static const std::vector<ThirdParty> rules = {
      {"absl/.*", SourceFolders()},
      {"xxhash\\.h", {"src/base"}},
      {"cuda.*\\.h|nvtx.*|cooperative_groups.*|cub/.*", {"src/device", "kernels", "comm"}},
      {"cublas.*|cudnn.*", {"kernels"}},
      {"cblas\\.h|openblas_config\\.h", {"kernels", "launch"}},
      {"mpi\\.h|nccl\\.h", {"comm"}},
      {"google/protobuf/.*|.*\\.pb\\.h", {"src/config"}},
      {"nlohmann/.*", {"src/checkpoint", "src/config", "src/hf", "src/trainer", "src/study", "launch"}},
  };
  return rules;
}

// The C++ library (no dot in the name), the C library and POSIX, and the compiler's intrinsics.
bool IsSystemHeader(const std::string& header) {
  static const std::regex system(
      "[a-z_0-9]+|(sys|linux|arpa|netinet)/[a-z_0-9]+\\.h|(x86|imm)intrin\\.h|"
      "(dirent|dlfcn|errno|execinfo|fcntl|ftw|limits|link|netdb|poll|pthread|pwd|sched|semaphore|signal|"
      "spawn|string|termios|time|ucontext|unistd)\\.h");
  return std::regex_match(header, system);
}

bool IsInFolder(const std::string& file, const std::string& folder) {
  return file.size() > folder.size() && file.compare(0, folder.size(), folder) == 0 &&
         file[folder.size()] == '/';
}

bool IsInAnyFolder(const std::string& file, const std::vector<std::string>& folders) {
  return std::any_of(folders.begin(), folders.end(),
                     [&](const std::string& folder) { return IsInFolder(file, folder); });
}

const Layer* LayerOf(const std::string& file) {
  const auto& layers = Layers();
  const auto found = std::find_if(layers.begin(), layers.end(),
                                  [&](const Layer& layer) { return IsInAnyFolder(file, layer.folders); });
  return found == layers.end() ? nullptr : &*found;
}

struct Include {
  std::string header;
  bool quoted;
};

std::optional<Include> ParseInclude(const std::string& line) {
  static const std::regex directive("\\s*#\\s*include\\s*([<\"])([^>\"]+)[>\"].*");
  std::smatch match;
  if (!std::regex_match(line, match, directive)) return std::nullopt;
  return Include{match[2], match[1] == "\""};
}

// The file of this tree that `header` names when `from` includes it, relative to the root.
std::optional<std::string> Resolve(const std::filesystem::path& root, const std::string& from,
                                   const std::string& header) {
  const std::filesystem::path beside = std::filesystem::path(from).parent_path();
  for (const std::filesystem::path& base : {beside, std::filesystem::path("include"),
                                            std::filesystem::path(), std::filesystem::path("src")}) {
    const std::filesystem::path candidate = (base / header).lexically_normal();
    if (std::filesystem::is_regular_file(root / candidate)) return candidate.generic_string();
  }
  return std::nullopt;
}

// Empty when `file` may include `include`, else what is wrong.
std::string Judge(const std::filesystem::path& root, const std::string& file, const Layer& layer,
                  const Include& include) {
  for (const ThirdParty& rule : ThirdParties()) {
    if (!std::regex_match(include.header, std::regex(rule.pattern))) continue;
    return IsInAnyFolder(file, rule.folders) ? "" : "third-party header not allowed here";
  }
  if (!include.quoted) return IsSystemHeader(include.header) ? "" : "header that no rule of this test knows";
  const std::optional<std::string> target = Resolve(root, file, include.header);
  if (!target) return "no such file in the tree";
  const Layer* other = LayerOf(*target);
  if (other == nullptr) return "a file outside the layers";
  if (other->level > layer.level) return layer.name + " includes the higher layer " + other->name;
  if (other->level == layer.level && other->name != layer.name) {
    return layer.name + " and " + other->name + " never include each other";
  }
  return IsInFolder(file, "include") && !IsInFolder(*target, "include")
             ? "a public header includes a private one"
             : "";
}

// One line "file:line: header: what is wrong" for each include that breaks the table.
std::vector<std::string> FindViolations(const std::filesystem::path& root) {
  std::vector<std::string> violations;
  for (const std::string& file : ListSources(root, SourceFolders())) {
    const Layer* layer = LayerOf(file);
    if (layer == nullptr) {
      violations.push_back(file + ": in no layer's folder");
      continue;
    }
    const std::vector<std::string> lines = ReadLines(root / file);
    for (size_t i = 0; i < lines.size(); ++i) {
      const std::optional<Include> include = ParseInclude(lines[i]);
      if (!include) continue;
      const std::string wrong = Judge(root, file, *layer, *include);
      if (wrong.empty()) continue;
      violations.push_back(file + ":" + std::to_string(i + 1) + ": " + include->header + ": " + wrong);
    }
  }
  return violations;
}

TEST(Layering, EveryIncludeOfTheTreeIsAllowed) {
  const std::filesystem::path root = ANNULUS_SOURCE_DIR;
  for (const Layer& layer : Layers()) {
    if (layer.name == "app") continue;
    EXPECT_FALSE(ListSources(root, layer.folders).empty()) << "no source of layer " << layer.name;
  }
  EXPECT_FALSE(ListSources(root, {"launch"}).empty());
  EXPECT_EQ(Join(FindViolations(root)), "");
}

// A tree with one header in each layer; each case adds one file to it.
class PlantedInclude : public ::testing::Test {
 protected:
  PlantedInclude() {
    for (const char* name : {"base", "device", "ops", "comm", "parallel", "model", "train"}) {
      tree_.Write(std::string("include/annulus/") + name + "/x.h", "#pragma once\n#include <string>\n");
    }
    tree_.Write("src/config/private.h", "#pragma once\n");
    tree_.Write("kernels/gemm/tile.h", "#pragma once\n");
  }

  std::string Plant(const std::string& file, const std::string& line) {
    tree_.Write(file, "// planted\n" + line + "\n");
    const std::string found = Join(FindViolations(tree_.root()));
    std::filesystem::remove(tree_.root() / file);
    return found;
  }

  PlantedTree tree_;
};

TEST_F(PlantedInclude, AllowedOnesPass) {
  const std::vector<std::pair<std::string, std::string>> allowed = {
      {"src/base/a.cc", "#include <xxhash.h>"},
      {"src/base/a.cc", "#include <sys/mman.h>"},
      {"include/annulus/model/a.h", "#include \"absl/status/status.h\""},
      {"include/annulus/model/a.h", "#include \"annulus/comm/x.h\""},
      {"kernels/gemm/a.cc", "#include <cblas.h>"},
      {"kernels/gemm/a.cc", "#include \"tile.h\""},
      {"kernels/norm/a.cc", "#include \"../gemm/tile.h\""},
      {"comm/exchange/a.cc", "#  include <mpi.h>  // why"},
      {"src/parallel/a.cc", "#include \"annulus/ops/x.h\""},
      {"src/config/a.cc", "#include \"annulus.pb.h\""},
      {"src/trainer/a.cc", "#include \"annulus/train/x.h\""},
      {"launch/a.cc", "#include <nlohmann/json.hpp>"},
      {"src/base/a.cc", "// #include <mpi.h>"},
  };
  for (const auto& [file, line] : allowed) EXPECT_EQ(Plant(file, line), "") << file << " " << line;
}

TEST_F(PlantedInclude, ForbiddenOnesAreFound) {
  struct Case {
    std::string file, line, expected;
  };
  const std::vector<Case> cases = {
      {"src/base/a.cc", "#include \"annulus/device/x.h\"", "base includes the higher layer device"},
      {"include/annulus/model/a.h", "#include \"annulus/train/x.h\"", "higher layer train"},
      {"kernels/gemm/a.cc", "#include \"annulus/comm/x.h\"", "ops and comm never"},
      {"comm/a.cc", "#include \"annulus/ops/x.h\"", "comm and ops never"},
      {"comm/a.cc", "#include \"../kernels/gemm/tile.h\"", "comm and ops never"},
      {"src/parallel/a.cc", "#include \"config/private.h\"", "parallel includes the higher layer train"},
      {"include/annulus/comm/a.h", "#include <mpi.h>", "third-party"},
      {"include/annulus/device/a.h", "#include <cuda_runtime.h>", "third-party"},
      {"include/annulus/ops/a.h", "#include <cblas.h>", "third-party"},
      {"include/annulus/comm/a.h", "#include <nccl.h>", "third-party"},
      {"include/annulus/train/a.h", "#include \"annulus.pb.h\"", "third-party"},
      {"include/annulus/train/a.h", "#include \"../../../src/config/private.h\"", "a private one"},
      {"src/trainer/a.cc", "#include \"annulus.pb.h\"", "third-party"},
      {"src/model/a.cc", "#include <google/protobuf/message.h>", "third-party"},
      {"src/trainer/a.cc", "#include <mpi.h>", "third-party"},
      {"kernels/gemm/a.cu", "#include \"nccl.h\"", "third-party"},
      {"src/parallel/a.cc", "#include <cuda_bf16.h>", "third-party"},
      {"src/data/a.cc", "#include <nlohmann/json.hpp>", "third-party"},
      {"src/model/a.cc", "#include <boost/any.hpp>", "no rule"},
      {"src/model/a.cc", "#include \"annulus/model/missing.h\"", "no such file"},
      {"src/odd/a.cc", "", "in no layer's folder"},
  };
  for (const Case& c : cases) {
    const std::string found = Plant(c.file, c.line);
    EXPECT_NE(found.find(c.expected), std::string::npos) << c.file << " " << c.line << ": " << found;
    EXPECT_EQ(found.rfind(c.file, 0), 0u) << found;
    EXPECT_EQ(std::count(found.begin(), found.end(), '\n'), 1) << found;
  }
}

}  // namespace
}  // namespace annulus::testing
