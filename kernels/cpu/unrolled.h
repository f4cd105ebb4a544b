// A loop of constant indices.
#pragma once

#include <utility>

namespace polyrank {

// Constant indices: with a loop, even one unrolled by pragma, gcc keeps the sums in memory as well and copies all of
// them at every step, at half the speed.
template <int N, class Work>
inline void unrolled(const Work& work) {
  [&]<int... I>(std::integer_sequence<int, I...>) { (work(std::integral_constant<int, I>{}), ...); }
  (std::make_integer_sequence<int, N>{});
}

}  // namespace polyrank
