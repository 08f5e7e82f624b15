#pragma once

// The section `model` of a configuration.

#include "annulus/train/spec.h"
#include "section.h"

namespace annulus::config {

inline constexpr IntRange kVocabulary{1, (int64_t{1} << 31) - 1};  // tokens are int32

// spec->data has been read: it may give the vocabulary.
void BindModel(const Section& model, RunSpec* spec);

}  // namespace annulus::config
