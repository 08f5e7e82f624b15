#pragma once

#include <cstddef>
#include <functional>

namespace annulus {

// fn(i) for each i in [begin, end), by this thread and others, as many as there are cores but `most` in all.
// Returns once all are done.
void ForEachInThreads(size_t begin, size_t end, size_t most, const std::function<void(size_t)>& fn);

}  // namespace annulus
