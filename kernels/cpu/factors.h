// Number types of activations and factors: every kernel computes on pairs of float vectors.
//
// A pair is the unit because one full vector of a 16-bit type widens to two float vectors. All types walk a
// row in the same pairs, so the order of a sum depends neither on the type nor on the length of the tail.
// int8 factors have one scale per rank row, which is folded into `d`: here they are whole numbers.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace polyrank {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();
constexpr int64_t STEP = 2 * LANES;  // floats in a pair

// Third argument of __builtin_prefetch. Fetching factors ahead takes a step of 147 MB from 16.6 to 10.9 ms on one
// thread, with huge pages from 15.1 to 8.8; into the L1 cache it takes 14.8 (2-core AVX-512 VM, 2026-11-23).
constexpr int TO_L2 = 2;
constexpr int64_t CACHE_LINE = 64;  // bytes

struct Pair {
  Vec low, high;
};

template <class T>
inline Pair load_pair(const T* p) {
  auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(p));
  return {low, high};
}

template <>
inline Pair load_pair<float>(const float* p) {
  return {Vec::loadu(p), Vec::loadu(p + LANES)};
}

// The first `n` of a pair, 0 < n <= STEP; the rest is zero and never read from memory.
template <class T>
inline Pair load_pair(const T* p, int64_t n) {
  if (n >= STEP) return load_pair(p);
  auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(p, n));
  return {low, high};
}

template <>
inline Pair load_pair<float>(const float* p, int64_t n) {
  if (n >= STEP) return load_pair(p);
  if (n <= LANES) return {Vec::loadu(p, n), Vec(0.0f)};
  return {Vec::loadu(p), Vec::loadu(p + LANES, n - LANES)};
}

// A pair is a quarter of a full vector of this type, which at::vec can widen only whole.
template <>
inline Pair load_pair<int8_t>(const int8_t* p) {
#if defined(CPU_CAPABILITY_AVX512)
  const auto floats = [](const int8_t* from) {
    return Vec(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))));
  };
  return {floats(p), floats(p + LANES)};
#elif defined(CPU_CAPABILITY_AVX2)
  const auto floats = [](const int8_t* from) {
    return Vec(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))));
  };
  return {floats(p), floats(p + LANES)};
#else
  float wide[STEP];
  for (int64_t i = 0; i < STEP; ++i) wide[i] = p[i];
  return load_pair(wide);
#endif
}

template <>
inline Pair load_pair<int8_t>(const int8_t* p, int64_t n) {
  if (n >= STEP) return load_pair(p);
  int8_t filled[STEP] = {};
  std::memcpy(filled, p, n);
  return load_pair(filled);
}

template <class T>
inline void store_pair(T* p, const Pair& v, int64_t n) {
  auto narrow = at::vec::convert_from_float<T>(v.low, v.high);
  if (n >= STEP) {
    narrow.store(p);
  } else {
    narrow.store(p, n);
  }
}

template <>
inline void store_pair<float>(float* p, const Pair& v, int64_t n) {
  if (n >= STEP) {
    v.low.store(p);
    v.high.store(p + LANES);
  } else if (n <= LANES) {
    v.low.store(p, n);
  } else {
    v.low.store(p);
    v.high.store(p + LANES, n - LANES);
  }
}

// Copies `n` elements with conversion; `to` gets zeros up to the next multiple of STEP if `pad`.
template <class To, class From>
inline void convert_row(To* to, const From* from, int64_t n, bool pad = false) {
  const auto step = [&](int64_t i, int64_t valid, int64_t stored) {
    if constexpr (std::is_same_v<To, From> && sizeof(To) == 2) {  // one full vector is a pair
      const auto v = valid >= STEP ? at::vec::Vectorized<To>::loadu(from + i) : at::vec::Vectorized<To>::loadu(from + i, valid);
      stored >= STEP ? v.store(to + i) : v.store(to + i, stored);
    } else {
      store_pair(to + i, load_pair(from + i, valid), stored);
    }
  };
  int64_t i = 0;
  for (; i + STEP <= n; i += STEP) step(i, STEP, STEP);
  if (i < n) step(i, n - i, pad ? STEP : n - i);
}

inline Pair fmadd(const Vec& scale, const Pair& a, const Pair& b) {
  return {at::vec::fmadd(scale, a.low, b.low), at::vec::fmadd(scale, a.high, b.high)};
}

inline float sum(const Vec& v) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, v);
}

inline float maximum(const Vec& v) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, v);
}

// Rows of any stride are read in place; only a stride inside a row makes a copy.
inline at::Tensor inner_contiguous(const at::Tensor& x) {
  return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

template <class Work>
inline void write_back(at::Tensor& y, const Work& work) {
  at::Tensor rows = inner_contiguous(y);
  work(rows);
  if (!rows.is_same(y)) y.copy_(rows);
}

// Calls `work` with a null pointer of the tensor's element type.
template <class Work>
inline void with_float(at::ScalarType type, const char* name, const Work& work) {
  switch (type) {
    case at::kFloat: return work(static_cast<float*>(nullptr));
    case at::kBFloat16: return work(static_cast<at::BFloat16*>(nullptr));
    case at::kHalf: return work(static_cast<at::Half*>(nullptr));
    default: TORCH_CHECK_VALUE(false, name, " is ", type, "; float32, bfloat16 or float16 expected");
  }
}

}  // namespace polyrank
