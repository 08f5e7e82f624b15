#pragma once

// parallel.exchange: which plan each pass uses and how its messages move.

#include "annulus/train/spec.h"
#include "section.h"

namespace annulus::config {

void BindExchange(const Section& exchange, ExchangeSpec* out);

}  // namespace annulus::config
