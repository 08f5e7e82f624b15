#include "annulus/device/wait_reports.h"

#include <gtest/gtest.h>

namespace annulus {
namespace {

TEST(WaitReports, NameWhatDidNotCome) {
  {
    WaitReports reports{Device{}};
    EXPECT_EQ(reports.Text(), "");
    reports.Add({"keys of rank 0"});
    WaitReport* second = reports.Add({"keys of rank 2", "keys of rank 3"});
    EXPECT_EQ(WhyKernelsGaveUp(), "");
    // As a kernel writes it.
    *second = {.part = 1, .value = 6, .awaited = 7, .waited_ms = 2000};
    EXPECT_EQ(reports.Text(), "waited 2000 ms for keys of rank 3: its flag is 6, awaited 7");
    WaitReports other{Device{}};
    *other.Add({}) = {.part = WaitReport::kStuck, .waited_ms = 40};
    EXPECT_EQ(WhyKernelsGaveUp(),
              "waited 2000 ms for keys of rank 3: its flag is 6, awaited 7; waited 40 ms for another thread "
              "block");
  }
  EXPECT_EQ(WhyKernelsGaveUp(), "") << "of those that there are";
}

}  // namespace
}  // namespace annulus
