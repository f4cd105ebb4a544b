// Sums of 16 outputs: weights (unsigned) times activations (signed) in 8 bits, added up in 32.
//
// The one instruction for this, on CPUs with VNNI, takes one unsigned and one signed side. The weights are the
// unsigned side, shifted by 128 when they are packed: what that adds to a sum is 128 times the row's own sum, one
// number per row. (Shifting the activations would need a sum per output.) Wrapping 32-bit sums make it exact even
// where the shifted sum would not fit.
#pragma once

#include <cstdint>
#include <cstring>

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

struct Sums {
  __m512i v = _mm512_setzero_si512();
  void add(const Weights& weights, const Values& values) { v = _mm512_dpbusd_epi32(v, weights.v, values.v); }
  void store(float* out, int32_t minus) const {
    _mm512_storeu_ps(out, _mm512_cvtepi32_ps(_mm512_sub_epi32(v, _mm512_set1_epi32(minus))));
  }
};

#elif defined(__AVX2__)

// Without VNNI: 16-bit products of neighbours, added in 32 bits. (The 8-bit instruction of AVX2 saturates.)
struct Weights {
  __m256i v[4];  // four outputs each, widened
  Weights() = default;
  explicit Weights(const uint8_t* p) {
    for (int i = 0; i < 4; ++i)
      v[i] = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i)));
  }
};

struct Values {
  __m256i v;
  explicit Values(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    v = _mm256_cvtepi8_epi16(_mm_set1_epi32(four));
  }
};

struct Sums {
  __m256i v[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  void add(const Weights& weights, const Values& values) {
    for (int i = 0; i < 4; ++i) v[i] = _mm256_add_epi32(v[i], _mm256_madd_epi16(weights.v[i], values.v));
  }
  void store(float* out, int32_t minus) const {
    alignas(32) uint32_t halves[32];
    for (int i = 0; i < 4; ++i) _mm256_store_si256(reinterpret_cast<__m256i*>(halves + 8 * i), v[i]);
    for (int i = 0; i < BLOCK; ++i)
      out[i] = static_cast<float>(static_cast<int32_t>(halves[2 * i] + halves[2 * i + 1] - uint32_t(minus)));
  }
};

#else

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

}  // namespace polyrank
