// h = C h, between shrink and expand: the own part of an adapter in a shared basis.
#pragma once

#include "factors.h"
#include "segments.h"
#include "split.h"

namespace polyrank {

// Of one row: every number is one sum, in the order of the ranks. scratch: [rank].
inline void apply_core(const Segment& segment, int64_t row, float* scratch) {
  const int64_t rank = segment.rank;
  float* hidden = segment.hidden + row * rank;
  for (int64_t j = 0; j < rank; j += STEP) {
    const int64_t n = std::min(STEP, rank - j);
    Pair sum{Vec(0.0f), Vec(0.0f)};
    for (int64_t q = 0; q < rank; ++q) sum = fmadd(Vec(hidden[q]), load_pair(segment.core + q * rank + j, n), sum);
    store_pair(scratch + j, sum, n);
  }
  std::copy_n(scratch, rank, hidden);
}

// Every `hidden` whose segment has a core.
inline void apply_cores(const Segments& segments) {
  std::vector<const Segment*> found;
  std::vector<Share> shares;
  for (const auto& segment : segments.list) {
    if (!segment.core) continue;
    found.push_back(&segment);
    shares.push_back({segment.rows(), 4 * segment.rank * segment.rank});
  }
  if (found.empty()) return;
  split_by_cost(shares, [&](int64_t i, int64_t first, int64_t last) {
    std::vector<float> scratch(found[i]->rank);
    for (int64_t row = first; row < last; ++row) apply_core(*found[i], row, scratch.data());
  });
}

}  // namespace polyrank
