// Work shared among threads by its cost, not by its count: ranks of one batch differ (8 next to 64).
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

namespace polyrank {

// Bytes, times the tiles of rows that read them, below which a second thread does not pay: both products of 2 x 64 ranks
// of 576 in bfloat16 (147 KB each) take 9.9 us on one thread and 11.5 on two, of 8 x 32 ranks (295 KB) 18.9 and 12.9
// (2-core AVX-512 VM, 2026-11-23).
constexpr int64_t GRAIN = 131072;

struct Share {
  int64_t units;  // of one segment
  int64_t cost;   // of one unit
};

// Calls work(i, first unit, last unit) so that every thread gets nearly the same cost, in runs of neighbouring
// units. A unit belongs to the thread whose range holds its first cost.
template <class Work>
void split_by_cost(const std::vector<Share>& shares, const Work& work) {
  int64_t total = 0;
  for (const auto& share : shares) total += share.units * share.cost;
  at::parallel_for(0, total, GRAIN, [&](int64_t begin, int64_t end) {
    int64_t offset = 0;
    for (size_t i = 0; i < shares.size() && offset < end; ++i) {
      const Share& share = shares[i];
      const auto unit_at = [&](int64_t position) {
        const int64_t inside = std::max<int64_t>(position - offset, 0);
        return std::min((inside + share.cost - 1) / share.cost, share.units);
      };
      const int64_t first = unit_at(begin), last = unit_at(end);
      if (first < last) work(int64_t(i), first, last);
      offset += share.units * share.cost;
    }
  });
}

}  // namespace polyrank
