#pragma once

// Files: whole reads, durable writes, memory maps. Every error names the path and the system's reason.

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "annulus/base/hash.h"
#include "annulus/base/status.h"

namespace annulus {

// Status for a failed system call on `path`, with strerror(errno). NotFound for ENOENT and ENOTDIR,
// ResourceExhausted for ENOSPC, EDQUOT and EFBIG, PermissionDenied for EACCES, EPERM and EROFS, else
// Unavailable.
absl::Status FileError(absl::string_view what, absl::string_view path);

absl::StatusOr<std::string> ReadFile(const std::string& path);

// Writes, fsyncs and closes. Not atomic: use it inside a temporary directory, or WriteFileAtomically.
absl::Status WriteFileDurably(const std::string& path, absl::string_view contents);
// The same through `path`.tmp and rename, then fsync of the parent directory.
absl::Status WriteFileAtomically(const std::string& path, absl::string_view contents);

absl::Status SyncDirectory(const std::string& path);
absl::Status MakeDirectories(const std::string& path);  // like mkdir -p
absl::Status RemoveAll(const std::string& path);        // OK when there is nothing
absl::Status Rename(const std::string& from, const std::string& to);
bool Exists(const std::string& path);
absl::StatusOr<std::vector<std::string>> ListDirectory(const std::string& path);  // names, sorted

// Sequential writer that hashes what it writes. Finish() fsyncs and closes; without it the file is
// closed and left as it is.
class DurableFile {
 public:
  static absl::StatusOr<DurableFile> Create(const std::string& path);
  DurableFile(DurableFile&& other) noexcept;
  DurableFile& operator=(DurableFile&&) = delete;
  ~DurableFile();

  absl::Status Write(const void* data, int64_t bytes);
  absl::Status Finish();
  int64_t bytes_written() const { return bytes_written_; }
  uint64_t hash() const { return hasher_->Digest(); }

 private:
  DurableFile(std::string path, int fd) : path_(std::move(path)), fd_(fd), hasher_(new Hasher) {}
  std::string path_;
  int fd_ = -1;
  int64_t bytes_written_ = 0;
  std::unique_ptr<Hasher> hasher_;
};

// Held by one process at a time; the system lets go of it when the process ends, however it ends.
class FileLock {
 public:
  // Makes the file if need be and writes `owner` into it. FailedPrecondition names the present owner.
  static absl::StatusOr<FileLock> Take(const std::string& path, absl::string_view owner);
  FileLock(FileLock&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileLock& operator=(FileLock&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~FileLock();

 private:
  explicit FileLock(int fd) : fd_(fd) {}
  int fd_ = -1;
};

// A whole file mapped read-only; 64-bit sizes. An empty file maps to an empty span.
class MappedFile {
 public:
  static absl::StatusOr<MappedFile> Open(const std::string& path);
  MappedFile() = default;
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  // DataLoss when the file is now shorter than when it was mapped: touching what is gone would kill the
  // process.
  absl::Status CheckWhole() const;

  absl::Span<const uint8_t> bytes() const { return {data_, static_cast<size_t>(size_)}; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  const uint8_t* data_ = nullptr;
  int64_t size_ = 0;
  int fd_ = -1;  // open as long as the map, for CheckWhole
};

}  // namespace annulus
