// Sums of 16 outputs: weights (unsigned) times activations (signed) in 8 bits, added up in 32.
//
// The one instruction for this, on CPUs with VNNI, takes one unsigned and one signed side. The weights are the
// unsigned side, shifted by 128 when they are packed: what that adds to a sum is 128 times the row's own sum, one
// number per row. (Shifting the activations would need a sum per output.) Wrapping 32-bit sums make it exact even
// where the shifted sum would not fit.
#pragma once

#include <cstdint>
#include <cstring>

#include "unrolled.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace polyrank {

constexpr int BLOCK = 16;          // outputs
constexpr int BLOCK_BYTES = 64;    // of four inputs: a cache line
constexpr int32_t SHIFT = 128;     // of the weights

#if defined(__AVX512VNNI__)

struct Weights {
  __m512i v;
  Weights() = default;
  explicit Weights(const uint8_t* p) : v(_mm512_loadu_si512(p)) {}
};

struct Values {
  __m512i v;
  explicit Values(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    v = _mm512_set1_epi32(four);
  }
};

constexpr int TILE = 8;   // rows: 8 x 3 sums and 3 weights fill 27 of the 32 registers
constexpr int PANEL = 3;  // blocks whose weights lie interleaved
using Value = int8_t;     // of a row

struct Sums {
  __m512i v = _mm512_setzero_si512();
  void add(const Weights& weights, const Values& values) { v = _mm512_dpbusd_epi32(v, weights.v, values.v); }
  void store(float* out, int32_t minus) const {
    _mm512_storeu_ps(out, _mm512_cvtepi32_ps(_mm512_sub_epi32(v, _mm512_set1_epi32(minus))));
  }
};

#elif defined(__AVX2__)

// Without VNNI: 16-bit products of neighbours, added in 32 bits. (The 8-bit instruction of AVX2 saturates.)
// 3 x 4 sums, 3 values and one weight fill the 16 registers. 8 rows of 576 x 576 in tiles of 8 x 3 blocks, whose sums lie
// in memory, took 124 us instead of 92 (2-core AVX2 VM, 2026-11-24).
constexpr int TILE = 3;   // rows
constexpr int PANEL = 1;  // blocks: one stream of weights, which the hardware fetches ahead
using Value = int16_t;    // widened once a row, not once a block

struct Values {
  __m256i v;
  Values() = default;
  explicit Values(const Value* p) {
    int64_t four;
    std::memcpy(&four, p, 8);
    v = _mm256_set1_epi64x(four);
  }
};

struct Sums {
  __m256i v[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  void store(float* out, int32_t minus) const {
    for (int i = 0; i < 2; ++i) {  // neighbouring halves of four outputs each
      const __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(v[2 * i], v[2 * i + 1]), 0b11'01'10'00);
      _mm256_storeu_ps(out + 8 * i, _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, _mm256_set1_epi32(minus))));
    }
  }
};

template <int ROWS, int BLOCKS>
inline void add(Sums (&sums)[ROWS][BLOCKS], const uint8_t* w, const Value* x, int64_t depth) {
  Values values[ROWS];
  unrolled<ROWS>([&](auto r) { values[r] = Values(x + r * depth); });
  unrolled<BLOCKS>([&](auto b) {
    unrolled<4>([&](auto i) {  // four outputs each
      const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + b * BLOCK_BYTES + 16 * i));
      const __m256i weights = _mm256_cvtepu8_epi16(narrow);
      unrolled<ROWS>([&](auto r) {
        sums[r][b].v[i] = _mm256_add_epi32(sums[r][b].v[i], _mm256_madd_epi16(weights, values[r].v));
      });
    });
  });
}

#else

constexpr int TILE = 8;
constexpr int PANEL = 3;
using Value = int8_t;

struct Weights {
  const uint8_t* p = nullptr;
  Weights() = default;
  explicit Weights(const uint8_t* p) : p(p) {}
};

struct Values {
  const int8_t* p;
  explicit Values(const int8_t* p) : p(p) {}
};

struct Sums {
  uint32_t v[BLOCK] = {};
  void add(const Weights& weights, const Values& values) {
    for (int o = 0; o < BLOCK; ++o) {
      int32_t sum = 0;
      for (int i = 0; i < 4; ++i) sum += int32_t(weights.p[4 * o + i]) * values.p[i];
      v[o] += uint32_t(sum);
    }
  }
  void store(float* out, int32_t minus) const {
    for (int i = 0; i < BLOCK; ++i) out[i] = static_cast<float>(static_cast<int32_t>(v[i] - uint32_t(minus)));
  }
};

#endif

#if defined(__AVX512VNNI__) || !defined(__AVX2__)
// sums[r][b] += four inputs of row r (x, x + depth, ...) times those of block b (w, w + BLOCK_BYTES, ...).
template <int ROWS, int BLOCKS>
inline void add(Sums (&sums)[ROWS][BLOCKS], const uint8_t* w, const Value* x, int64_t depth) {
  Weights weights[BLOCKS];
  unrolled<BLOCKS>([&](auto b) { weights[b] = Weights(w + b * BLOCK_BYTES); });
  unrolled<ROWS>([&](auto r) {
    const Values values(x + r * depth);
    unrolled<BLOCKS>([&](auto b) { sums[r][b].add(weights[b], values); });
  });
}
#endif

}  // namespace polyrank
