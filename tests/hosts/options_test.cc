#include "hosts/options.h"

#include <gtest/gtest.h>

namespace annulus::hosts {
namespace {

TEST(HostsOptions, AreRead) {
  const absl::StatusOr<Options> options = ParseOptions(
      {"--hosts", "4", "--slots",   "2",    "--rate",  "2.5gbit", "--delay", "50us",   "--loss", "0.1%",
       "--seed",  "7", "--control", "fifo", "--grace", "1.5s",    "--",      "mpirun", "--",     "x"});
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_EQ(options->hosts, 4);
  EXPECT_EQ(options->slots, 2);
  EXPECT_DOUBLE_EQ(options->link.bits_per_second, 2.5e9);
  EXPECT_EQ(options->link.delay_ns, 50'000);
  EXPECT_DOUBLE_EQ(options->link.loss, 0.001);
  EXPECT_EQ(options->link.seed, 7u);
  EXPECT_EQ(options->control, "fifo");
  EXPECT_DOUBLE_EQ(options->grace_seconds, 1.5);
  EXPECT_EQ(options->command, (std::vector<std::string>{"mpirun", "--", "x"}));
}

// The begin of the message for these arguments and a command.
std::string ErrorOf(std::vector<std::string> args) {
  args.insert(args.end(), {"--", "true"});
  return std::string(ParseOptions(args).status().message());
}

TEST(HostsOptions, WrongOnesAreNamedWithWhatWasExpected) {
  const auto begins = [](const std::string& text, const std::string& with) {
    return text.rfind(with, 0) == 0;
  };
  EXPECT_PRED2(begins, ErrorOf({}), "--hosts: expected the number of hosts");
  EXPECT_PRED2(begins, ErrorOf({"--hosts", "1"}), "--hosts=1: expected an integer from 2 to 250");
  EXPECT_PRED2(begins, ErrorOf({"--hosts", "2", "--rate", "1"}), "--rate=1: expected a rate, as 100mbit");
  EXPECT_PRED2(begins, ErrorOf({"--hosts", "2", "--rate", "0gbit"}), "--rate=0gbit: expected a rate above 0");
  EXPECT_PRED2(begins, ErrorOf({"--hosts", "2", "--delay", "-1us"}), "--delay=-1us: expected a time");
  EXPECT_PRED2(begins, ErrorOf({"--hosts", "2", "--loss", "101%"}), "--loss=101%: expected at most 100%");
  EXPECT_PRED2(begins, ErrorOf({"--host", "2"}), "--host=2: unknown option");
  EXPECT_PRED2(begins, std::string(ParseOptions({"--hosts", "2"}).status().message()),
               "expected -- and a command");
}

}  // namespace
}  // namespace annulus::hosts
