#include "annulus/train/checkpoint.h"

#include <algorithm>
#include <filesystem>
#include <optional>
#include <utility>

#include "absl/strings/strip.h"
#include "annulus/base/file.h"
#include "annulus/base/hash.h"
#include "manifest.h"
#include "step_directory.h"

namespace annulus {
namespace {

// A file of a committed checkpoint that is missing or malformed was there and well-formed once.
absl::Status AsDataLoss(const absl::Status& status, const std::string& path) {
  if (absl::IsNotFound(status))
    return absl::DataLossError(absl::StrCat(path, ": missing from this checkpoint"));
  if (absl::IsInvalidArgument(status)) return absl::DataLossError(status.message());
  return status;
}

absl::StatusOr<Manifest> ReadManifest(const std::string& step_path) {
  const std::string path = JoinPath(step_path, kManifestName), commit_path = JoinPath(step_path, kCommitName);
  const absl::StatusOr<std::string> commit = ReadFile(commit_path);
  if (!commit.ok()) return AsDataLoss(commit.status(), commit_path);
  const absl::StatusOr<std::string> text = ReadFile(path);
  if (!text.ok()) return AsDataLoss(text.status(), path);
  if (*commit != CommitText(*text))
    return absl::DataLossError(absl::StrCat(commit_path, ": does not hold the hash of ", path, ", ",
                                            absl::StripSuffix(CommitText(*text), "\n"),
                                            ": one of them is damaged"));
  absl::StatusOr<Manifest> manifest = ManifestFromText(path, *text);
  if (!manifest.ok()) return AsDataLoss(manifest.status(), path);
  return manifest;
}

enum class HashCheck { kVerify, kLeaveToOthers };

absl::StatusOr<SafetensorsFile> OpenShard(const std::string& path, const ManifestFile& expected,
                                          HashCheck check) {
  absl::StatusOr<MappedFile> mapped = MappedFile::Open(path);
  if (!mapped.ok()) return AsDataLoss(mapped.status(), path);
  const absl::Span<const uint8_t> bytes = mapped->bytes();
  if (static_cast<int64_t>(bytes.size()) != expected.bytes)
    return absl::DataLossError(
        absl::StrCat(path, ": ", bytes.size(), " bytes: expected ", expected.bytes, " (manifest)"));
  if (check == HashCheck::kVerify) {
    const uint64_t hash = Hash64(bytes.data(), bytes.size());
    if (hash != expected.hash)
      return absl::DataLossError(
          absl::StrCat(path, ": hash ", Hex64(hash), ": expected ", Hex64(expected.hash), " (manifest)"));
  }
  absl::StatusOr<SafetensorsFile> file = SafetensorsFile::Open(*std::move(mapped));
  if (!file.ok()) return AsDataLoss(file.status(), path);

  const std::vector<ManifestTensor> found = Describe(file->tensors());
  const auto [in_file, in_manifest] =
      std::mismatch(found.begin(), found.end(), expected.tensors.begin(), expected.tensors.end());
  const auto text = [](auto at, const std::vector<ManifestTensor>& list) {
    return at == list.end() ? std::string("no tensor")
                            : absl::StrCat("\"", at->name, "\" ", ToString(at->type));
  };
  if (in_file != found.end() || in_manifest != expected.tensors.end())
    return absl::DataLossError(absl::StrCat(path, ": holds ", text(in_file, found), ": expected ",
                                            text(in_manifest, expected.tensors), " (manifest)"));
  return file;
}

struct Choice {
  std::string path;         // a step directory
  std::string other_steps;  // for the error if it is damaged
};

bool IsStepDirectory(const std::string& path) {
  if (Exists(JoinPath(path, kManifestName)) || Exists(JoinPath(path, kCommitName))) return true;
  return Exists(path) && StepFromName(std::filesystem::path(path).filename().string()).has_value();
}

// Committed ones, the highest first.
std::string OtherSteps(const std::vector<StepDirectory>& steps, const std::string& path) {
  const std::string name = std::filesystem::path(path).filename().string();
  std::string others;
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    const bool chosen = std::filesystem::path(step->path).filename().string() == name;
    if (step->committed && !chosen) absl::StrAppend(&others, " ", step->path);
  }
  return others;
}

// A step that is named; else the step that LATEST names, if there is such a directory, else the highest
// committed one.
absl::StatusOr<Choice> ChooseStep(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  if (IsStepDirectory(path)) {
    const std::string run = std::filesystem::path(path).parent_path().string();
    const absl::StatusOr<std::vector<StepDirectory>> beside = ListSteps(run.empty() ? "." : run);
    return Choice{.path = path, .other_steps = beside.ok() ? OtherSteps(*beside, path) : ""};
  }
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<StepDirectory> steps, ListSteps(path));
  std::optional<int64_t> latest;
  if (const absl::StatusOr<std::string> text = ReadFile(JoinPath(path, kLatestName)); text.ok())
    latest = StepFromName(absl::StripSuffix(*text, "\n"));

