#include "token_store.h"

#include "annulus/base/check.h"

namespace annulus {

absl::StatusOr<std::unique_ptr<TokenStore>> OpenTokenStore(const SourceSpec& spec) {
  switch (spec.format) {
    case SourceFormat::kText: return OpenTextStore(spec);
    case SourceFormat::kMegatron: return OpenMegatronStore(spec);
    case SourceFormat::kLlmC: return OpenLlmCStore(spec);
  }
  ANNULUS_CHECK(false) << "source format " << static_cast<int>(spec.format);
  return absl::InternalError("unreachable");
}

}  // namespace annulus
