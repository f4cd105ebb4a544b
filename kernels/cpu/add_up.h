// Sums over the lanes of many vectors at once.
#pragma once

#include "factors.h"
#include "unrolled.h"

namespace polyrank {

#if defined(CPU_CAPABILITY_AVX512)

// out[i] = sum(v[i]), to the bit: neighbours share the steps in which each would use a half, a quarter, ... of a vector,
// 3 instructions a sum instead of 9.
template <int N>
__attribute__((always_inline)) inline void add_up(const Vec (&v)[N], float (&out)[N]) {
  constexpr int EIGHTS = (N + 1) / 2, FOURS = (EIGHTS + 1) / 2, TWOS = (FOURS + 1) / 2, ONES = (TWOS + 1) / 2;
  __m512 eights[EIGHTS], fours[FOURS], twos[TWOS];
  unrolled<EIGHTS>([&](auto i) {
    const __m512 a = v[2 * i], b = v[std::min<int>(2 * i + 1, N - 1)];
    eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  });
  unrolled<FOURS>([&](auto i) {
    const __m512 a = eights[2 * i], b = eights[std::min<int>(2 * i + 1, EIGHTS - 1)];
    fours[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  });
  unrolled<TWOS>([&](auto i) {
    const __m512 a = fours[2 * i], b = fours[std::min<int>(2 * i + 1, FOURS - 1)];
    twos[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
  });
  // Sum i of a vector now stands in lane 4 * (i % 4) + i / 4.
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  unrolled<ONES>([&](auto i) {
    const __m512 a = twos[2 * i], b = twos[std::min<int>(2 * i + 1, TWOS - 1)];
    const __m512 ones = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
    const __mmask16 valid = static_cast<__mmask16>((1u << std::min(N - 16 * i, 16)) - 1);
    _mm512_mask_storeu_ps(out + 16 * i, valid, _mm512_permutexvar_ps(order, ones));
  });
}

#else

template <int N>
inline void add_up(const Vec (&v)[N], float (&out)[N]) {
  unrolled<N>([&](auto i) { out[i] = sum(v[i]); });
}

#endif

}  // namespace polyrank