  const StepDirectory* chosen = nullptr;
  for (const StepDirectory& step : steps)
    if (step.committed) chosen = &step;
  for (const StepDirectory& step : steps)
    if (latest == step.step) chosen = &step;  // without COMMIT it is damaged: LATEST follows COMMIT
  if (chosen == nullptr) return absl::NotFoundError(absl::StrCat(path, ": no committed checkpoint in it"));
  return Choice{.path = chosen->path, .other_steps = OtherSteps(steps, chosen->path)};
}

absl::Status WithOtherSteps(const absl::Status& status, const std::string& other_steps) {
  if (!absl::IsDataLoss(status)) return status;
  return absl::DataLossError(absl::StrCat(status.message(),
                                          other_steps.empty()
                                              ? "; there is no other committed checkpoint beside it"
                                              : "; other committed checkpoints, to be named in its place:",
                                          other_steps));
}

}  // namespace

absl::StatusOr<Checkpoint> Checkpoint::OpenStep(const std::string& path, int part, int parts) {
  ANNULUS_ASSIGN_OR_RETURN(const Manifest manifest, ReadManifest(path));
  Checkpoint checkpoint;
  checkpoint.path_ = path;
  checkpoint.meta_ = manifest.meta;
  for (size_t i = 0; i < manifest.files.size(); ++i) {
    const ManifestFile& expected = manifest.files[i];
    const bool mine = i % static_cast<size_t>(parts) == static_cast<size_t>(part);
    ANNULUS_ASSIGN_OR_RETURN(SafetensorsFile file,
                             OpenShard(JoinPath(path, expected.name), expected,
                                       mine ? HashCheck::kVerify : HashCheck::kLeaveToOthers));
    for (const NamedTensor& t : file.tensors()) checkpoint.tensors_.emplace(t.name, t.tensor);
    checkpoint.files_.push_back(std::move(file));
  }
  return checkpoint;
}

absl::StatusOr<Checkpoint> Checkpoint::Open(const std::string& path) {
  ANNULUS_ASSIGN_OR_RETURN(const Choice choice, ChooseStep(path));
  absl::StatusOr<Checkpoint> checkpoint = OpenStep(choice.path, 0, 1);
  if (!checkpoint.ok()) return WithOtherSteps(checkpoint.status(), choice.other_steps);
  return checkpoint;
}

absl::StatusOr<Checkpoint> Checkpoint::Open(Communicator& world, const std::string& path) {
  absl::StatusOr<Choice> choice = Choice{};
  if (world.rank() == 0) choice = ChooseStep(path);
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(choice.status()));
  ANNULUS_ASSIGN_OR_RETURN(choice->path, world.BroadcastString(choice->path, 0));
  ANNULUS_ASSIGN_OR_RETURN(choice->other_steps, world.BroadcastString(choice->other_steps, 0));

  absl::StatusOr<Checkpoint> checkpoint = OpenStep(choice->path, world.rank(), world.size());
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(WithOtherSteps(checkpoint.status(), choice->other_steps)));
  return checkpoint;
}

std::vector<std::string> Checkpoint::tensor_names() const {
  std::vector<std::string> names;
  for (const auto& [name, tensor] : tensors_) names.push_back(name);
  return names;
}

absl::StatusOr<ConstTensorRef> Checkpoint::Find(absl::string_view name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end())
    return absl::NotFoundError(absl::StrCat("tensor \"", name, "\" is not in this checkpoint"));
  return found->second;
}

}  // namespace annulus
