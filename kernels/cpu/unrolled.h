// Loops of constant indices, and constants made of numbers.
#pragma once

#include <cstdint>
#include <utility>

namespace polyrank {

// Constant indices: with a loop, even one unrolled by pragma, gcc keeps the sums in memory as well and copies all of
// them at every step, at half the speed.
template <int N, class Work>
inline void unrolled(const Work& work) {
  [&]<int... I>(std::integer_sequence<int, I...>) { (work(std::integral_constant<int, I>{}), ...); }
  (std::make_integer_sequence<int, N>{});
}

// Calls work with `count`, 1 to MOST, as a constant.
template <int MOST, class Work>
inline void with_constant(int64_t count, const Work& work) {
  if constexpr (MOST > 1) {
    if (count < MOST) return with_constant<MOST - 1>(count, work);
  }
  work(std::integral_constant<int, MOST>{});
}

}  // namespace polyrank
