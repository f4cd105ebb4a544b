// A factor of signs, a bit each: set for +1, else -1 (kernels.segments.ONE_BIT).
#pragma once

#include "matrix.h"

namespace polyrank {

struct Sign {};

constexpr int64_t ONE_BIT = 5;

template <>
struct Matrix<Sign> {
  const uint8_t* bits;
  int64_t row_bytes;

  Matrix(const void* block, int64_t, int64_t columns)
      : bits(static_cast<const uint8_t*>(block)), row_bytes((columns + 7) / 8) {}

  Matrix from(int64_t row) const {
    Matrix rest = *this;
    rest.bits += row * row_bytes;
    return rest;
  }

  // A pair at a multiple of STEP, of which `n` bits lie within the row.
  Pair load(int64_t row, int64_t i, int64_t n = STEP) const {
    uint32_t own = 0;
    static_assert(STEP <= 32 && STEP % 8 == 0, "a pair is no whole number of bytes, or more than fit");
    std::memcpy(&own, bits + offset(row, i), (std::min(n, STEP) + 7) / 8);
#if defined(CPU_CAPABILITY_AVX512)
    const __m512 minus = _mm512_set1_ps(-1.0f), plus = _mm512_set1_ps(1.0f);
    return {
        Vec(_mm512_mask_blend_ps(__mmask16(own), minus, plus)), Vec(_mm512_mask_blend_ps(__mmask16(own >> 16), minus, plus))};
#else
    float wide[STEP];
    for (int64_t k = 0; k < STEP; ++k) wide[k] = float(int32_t(own >> k & 1) * 2 - 1);
    return load_pair(wide);
#endif
  }

  const char* address(int64_t row, int64_t i) const { return reinterpret_cast<const char*>(bits) + offset(row, i); }
  int64_t offset(int64_t row, int64_t i) const { return row * row_bytes + i / 8; }
};

}  // namespace polyrank
