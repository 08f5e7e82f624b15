#pragma once

namespace annulus {

// What an op does to an output that already holds something.
enum class Write { kOverwrite, kAccumulate };

}  // namespace annulus
