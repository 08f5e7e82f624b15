#include "annulus/base/host.h"

#include <unistd.h>

namespace annulus {

std::string HostName() {
  char name[256] = {};
  gethostname(name, sizeof(name) - 1);
  return name;
}

}  // namespace annulus
