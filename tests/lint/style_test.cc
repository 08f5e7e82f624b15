// House limits that a compiler does not check: length of files and lines, header guards, the licence, and
// that every script parses and may be executed.

#include <cstdlib>

#include "lint/source_tree.h"

namespace annulus::testing {
namespace {

constexpr size_t kMaxFileLines = 500;    // the aim is 400
constexpr size_t kMaxKernelLines = 700;  // of a .cuh: one kernel with its pipeline stays in one file
constexpr size_t kMaxColumns = 120;    // the aim is 110, as .clang-format says

// Characters, not bytes, of UTF-8.
size_t Columns(const std::string& line) {
  return std::count_if(line.begin(), line.end(), [](unsigned char byte) { return (byte & 0xC0) != 0x80; });
}

std::vector<std::string> FindSourceFaults(const std::filesystem::path& root,
                                          const std::vector<std::string>& folders) {
  std::vector<std::string> faults;
  for (const std::string& file : ListSources(root, folders)) {
    const std::vector<std::string> lines = ReadLines(root / file);
    const size_t most = file.ends_with(".cuh") ? kMaxKernelLines : kMaxFileLines;
    if (lines.size() > most) {
      faults.push_back(file + ": " + std::to_string(lines.size()) + " lines, at most " + std::to_string(most));
    }
    for (size_t i = 0; i < lines.size(); ++i) {
      const std::string at = file + ":" + std::to_string(i + 1) + ": ";
      if (Columns(lines[i]) > kMaxColumns) faults.push_back(at + "longer than 120 columns");
      if (lines[i].find('\t') != std::string::npos) faults.push_back(at + "tab");
      if (!lines[i].empty() && lines[i].back() == ' ') faults.push_back(at + "trailing blank");
    }
    const bool header = file.ends_with(".h") || file.ends_with(".cuh");
    if (header && std::count(lines.begin(), lines.end(), "#pragma once") != 1) {
      faults.push_back(file + ": expected one #pragma once");
    }
  }
  return faults;
}

bool StartsWithBash(const std::filesystem::path& path) {
  std::ifstream in(path);
  std::string first;
  return std::getline(in, first) && first == "#!/usr/bin/env bash";
}

std::vector<std::filesystem::path> ListScripts(const std::filesystem::path& root) {
  std::vector<std::filesystem::path> scripts;
  for (const char* folder : {"launch", ".ci", "examples", "src"}) {
    if (!std::filesystem::is_directory(root / folder)) continue;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(root / folder)) {
      if (entry.is_regular_file() && StartsWithBash(entry.path())) scripts.push_back(entry.path());
    }
  }
  return scripts;
}

bool Parses(const std::filesystem::path& script) {
  return std::system(("bash -n '" + script.string() + "' 2>/dev/null").c_str()) == 0;
}

TEST(Style, SourcesKeepTheHouseLimits) {
  std::vector<std::string> folders = SourceFolders();
  folders.push_back("tests");
  folders.push_back("examples");
  EXPECT_EQ(Join(FindSourceFaults(ANNULUS_SOURCE_DIR, folders)), "");
}

TEST(Style, PlantedFaultsAreFound) {
  PlantedTree tree;
  std::string long_file;
  for (size_t i = 0; i < kMaxFileLines; ++i) long_file += "\n";
  tree.Write("src/long.cc", long_file);
  tree.Write("src/wide.cc", std::string(kMaxColumns, 'x') + "\n");
  tree.Write("src/guarded.h", "#pragma once\n");
  EXPECT_EQ(Join(FindSourceFaults(tree.root(), {"src"})), "");

  tree.Write("src/guarded.h", "// no guard\n");
  tree.Write("src/long.cc", long_file + "\n");
  tree.Write("src/tab.cc", "\tint x;\n");
  tree.Write("src/trailing.cc", "int x; \n");
  tree.Write("src/wide.cc", std::string(kMaxColumns + 1, 'x') + "\n");
  EXPECT_EQ(Join(FindSourceFaults(tree.root(), {"src"})),
            "src/guarded.h: expected one #pragma once\n"
            "src/long.cc: 501 lines, at most 500\n"
            "src/tab.cc:1: tab\n"
            "src/trailing.cc:1: trailing blank\n"
            "src/wide.cc:1: longer than 120 columns\n");
}

TEST(Style, LicenceIsApache2) {
  const std::string licence = Join(ReadLines(std::filesystem::path(ANNULUS_SOURCE_DIR) / "LICENSE"));
  EXPECT_NE(licence.find("Apache License"), std::string::npos);
  EXPECT_NE(licence.find("Version 2.0, January 2004"), std::string::npos);
  EXPECT_NE(licence.find("END OF TERMS AND CONDITIONS"), std::string::npos);
}

TEST(Style, ScriptsParseAndMayBeExecuted) {
  const std::vector<std::filesystem::path> scripts = ListScripts(ANNULUS_SOURCE_DIR);
  EXPECT_GE(scripts.size(), 6u) << "quickstart, test, mpirun, install_packages, slurm.sbatch, .ci/run";
  for (const std::filesystem::path& script : scripts) {
    EXPECT_TRUE(Parses(script)) << script;
    if (script.extension() == ".sbatch") continue;  // read by sbatch, not executed
    const auto mode = std::filesystem::status(script).permissions();
    EXPECT_NE(mode & std::filesystem::perms::owner_exec, std::filesystem::perms::none) << script;
  }
}

TEST(Style, BrokenScriptDoesNotParse) {
  PlantedTree tree;
  tree.Write("launch/good", "#!/usr/bin/env bash\nif true; then echo; fi\n");
  tree.Write("launch/broken", "#!/usr/bin/env bash\nif true; then echo\n");
  EXPECT_EQ(ListScripts(tree.root()).size(), 2u);
  EXPECT_TRUE(Parses(tree.root() / "launch/good"));
  EXPECT_FALSE(Parses(tree.root() / "launch/broken"));
}

TEST(Style, SerialisedProductsFailTheBuild) {
  PlantedTree tree;
  const std::string compile = std::string(ANNULUS_SOURCE_DIR) + "/src/checked_nvcc bash -c";
  const auto run = [&](const std::string& says) {
    tree.Write("kernel.o", "");
    return std::system((compile + " 'echo \"" + says + "\" >&2' -o '" + (tree.root() / "kernel.o").string() +
                        "' 2>/dev/null")
                           .c_str());
  };
  EXPECT_EQ(run("ptxas info : Used 168 registers"), 0);
  EXPECT_TRUE(std::filesystem::exists(tree.root() / "kernel.o"));
  EXPECT_NE(run("ptxas info : (C7510) Potential Performance Loss"), 0);
  EXPECT_FALSE(std::filesystem::exists(tree.root() / "kernel.o"));
  EXPECT_NE(std::system((compile + " 'exit 3'").c_str()), 0);
}

}  // namespace
}  // namespace annulus::testing
