// Rows of activations as 8-bit integers, each row with a scale of its own. Meaning: kernels/reference.py.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <bit>
#include <cmath>
#include <limits>
#include <memory>

#include "factors.h"
#include "int8_dot.h"

namespace polyrank {

constexpr int64_t DEPTH = 4;            // inputs that one instruction multiplies and adds
constexpr float SMALLEST_ROW = 1e-30f;  // kernels.reference.SMALLEST_ROW
constexpr int32_t INFINITE = 0x7f800000;

// Values of this many elements are rounded on one thread: 16 rows of 1536 take 3 us (2-core AVX-512 VM, 2026-11-23),
// about what waking a second thread costs.
constexpr int64_t QUANTIZE_GRAIN = 32768;

struct Rows {
  int64_t count, depth;             // depth: inputs, rounded up to DEPTH; what is behind the last input is 0
  std::unique_ptr<Value[]> values;  // [count, depth]
  std::unique_ptr<float[]> scale;    // NaN: the row holds a NaN or an infinity
  std::unique_ptr<int32_t[]> sum;    // of the values
};

// Largest magnitude, as the bits of a float: these order like the numbers, with NaN above infinity, where a
// maximum of floats would lose a NaN.
template <class X>
inline int32_t largest_bits(const X* x, int64_t in) {
  using Bits = at::vec::Vectorized<int32_t>;
  const Bits mask(0x7fffffff);
  Bits most(0);
  const auto take = [&](const Vec& v) {
    Bits bits;
    static_assert(sizeof(bits) == sizeof(v));
    std::memcpy(&bits, &v, sizeof(v));
    most = at::vec::maximum(most, bits & mask);
  };
  for (int64_t i = 0; i < in; i += STEP) {
    const Pair pair = load_pair(x + i, in - i);
    take(pair.low);
    take(pair.high);
  }
  int32_t lanes[Bits::size()];
  most.store(lanes);
  return *std::max_element(lanes, lanes + Bits::size());
}

// Rounded to nearest, ties to even; `n` go to `values`, all are added to `total`.
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512VNNI__)
struct Rounded {
  __m512i total = _mm512_setzero_si512();
  void take(const Pair& pair, Value* values, int64_t n) {
    const __m512i low = _mm512_cvtps_epi32(pair.low), high = _mm512_cvtps_epi32(pair.high);
    const __m256i narrow = _mm256_set_m128i(_mm512_cvtepi32_epi8(high), _mm512_cvtepi32_epi8(low));
    _mm256_mask_storeu_epi8(values, n >= STEP ? ~__mmask32(0) : (__mmask32(1) << n) - 1, narrow);
    total = _mm512_add_epi32(total, _mm512_add_epi32(low, high));
  }
  int32_t sum() const { return _mm512_reduce_add_epi32(total); }
};
#else
struct Rounded {
  int32_t total = 0;
  void take(const Pair& pair, Value* values, int64_t n) {
    float rounded[STEP];
    pair.low.round().store(rounded);
    pair.high.round().store(rounded + LANES);
    Value narrow[STEP];
    for (int64_t j = 0; j < STEP; ++j) {
      const int32_t value = static_cast<int32_t>(rounded[j]);
      narrow[j] = static_cast<Value>(value);
      total += value;
    }
    std::memcpy(values, narrow, n * sizeof(Value));
  }
  int32_t sum() const { return total; }
};
#endif

template <class X>
inline void quantize_row(const X* x, int64_t in, Value* values, int64_t depth, float* scale, int32_t* sum) {
  const int32_t bits = largest_bits(x, in);
  if (bits >= INFINITE) {
    *scale = std::numeric_limits<float>::quiet_NaN();
    *sum = 0;
    std::fill_n(values, depth, Value(0));
    return;
  }
  const float largest = std::max(std::bit_cast<float>(bits), SMALLEST_ROW);
  *scale = largest / 127.0f;
  const Vec inverse(127.0f / largest);
  Rounded rounded;
  for (int64_t i = 0; i < depth; i += STEP) {
    const Pair pair = i < in ? load_pair(x + i, in - i) : Pair{Vec(0.0f), Vec(0.0f)};
    rounded.take({pair.low * inverse, pair.high * inverse}, values + i, std::min(STEP, depth - i));
  }
  *sum = rounded.sum();
}

inline Rows quantize_rows(const at::Tensor& x) {
  const int64_t count = x.size(0), in = x.size(1), depth = (in + DEPTH - 1) / DEPTH * DEPTH;
  Rows rows{count, depth, std::unique_ptr<Value[]>(new Value[count * depth]),
            std::unique_ptr<float[]>(new float[count]), std::unique_ptr<int32_t[]>(new int32_t[count])};
  with_float(x.scalar_type(), "x", [&](auto* x_type) {
    using X = std::remove_pointer_t<decltype(x_type)>;
    const X* data = x.const_data_ptr<X>();
    const int64_t grain = std::max<int64_t>(QUANTIZE_GRAIN / std::max<int64_t>(in, 1), 1);
    at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        quantize_row(data + t * x.stride(0), in, rows.values.get() + t * depth, depth, &rows.scale[t], &rows.sum[t]);
    });
  });
  return rows;
}

}  // namespace polyrank
