#pragma once

// Multi-query associative recall (Arora et al., 2023): key-value pairs, then keys again at random places,
// each to be answered by its value. Made, not read: sequence n is a function of (spec, seed, n).
//
//   k1 v1 k2 v2 .. kn vn | . . k2 . . . k1 . . .
//   counted targets: v2 at the second k2, v1 at the second k1
//
// Keys are from [1, V / 2), values from [V / 2, V), both without repetition; the other places hold random
// tokens. A query stands 2 (g - 1) places behind the pairs, where the gaps g = 1, 2, .. are drawn one pair
// after the other, without replacement, with p(g) ~ g^(0.01 - 1): mostly near, some far.

#include "annulus/train/data.h"

namespace annulus {

// spec.recall has been checked (train/config.h): its tasks fit into seq_len and vocabulary.
std::unique_ptr<DataSet> MakeRecallDataSet(const DataSpec& spec, uint64_t seed, int64_t vocab_size);

}  // namespace annulus
