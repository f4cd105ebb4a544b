// y = x W' + bias in floats, W as torch keeps it, [out, in]. Meaning: kernels/reference.py.
//
// Up to MOST_ROWS rows a row's bits depend neither on its batch-mates nor on the threads, which at::linear does not promise;
// and 8 rows of 24576 x 576 floats take 7.9 ms instead of 20.4, one row 3.7 instead of 7.8 (2-core AVX2 VM, 2026-11-24).
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "factors.h"
#include "unrolled.h"

namespace polyrank {
namespace {

// What one load brings: a vector of floats, or the pair that a vector of a 16-bit type widens to.
template <class T>
struct Unit {
  static constexpr int64_t SIZE = STEP;
  static constexpr int OUTPUTS = LANES == 16 ? 4 : 2;  // 4 rows of sums, a pair of weights each, a pair of values
  Pair v;
  explicit Unit(const T* p) : v(load_pair(p)) {}
  Unit(const T* p, int64_t n) : v(load_pair(p, n)) {}
};

template <>
struct Unit<float> {
  static constexpr int64_t SIZE = LANES;
  static constexpr int OUTPUTS = LANES == 16 ? 6 : 3;  // 4 rows of sums, a weight each and a value: 31 or 16 registers
  Vec v;
  explicit Unit(const float* p) : v(Vec::loadu(p)) {}
  Unit(const float* p, int64_t n) : v(Vec::loadu(p, n)) {}
};

inline Vec add_product(const Vec& a, const Vec& b, const Vec& sum) { return at::vec::fmadd(a, b, sum); }
inline Vec add_product(const Pair& a, const Pair& b, const Vec& sum) {
  return at::vec::fmadd(a.high, b.high, at::vec::fmadd(a.low, b.low, sum));
}

constexpr int ROWS = 4;
constexpr int OUTPUTS_OF_ONE = 4;  // of a single row
constexpr int64_t STRIP = 48;      // outputs: 110 KB of 576 float weights, which stay in the L2 cache for all rows
constexpr int64_t GRAIN = 65536;   // multiplications below which a second thread does not pay (see split.h)
constexpr int64_t MOST_ROWS = 128;  // with more, the library's blocking of both sides is faster: a third at 256 rows
constexpr int64_t AHEAD = 1024;    // bytes of a weight's row fetched ahead

template <class T>
struct Product {
  const T* x;
  int64_t rows, stride, depth;
  const T* weight;
  const float* bias;  // or null
  T* y;
  int64_t out;
};

// R rows times N outputs. Every sum is one vector, filled in the order of the inputs, whatever R and N are. `fetch`: the
// weights behind these come into the cache.
template <int R, int N, class T>
inline void tile(const Product<T>& p, int64_t row, int64_t output, bool fetch) {
  constexpr int64_t SIZE = Unit<T>::SIZE;
  const T* x = p.x + row * p.stride;
  const T* w = p.weight + output * p.depth;
  Vec sums[R][N];
  unrolled<R>([&](auto r) { unrolled<N>([&](auto n) { sums[r][n] = Vec(0.0f); }); });
  const auto step = [&](const auto& load) {  // a function of its own for the last inputs: a branch in here costs half
    [&]<int... I>(std::integer_sequence<int, I...>) {
      const Unit<T> weights[N] = {load(w + I * p.depth)...};
      unrolled<R>([&](auto r) {
        const Unit<T> values = load(x + r * p.stride);
        unrolled<N>([&](auto n) { sums[r][n] = add_product(values.v, weights[n].v, sums[r][n]); });
      });
    }(std::make_integer_sequence<int, N>{});
  };
  int64_t i = 0;
  for (; i + SIZE <= p.depth; i += SIZE) {
    if (fetch) unrolled<N>([&](auto n) { __builtin_prefetch(reinterpret_cast<const char*>(w + n * p.depth + i) + AHEAD, 0, 3); });
    step([&](const T* from) { return Unit<T>(from + i); });
  }
  if (i < p.depth) step([&](const T* from) { return Unit<T>(from + i, p.depth - i); });
  unrolled<R>([&](auto r) {
    unrolled<N>([&](auto n) {
      const float value = sum(sums[r][n]) + (p.bias ? p.bias[output + n] : 0.0f);
      p.y[(row + r) * p.out + output + n] = static_cast<T>(value);
    });
  });
}

template <int R, int N, class T>
inline void outputs_of(const Product<T>& p, int64_t row, int64_t first, int64_t last) {
  int64_t output = first;
  for (; output + N <= last; output += N) tile<R, N>(p, row, output, row == 0);
  for (; output < last; ++output) tile<R, 1>(p, row, output, row == 0);
}

template <class T>
void multiply(const Product<T>& p, int64_t first, int64_t last) {
  constexpr int OUTPUTS = Unit<T>::OUTPUTS;
  for (int64_t begin = first; begin < last; begin += STRIP) {
    const int64_t end = std::min(begin + STRIP, last);
    for (int64_t row = 0; row < p.rows; row += ROWS) {
      switch (std::min<int64_t>(p.rows - row, ROWS)) {
        case 1: outputs_of<1, OUTPUTS_OF_ONE>(p, row, begin, end); break;
        case 2: outputs_of<2, OUTPUTS>(p, row, begin, end); break;
        case 3: outputs_of<3, OUTPUTS>(p, row, begin, end); break;
        default: outputs_of<ROWS, OUTPUTS>(p, row, begin, end);
      }
    }
  }
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const c10::optional<at::Tensor>& bias) {
  TORCH_CHECK_VALUE(
      x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) && weight.is_contiguous() &&
          x.scalar_type() == weight.scalar_type(),
      "linear: x [T, in] and contiguous weight [out, in] of one type expected, got ", x.scalar_type(), " ", x.sizes(), " and ",
      weight.scalar_type(), " ", weight.sizes());
  const int64_t out = weight.size(0);
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == out), "linear: bias [", out, "] expected");
  if (x.size(0) > MOST_ROWS) return at::linear(x, weight, bias);
  at::Tensor y = at::empty({x.size(0), out}, x.options());
  if (!y.numel()) return y;
  const auto rows = inner_contiguous(x);
  const auto floats = bias ? c10::make_optional(bias->to(at::kFloat).contiguous()) : c10::nullopt;
  with_float(x.scalar_type(), "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Product<T> product{
        rows.const_data_ptr<T>(), rows.size(0), rows.stride(0), rows.size(1), weight.const_data_ptr<T>(),
        floats ? floats->template const_data_ptr<float>() : nullptr, y.data_ptr<T>(), out};
    const int64_t cost = std::max<int64_t>(x.size(0) * x.size(1), 1);
    at::parallel_for(0, out, std::max<int64_t>(GRAIN / cost, OUTPUTS_OF_ONE), [&](int64_t begin, int64_t end) {
      multiply(product, begin, end);
    });
  });
  return y;
}

at::Tensor linear_meta(const at::Tensor& x, const at::Tensor& weight, const c10::optional<at::Tensor>&) {
  return at::empty_symint({x.sym_size(0), weight.sym_size(0)}, x.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(polyrank, m) { m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor"); }
TORCH_LIBRARY_IMPL(polyrank, CPU, m) { m.impl("linear", linear); }
TORCH_LIBRARY_IMPL(polyrank, Meta, m) { m.impl("linear", linear_meta); }

}  // namespace polyrank
