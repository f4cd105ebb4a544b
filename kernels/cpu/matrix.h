// A factor as the kernels read it, whatever its type: rows of pairs.
#pragma once

#include <memory>

#include "factors.h"

namespace polyrank {

// Four bits a number, a whole scale for 64 of them (kernels.reference.int4_values): both are folded out in registers.
// Products of number and scale are exact in float32.
struct Int4 {};

constexpr int64_t INT4_GROUP = 64;  // kernels.segments
constexpr int64_t INT4_RUN = 32;    // numbers in 16 bytes: the first 16 in their low halves, the others in the high ones

// Rows of a block, from the one that `from` names.
template <class F>
struct Matrix {
  const F* values;
  int64_t columns;

  Matrix(const void* block, int64_t, int64_t columns) : values(static_cast<const F*>(block)), columns(columns) {}

  Matrix from(int64_t row) const { return {values + row * columns, 0, columns}; }
  Pair load(int64_t row, int64_t i) const { return load_pair(values + row * columns + i); }
  Pair load(int64_t row, int64_t i, int64_t n) const { return load_pair(values + row * columns + i, n); }
  const char* address(int64_t row, int64_t i) const { return reinterpret_cast<const char*>(values) + offset(row, i); }
  int64_t offset(int64_t row, int64_t i) const { return (row * columns + i) * int64_t(sizeof(F)); }
};

template <>
struct Matrix<Int4> {
  const uint8_t *numbers, *scales;
  int64_t row_bytes, groups;

  Matrix(const void* block, int64_t rows, int64_t columns)
      : row_bytes((columns + INT4_RUN - 1) / INT4_RUN * (INT4_RUN / 2)), groups((columns + INT4_GROUP - 1) / INT4_GROUP) {
    numbers = static_cast<const uint8_t*>(block);
    scales = numbers + rows * row_bytes;
  }

  Matrix from(int64_t row) const {
    Matrix rest = *this;
    rest.numbers += row * row_bytes;
    rest.scales += row * groups;
    return rest;
  }

  // A pair at a multiple of STEP. The numbers that fill up a row are zeros in memory of its own.
  Pair load(int64_t row, int64_t i) const {
    const uint8_t* run = numbers + row * row_bytes + i / INT4_RUN * (INT4_RUN / 2);
    const int32_t scale = scales[row * groups + i / INT4_GROUP];
#if defined(CPU_CAPABILITY_AVX512)
    // The permutation looks at four bits of its index, and the table holds all there is to multiply.
    const __m512 steps = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    const __m512 table = _mm512_mul_ps(steps, _mm512_cvtepi32_ps(_mm512_set1_epi32(scale)));
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(run)));
    return {
        Vec(_mm512_permutexvar_ps(bytes, table)), Vec(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table))};
#elif defined(CPU_CAPABILITY_AVX2)
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(run));
    if (i % INT4_RUN) bytes = _mm_srli_epi16(bytes, 4);
    bytes = _mm_sub_epi8(_mm_and_si128(bytes, _mm_set1_epi8(15)), _mm_set1_epi8(8));
    const __m256 factor = _mm256_set1_ps(float(scale));
    const auto floats = [&](__m128i from) {
      return Vec(_mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(from)), factor));
    };
    return {floats(bytes), floats(_mm_srli_si128(bytes, 8))};
#else
    float wide[STEP];
    for (int64_t k = 0; k < STEP; ++k) {
      const int64_t place = (i + k) % INT4_RUN;
      const int shift = place < INT4_RUN / 2 ? 0 : 4;
      const uint8_t* own = run + (i % INT4_RUN + k) / INT4_RUN * (INT4_RUN / 2);
      wide[k] = float(((own[place % (INT4_RUN / 2)] >> shift) & 15) - 8) * float(scale);
    }
    return load_pair(wide);
#endif
  }

  Pair load(int64_t row, int64_t i, int64_t) const { return load(row, i); }
  const char* address(int64_t row, int64_t i) const { return reinterpret_cast<const char*>(numbers) + offset(row, i); }
  int64_t offset(int64_t row, int64_t i) const { return row * row_bytes + i / 2; }
};
static_assert(INT4_RUN % STEP == 0, "a pair would end in another run");

// Columns [first, last) of `rows` rows as floats: floats in place, others widened and filled up with zeros to whole pairs.
struct Widened {
  std::unique_ptr<float[]> values;
  Matrix<float> matrix;

  Widened(const Matrix<float>& from, int64_t, int64_t first, int64_t) : matrix(from.values + first, 0, from.columns) {}

  template <class F>
  Widened(const Matrix<F>& from, int64_t rows, int64_t first, int64_t last)
      : values(new float[rows * padded(last - first)]), matrix(values.get(), rows, padded(last - first)) {
    float* to = values.get();
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = first; i < last; i += STEP, to += STEP) {
        __builtin_prefetch(from.address(row, i + last - first), 0, TO_L2);  // the next columns of this row, or the next row
        store_pair(to, from.load(row, i, last - i), STEP);
      }
  }

  static int64_t padded(int64_t columns) { return (columns + STEP - 1) / STEP * STEP; }
};

// Calls `work` with a null pointer of the factor's type: an index of kernels.segments.FACTOR_DTYPES, or INT4.
template <class Work>
inline void with_factor(int64_t type, const Work& work) {
  switch (type) {
    case 0: return work(static_cast<float*>(nullptr));
    case 1: return work(static_cast<at::BFloat16*>(nullptr));
    case 2: return work(static_cast<at::Half*>(nullptr));
    case 3: return work(static_cast<int8_t*>(nullptr));
    case 4: return work(static_cast<Int4*>(nullptr));
    default: TORCH_CHECK_VALUE(false, "factor type ", type, " is unknown");
  }
}

constexpr int64_t INT4 = 4;

// Bytes of a block, or of a part of it.
inline int64_t factor_bytes(int64_t type, int64_t rows, int64_t columns) {
  constexpr int64_t BYTES[] = {4, 2, 2, 1};
  if (type != INT4) return rows * columns * BYTES[type];
  const Matrix<Int4> block(nullptr, rows, columns);
  return rows * (block.row_bytes + block.groups);
}

}  // namespace polyrank
