#pragma once

// Tensors with known contents, groups of ranks as threads, and the comparison of a checkpoint with what was
// saved.

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "annulus/base/file.h"
#include "annulus/base/random.h"
#include "annulus/device/buffer.h"
#include "annulus/train/checkpoint.h"

namespace annulus::testing {

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    path_ = ::testing::TempDir() + "annulus_checkpoint_XXXXXX";
    ANNULUS_CHECK(mkdtemp(path_.data()) != nullptr) << path_;
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Every dtype, ranks 0 to 4, an empty tensor, and bytes that are no valid numbers: random bits f(salt).
class Sample {
 public:
  explicit Sample(int64_t salt) : meta_(MetaOf(salt)) {
    Add("layers.0.wq", DType::kF32, Shape({5, 7}));
    Add("layers.0.wk", DType::kF32, Shape({3, 7}));
    Add("norm", DType::kF64, Shape({3}));
    Add("adam.step", DType::kI64, Shape());
    Add("bytes \"quoted\" \xc3\xa9", DType::kU8, Shape({13}));
    Add("empty", DType::kF32, Shape({0, 4}));
    Add("order", DType::kI32, Shape({2, 1, 3, 2}));
  }

  const CheckpointMeta& meta() const { return meta_; }
  int64_t step() const { return meta_.step; }
  std::vector<NamedTensor> tensors() const {
    std::vector<NamedTensor> all;
    for (size_t i = 0; i < tensors_.size(); ++i) all.push_back({names_[i], tensors_[i].ref()});
    return all;
  }
  std::vector<NamedTensor> tensors_of(int rank, int ranks) const {
    std::vector<NamedTensor> mine;
    const std::vector<NamedTensor> all = tensors();
    for (size_t i = static_cast<size_t>(rank); i < all.size(); i += static_cast<size_t>(ranks))
      mine.push_back(all[i]);
    return mine;
  }

 private:
  static CheckpointMeta MetaOf(int64_t salt) {
    return {.step = salt % 1000,
            .consumed_sequences = (int64_t{1} << 40) + salt,
            .seed = ~uint64_t{0} - static_cast<uint64_t>(salt),
            .data_fingerprint = static_cast<uint64_t>(salt),
            .model_fingerprint = "wq f32 [5, 7]\n",
            .config = absl::StrCat("name: \"caf\xc3\xa9\"\n# ", salt, "\n")};
  }
  void Add(const std::string& name, DType dtype, Shape shape) {
    names_.push_back(name);
    tensors_.emplace_back(Device{}, dtype, shape);
    const RandomStream random(static_cast<uint64_t>(meta_.consumed_sequences), name);
    uint8_t* bytes = static_cast<uint8_t*>(tensors_.back().ref().raw());
    for (int64_t i = 0; i < tensors_.back().ref().bytes(); ++i)
      bytes[i] = static_cast<uint8_t>(random.Bits(static_cast<uint64_t>(i)));
  }

  CheckpointMeta meta_;
  std::vector<std::string> names_;
  std::vector<Tensor> tensors_;
};

// fn on every rank of a loopback group; its results by rank.
template <typename Fn>
auto OnRanks(int ranks, Fn fn) {
  using Result = decltype(fn(std::declval<Communicator&>()));
  std::vector<Communicator> group = MakeLoopbackGroup(ranks);
  std::vector<Result> results(group.size());
  std::vector<std::thread> threads;
  for (size_t r = 0; r < group.size(); ++r) threads.emplace_back([&, r] { results[r] = fn(group[r]); });
  for (std::thread& thread : threads) thread.join();
  return results;
}

inline std::vector<absl::Status> SaveOnRanks(int ranks, const std::string& directory, const Sample& sample,
                                             int64_t keep) {
  return OnRanks(ranks, [&](Communicator& world) {
    return SaveCheckpoint(world, directory, sample.meta(), sample.tensors_of(world.rank(), world.size()),
                          keep);
  });
}

inline void Save(int ranks, const std::string& directory, const Sample& sample, int64_t keep) {
  for (const absl::Status& status : SaveOnRanks(ranks, directory, sample, keep))
    ASSERT_TRUE(status.ok()) << status;
}

// "" if bit for bit the same, else the first difference.
inline std::string Difference(const Checkpoint& checkpoint, const Sample& sample) {
  const CheckpointMeta &got = checkpoint.meta(), &want = sample.meta();
  if (got.step != want.step) return absl::StrCat("step ", got.step);
  if (got.consumed_sequences != want.consumed_sequences) return "consumed_sequences";
  if (got.seed != want.seed) return "seed";
  if (got.data_fingerprint != want.data_fingerprint) return "data_fingerprint";
  if (got.model_fingerprint != want.model_fingerprint) return "model_fingerprint";
  if (got.config != want.config) return "config";
  if (checkpoint.tensor_names().size() != sample.tensors().size()) return "number of tensors";
  for (const NamedTensor& t : sample.tensors()) {
    const absl::StatusOr<ConstTensorRef> found = checkpoint.Find(t.name);
    if (!found.ok()) return found.status().ToString();
    if (found->dtype() != t.tensor.dtype() || !(found->shape() == t.tensor.shape())) return t.name + ": type";
    if (t.tensor.bytes() > 0 &&
        std::memcmp(found->raw(), t.tensor.raw(), static_cast<size_t>(t.tensor.bytes())) != 0)
      return t.name + ": data";
  }
  return "";
}

inline std::string Difference(const absl::StatusOr<Checkpoint>& checkpoint, const Sample& sample) {
  return checkpoint.ok() ? Difference(*checkpoint, sample) : checkpoint.status().ToString();
}

inline std::string Contents(const std::string& path) { return ReadFile(path).value(); }
inline void Overwrite(const std::string& path, absl::string_view contents) {
  std::ofstream file(
      path, std::ios::binary | std::ios::trunc);  // no fsync, which thousands of cases would wait for
  file.write(contents.data(), static_cast<std::streamsize>(contents.size()));
  file.close();
  ANNULUS_CHECK(file.good()) << path;
}
inline std::vector<std::string> Names(const std::string& directory) {
  return ListDirectory(directory).value();
}

}  // namespace annulus::testing
