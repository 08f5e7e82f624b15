#pragma once

// Error plumbing. Bad input from outside is an absl::Status that names the field, its value and what was
// expected; a broken invariant is ANNULUS_CHECK (base/check.h).
//
//   absl::StatusOr<Spec> Load(...) {
//     ANNULUS_ASSIGN_OR_RETURN(std::string text, ReadFile(path));
//     ANNULUS_RETURN_IF_ERROR(Validate(text));
//     if (n < 1) return Invalid("model.d_model=", n, ": expected at least 1");
//   }

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace annulus {

// InvalidArgument with the arguments concatenated by absl::StrCat.
template <typename... Args>
absl::Status Invalid(const Args&... args) {
  return absl::InvalidArgumentError(absl::StrCat(args...));
}

// The same status with `prefix` put before its message. OK stays OK.
absl::Status Prefixed(const absl::Status& status, absl::string_view prefix);

}  // namespace annulus

#define ANNULUS_CONCAT_INNER(a, b) a##b
#define ANNULUS_CONCAT(a, b) ANNULUS_CONCAT_INNER(a, b)

#define ANNULUS_RETURN_IF_ERROR(expr)                                                      \
  do {                                                                                     \
    if (absl::Status annulus_status = (expr); !annulus_status.ok()) return annulus_status; \
  } while (false)

#define ANNULUS_ASSIGN_OR_RETURN(lhs, expr) \
  ANNULUS_ASSIGN_OR_RETURN_INNER(ANNULUS_CONCAT(annulus_statusor_, __LINE__), lhs, expr)
#define ANNULUS_ASSIGN_OR_RETURN_INNER(tmp, lhs, expr) \
  auto tmp = (expr);                                   \
  if (!tmp.ok()) return tmp.status();                  \
  lhs = std::move(tmp).value()
