#pragma once

// Operations that advance only when they are polled. Testing any request of a group advances all of them,
// also those of other groups of the same world: a rank that waits for one operation must not hold up a peer
// that waits for another.

#include <cstddef>
#include <vector>

namespace annulus {

class PolledOperation {
 public:
  virtual ~PolledOperation() = default;
  virtual void Advance() = 0;  // never blocks; keeps its own errors
};

// Used by one thread.
class CommProgress {
 public:
  void Add(PolledOperation* operation) { operations_.push_back(operation); }
  void Remove(PolledOperation* operation);
  // An operation that advances may add, remove and test others; polling from within does nothing.
  void Poll();

 private:
  std::vector<PolledOperation*> operations_;  // null: removed while being polled
  bool polling_ = false;
};

}  // namespace annulus
