#pragma once

// The section `model` of a configuration.

#include "annulus/train/spec.h"
#include "section.h"

namespace annulus::config {

// spec->data has been read: it may give the vocabulary.
void BindModel(const Section& model, RunSpec* spec);

}  // namespace annulus::config
