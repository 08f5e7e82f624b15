#include "annulus/comm/exchange_transport.h"

namespace annulus {

absl::string_view Name(TransportKind kind) {
  switch (kind) {
    case TransportKind::kHost:
      return "host";
    case TransportKind::kNccl:
      return "nccl";
    case TransportKind::kCopyEngine:
      return "copy engine";
  }
  return "";
}

}  // namespace annulus
