#include "annulus/base/file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

namespace annulus {
namespace fs = std::filesystem;

absl::Status FileError(absl::string_view what, absl::string_view path) {
  const int error = errno;
  const std::string text = absl::StrCat(path, ": ", what, ": ", std::strerror(error));
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      return absl::NotFoundError(text);
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
      return absl::ResourceExhaustedError(text);
    case EACCES:
    case EPERM:
    case EROFS:
      return absl::PermissionDeniedError(text);
    default:
      return absl::UnavailableError(text);
  }
}

namespace {

absl::Status FromErrorCode(absl::string_view what, const std::string& path, const std::error_code& ec) {
  errno = ec.value();
  return FileError(what, path);
}

}  // namespace

// Reads until the end instead of trusting a size, which pipes and /proc do not have.
absl::StatusOr<std::string> ReadFile(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return FileError("open", path);
  constexpr size_t kChunkBytes = size_t{1} << 16;
  std::string contents;
  for (ssize_t got = -1; got != 0;) {
    const size_t before = contents.size();
    contents.resize(before + kChunkBytes);
    got = read(fd, contents.data() + before, kChunkBytes);
    if (got < 0 && errno != EINTR) {
      absl::Status status = FileError("read", path);
      close(fd);
      return status;
    }
    contents.resize(before + static_cast<size_t>(std::max<ssize_t>(got, 0)));
  }
  close(fd);
  return contents;
}

absl::Status WriteFileDurably(const std::string& path, absl::string_view contents) {
  ANNULUS_ASSIGN_OR_RETURN(DurableFile file, DurableFile::Create(path));
  ANNULUS_RETURN_IF_ERROR(file.Write(contents.data(), static_cast<int64_t>(contents.size())));
  return file.Finish();
}

absl::Status WriteFileAtomically(const std::string& path, absl::string_view contents) {
  const std::string tmp = path + ".tmp";
  absl::Status status = WriteFileDurably(tmp, contents);
  if (status.ok()) status = Rename(tmp, path);
  if (!status.ok()) {
    RemoveAll(tmp).IgnoreError();  // best effort; the error that counts is the first
    return status;
  }
  const std::string parent = fs::path(path).parent_path().string();
  return SyncDirectory(parent.empty() ? "." : parent);
}

absl::Status SyncDirectory(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return FileError("open directory", path);
  const int rc = fsync(fd);
  absl::Status status = rc == 0 ? absl::OkStatus() : FileError("fsync directory", path);
  close(fd);
  return status;
}

absl::Status MakeDirectories(const std::string& path) {
  std::error_code ec;
  fs::create_directories(path, ec);
  if (ec) return FromErrorCode("create directory", path, ec);
  return absl::OkStatus();
}

absl::Status RemoveAll(const std::string& path) {
  std::error_code ec;
  fs::remove_all(path, ec);
  if (ec) return FromErrorCode("remove", path, ec);
  return absl::OkStatus();
}

absl::Status Rename(const std::string& from, const std::string& to) {
  if (std::rename(from.c_str(), to.c_str()) != 0) return FileError(absl::StrCat("rename to ", to), from);
  return absl::OkStatus();
}

bool Exists(const std::string& path) {
  std::error_code ec;
  return fs::exists(path, ec);
}

absl::StatusOr<std::vector<std::string>> ListDirectory(const std::string& path) {
  std::error_code ec;
  fs::directory_iterator it(path, ec);
  if (ec) return FromErrorCode("list directory", path, ec);
  std::vector<std::string> names;
  while (it != fs::directory_iterator()) {
    names.push_back(it->path().filename().string());
    it.increment(ec);
    if (ec) return FromErrorCode("list directory", path, ec);
  }
  std::sort(names.begin(), names.end());
  return names;
}

absl::StatusOr<DurableFile> DurableFile::Create(const std::string& path) {
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return FileError("create", path);
  return DurableFile(path, fd);
}

DurableFile::DurableFile(DurableFile&& other) noexcept
    : path_(std::move(other.path_)),
      fd_(std::exchange(other.fd_, -1)),
      bytes_written_(other.bytes_written_),
      hasher_(std::move(other.hasher_)) {}

DurableFile::~DurableFile() {
  if (fd_ >= 0) close(fd_);
}

absl::Status DurableFile::Write(const void* data, int64_t bytes) {
  if (bytes == 0) return absl::OkStatus();  // `data` may be null
  const char* cursor = static_cast<const char*>(data);
  for (int64_t left = bytes; left > 0;) {
    const ssize_t written = write(fd_, cursor, static_cast<size_t>(std::min<int64_t>(left, 1 << 30)));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return FileError("write", path_);
    cursor += written;
    left -= written;
  }
  hasher_->Update(data, static_cast<size_t>(bytes));
  bytes_written_ += bytes;
  return absl::OkStatus();
}

absl::Status DurableFile::Finish() {
  if (fsync(fd_) != 0) return FileError("fsync", path_);
  if (close(std::exchange(fd_, -1)) != 0) return FileError("close", path_);
  return absl::OkStatus();
}

absl::StatusOr<FileLock> FileLock::Take(const std::string& path, absl::string_view owner) {
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (fd < 0) return FileError("open", path);
  FileLock lock(fd);
  if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) return FileError("lock", path);
    char holder[256] = {};
    const ssize_t read_bytes = pread(fd, holder, sizeof(holder) - 1, 0);
    return absl::FailedPreconditionError(
        absl::StrCat(path, ": is held by ", read_bytes > 0 ? holder : "another process"));
  }
  const ssize_t bytes = static_cast<ssize_t>(owner.size());
  if (ftruncate(fd, 0) != 0 || pwrite(fd, owner.data(), owner.size(), 0) != bytes)
    return FileError("write", path);
  return lock;
}

FileLock::~FileLock() {
  if (fd_ >= 0) close(fd_);
}

absl::StatusOr<MappedFile> MappedFile::Open(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe is refused, not waited for
  if (fd < 0) return FileError("open", path);
  struct stat info;
  if (fstat(fd, &info) != 0) {
    absl::Status status = FileError("stat", path);
    close(fd);
    return status;
  }
  if (!S_ISREG(info.st_mode)) {
    close(fd);
    return Invalid(path, ": expected a regular file");
  }
  MappedFile file;
  file.path_ = path;
  file.size_ = info.st_size;
  if (file.size_ > 0) {
    void* data = mmap(nullptr, static_cast<size_t>(file.size_), PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED) {
      absl::Status status = FileError("mmap", path);
      close(fd);
      file.size_ = 0;
      return status;
    }
    file.data_ = static_cast<const uint8_t*>(data);
  }
  file.fd_ = fd;
  return file;
}

absl::Status MappedFile::CheckWhole() const {
  struct stat info;
  if (fd_ < 0) return absl::OkStatus();
  if (fstat(fd_, &info) != 0) return FileError("stat", path_);
  if (info.st_size >= size_) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrCat(path_, ": shrank from ", size_, " to ", info.st_size, " bytes while in use"));
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      fd_(std::exchange(other.fd_, -1)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(fd_, other.fd_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<uint8_t*>(data_), static_cast<size_t>(size_));
  if (fd_ >= 0) close(fd_);
}

}  // namespace annulus
