#include "progress.h"

#include <algorithm>

namespace annulus {

void CommProgress::Remove(PolledOperation* operation) {
  const auto found = std::find(operations_.begin(), operations_.end(), operation);
  if (found == operations_.end()) return;
  if (polling_) {
    *found = nullptr;  // Poll holds an index
  } else {
    operations_.erase(found);
  }
}

void CommProgress::Poll() {
  if (polling_) return;
  polling_ = true;
  for (size_t i = 0; i < operations_.size(); ++i) {
    if (operations_[i] != nullptr) operations_[i]->Advance();
  }
  polling_ = false;
  std::erase(operations_, nullptr);
}

}  // namespace annulus
