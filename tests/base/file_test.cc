#include "annulus/base/file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <thread>
#include <utility>

#include "absl/strings/match.h"

namespace annulus {
namespace {

class FileTest : public ::testing::Test {
 protected:
  FileTest() {
    std::string path = ::testing::TempDir() + "annulus_file_XXXXXX";
    EXPECT_NE(mkdtemp(path.data()), nullptr);
    directory_ = path;
  }
  ~FileTest() override { std::filesystem::remove_all(directory_); }
  std::string Path(const std::string& name) const { return directory_ + "/" + name; }

  std::string directory_;
};

TEST_F(FileTest, ErrorsNamePathActionAndReason) {
  const std::pair<int, absl::StatusCode> codes[] = {
      {ENOENT, absl::StatusCode::kNotFound},          {ENOTDIR, absl::StatusCode::kNotFound},
      {ENOSPC, absl::StatusCode::kResourceExhausted}, {EDQUOT, absl::StatusCode::kResourceExhausted},
      {EFBIG, absl::StatusCode::kResourceExhausted},  {EACCES, absl::StatusCode::kPermissionDenied},
      {EPERM, absl::StatusCode::kPermissionDenied},   {EROFS, absl::StatusCode::kPermissionDenied},
      {EIO, absl::StatusCode::kUnavailable}};
  for (const auto& [error, code] : codes) {
    errno = error;
    const absl::Status status = FileError("write", "/x/y");
    EXPECT_EQ(status, absl::Status(code, absl::StrCat("/x/y: write: ", strerror(error))));
  }
}

TEST_F(FileTest, WritesAndReadsBack) {
  const std::string text("a\0b\n", 4);
  ASSERT_TRUE(WriteFileDurably(Path("f"), text).ok());
  EXPECT_EQ(ReadFile(Path("f")).value(), text);
  ASSERT_TRUE(WriteFileDurably(Path("f"), "").ok());  // replaces
  EXPECT_EQ(ReadFile(Path("f")).value(), "");
  std::string large(1'000'000, 'x');
  large[65'536] = 'y';
  ASSERT_TRUE(WriteFileDurably(Path("f"), large).ok());
  EXPECT_EQ(ReadFile(Path("f")).value(), large);
}

TEST_F(FileTest, ReadsFilesWithoutASize) {
  EXPECT_TRUE(absl::StrContains(ReadFile("/proc/self/status").value(), "Pid:"));
  ASSERT_EQ(mkfifo(Path("pipe").c_str(), 0600), 0);
  std::thread writer([&] {
    const int fd = open(Path("pipe").c_str(), O_WRONLY);
    EXPECT_EQ(write(fd, "through", 7), 7);
    close(fd);
  });
  EXPECT_EQ(ReadFile(Path("pipe")).value(), "through");
  writer.join();
}

TEST_F(FileTest, ReadErrors) {
  EXPECT_TRUE(absl::IsNotFound(ReadFile(Path("none")).status()));
  ASSERT_TRUE(WriteFileDurably(Path("f"), "x").ok());
  EXPECT_TRUE(absl::IsNotFound(ReadFile(Path("f/below")).status()));
  const absl::Status directory = ReadFile(directory_).status();
  EXPECT_TRUE(absl::IsUnavailable(directory)) << directory;
  EXPECT_TRUE(absl::StrContains(directory.message(), directory_)) << directory;
}

TEST_F(FileTest, AtomicWriteReplacesOrLeavesAlone) {
  ASSERT_TRUE(WriteFileAtomically(Path("f"), "old").ok());
  ASSERT_TRUE(WriteFileAtomically(Path("f"), "new").ok());
  EXPECT_EQ(ReadFile(Path("f")).value(), "new");
  ASSERT_TRUE(MakeDirectories(Path("taken/below")).ok());
  EXPECT_FALSE(WriteFileAtomically(Path("taken"), "text").ok());  // a full directory cannot be replaced
  EXPECT_EQ(ListDirectory(directory_).value(),
            (std::vector<std::string>{"f", "taken"}));  // no f.tmp, taken.tmp
}

TEST_F(FileTest, FullDiskIsResourceExhausted) {
  absl::StatusOr<DurableFile> full = DurableFile::Create("/dev/full");
  ASSERT_TRUE(full.ok()) << full.status();
  const absl::Status status = full->Write("x", 1);
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "/dev/full")) << status;
  EXPECT_EQ(full->bytes_written(), 0);
}

TEST_F(FileTest, DurableFileCountsAndHashes) {
  absl::StatusOr<DurableFile> created = DurableFile::Create(Path("f"));
  ASSERT_TRUE(created.ok());
  DurableFile file = *std::move(created);
  ASSERT_TRUE(file.Write("ab", 2).ok());
  ASSERT_TRUE(file.Write(nullptr, 0).ok());
  ASSERT_TRUE(file.Write("cde", 3).ok());
  ASSERT_TRUE(file.Finish().ok());
  EXPECT_EQ(file.bytes_written(), 5);
  EXPECT_EQ(file.hash(), Hash64("abcde"));
  EXPECT_EQ(ReadFile(Path("f")).value(), "abcde");
  EXPECT_TRUE(absl::IsNotFound(DurableFile::Create(Path("none/f")).status()));
}

TEST_F(FileTest, MappedFileMovesWithoutMovingItsBytes) {
  ASSERT_TRUE(WriteFileDurably(Path("f"), "mapped").ok());
  absl::StatusOr<MappedFile> opened = MappedFile::Open(Path("f"));
  ASSERT_TRUE(opened.ok());
  const uint8_t* data = opened->bytes().data();
  MappedFile moved = *std::move(opened);
  MappedFile assigned;
  assigned = std::move(moved);
  EXPECT_EQ(assigned.bytes().data(), data);
  EXPECT_EQ(assigned.path(), Path("f"));
  EXPECT_EQ(std::string(assigned.bytes().begin(), assigned.bytes().end()), "mapped");
  EXPECT_TRUE(moved.bytes().empty());  // NOLINT: moved-from is empty
}

TEST_F(FileTest, MappedFileEdges) {
  ASSERT_TRUE(WriteFileDurably(Path("empty"), "").ok());
  EXPECT_TRUE(MappedFile::Open(Path("empty"))->bytes().empty());
  EXPECT_TRUE(absl::IsNotFound(MappedFile::Open(Path("none")).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(MappedFile::Open(directory_).status()));
  ASSERT_EQ(mkfifo(Path("pipe").c_str(), 0600), 0);
  EXPECT_TRUE(
      absl::IsInvalidArgument(MappedFile::Open(Path("pipe")).status()));  // and does not wait for a writer
}

TEST_F(FileTest, DirectoriesRenameAndRemove) {
  ASSERT_TRUE(MakeDirectories(Path("a/b/c")).ok());
  ASSERT_TRUE(MakeDirectories(Path("a/b/c")).ok());
  ASSERT_TRUE(WriteFileDurably(Path("a/2"), "").ok());
  ASSERT_TRUE(WriteFileDurably(Path("a/1"), "").ok());
  EXPECT_EQ(ListDirectory(Path("a")).value(), (std::vector<std::string>{"1", "2", "b"}));
  EXPECT_TRUE(SyncDirectory(Path("a")).ok());
  EXPECT_TRUE(Exists(Path("a/b")));

  ASSERT_TRUE(Rename(Path("a"), Path("z")).ok());
  EXPECT_FALSE(Exists(Path("a")));
  ASSERT_TRUE(RemoveAll(Path("z")).ok());
  EXPECT_TRUE(RemoveAll(Path("z")).ok());
  EXPECT_TRUE(ListDirectory(directory_)->empty());

  EXPECT_TRUE(absl::IsNotFound(Rename(Path("a"), Path("b"))));
  EXPECT_TRUE(absl::IsNotFound(SyncDirectory(Path("a"))));
  EXPECT_TRUE(absl::IsNotFound(ListDirectory(Path("a")).status()));
  ASSERT_TRUE(WriteFileDurably(Path("f"), "").ok());
  const absl::Status below_file = MakeDirectories(Path("f/sub"));
  EXPECT_TRUE(absl::IsNotFound(below_file)) << below_file;
  EXPECT_TRUE(absl::StrContains(below_file.message(), Path("f/sub"))) << below_file;
}

TEST(FileLock, OneHolderAtATime) {
  const std::string path = ::testing::TempDir() + "/annulus_lock_test";
  {
    const absl::StatusOr<FileLock> first = FileLock::Take(path, "the first");
    ASSERT_TRUE(first.ok()) << first.status();
    const absl::StatusOr<FileLock> second = FileLock::Take(path, "the second");
    EXPECT_EQ(second.status().message(), path + ": is held by the first");
  }
  EXPECT_TRUE(FileLock::Take(path, "the third").ok());
}

TEST(MappedFile, SaysThatItShrank) {
  const std::string path = ::testing::TempDir() + "/annulus_shrinking_test";
  ASSERT_TRUE(WriteFileDurably(path, std::string(100, 'x')).ok());
  const absl::StatusOr<MappedFile> file = MappedFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_TRUE(file->CheckWhole().ok());
  ASSERT_EQ(truncate(path.c_str(), 99), 0);
  EXPECT_EQ(file->CheckWhole().message(), path + ": shrank from 100 to 99 bytes while in use");
}

}  // namespace
}  // namespace annulus
