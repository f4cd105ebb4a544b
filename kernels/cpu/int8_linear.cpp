// y = x W' + bias in 8-bit integers, activations rounded per row. Meaning: kernels/reference.py.
//
// A row's sums are exact integers and its epilogue knows no other row, so its bits depend neither on its batch-mates
// nor on the threads.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "int8_dot.h"
#include "int8_rows.h"

namespace polyrank {
namespace {

constexpr int PANEL = 3;      // blocks of 16 outputs whose weights lie interleaved: kernels.int8.PANEL / 16
constexpr int TILE = 8;       // rows: 8 x 3 sums and 3 weights fill 27 of the 32 registers of AVX-512
constexpr int64_t GRAIN_BYTES = 65536;  // of weights times tiles of rows, below which a second thread does not pay
constexpr int AHEAD = 16;     // lines of weights fetched ahead, in units of a panel's four inputs

// Constant indices: with a loop, even one unrolled by pragma, gcc keeps the sums in memory as well and copies all of
// them at every step, at half the speed.
template <int N, class Work>
inline void unrolled(const Work& work) {
  [&]<int... I>(std::integer_sequence<int, I...>) { (work(std::integral_constant<int, I>{}), ...); }
  (std::make_integer_sequence<int, N>{});
}

struct Product {
  const uint8_t* weights;  // [panels, depth / 4, 48, 4]
  const Rows& rows;
  const float* scale;  // [out]
  const float* bias;   // [out] or null
  int64_t out;
};

template <class Y>
inline void finish(const Product& product, const float* sums, Y* y, int64_t row, int64_t j, int64_t n) {
  const Vec row_scale(product.rows.scale[row]);
  for (int64_t i = 0; i < n; i += STEP) {
    const int64_t valid = std::min(STEP, n - i);
    const Pair scale = load_pair(product.scale + j + i, valid);
    const Pair sum = load_pair(sums + i, valid);
    // Not a fused multiply-add: then the result is the reference's to the bit.
    Pair value{sum.low * scale.low * row_scale, sum.high * scale.high * row_scale};
    if (product.bias) {
      const Pair bias = load_pair(product.bias + j + i, valid);
      value = {value.low + bias.low, value.high + bias.high};
    }
    store_pair(y + row * product.out + j + i, value, valid);
  }
}

// Rows from `row` on, BLOCKS blocks from `block` on, which lie in one panel.
template <class Y, int ROWS, int BLOCKS>
inline void tile(const Product& product, Y* y, int64_t row, int64_t block) {
  const int64_t depth = product.rows.depth;
  const uint8_t* w = product.weights + (block / PANEL * (depth / DEPTH) * PANEL + block % PANEL) * BLOCK_BYTES;
  const int8_t* x = product.rows.values.get() + row * depth;
  Sums sums[ROWS][BLOCKS];
  for (int64_t i = 0; i < depth; i += DEPTH, w += PANEL * BLOCK_BYTES) {
    Weights weights[BLOCKS];
    unrolled<BLOCKS>([&](auto b) {
      weights[b] = Weights(w + b * BLOCK_BYTES);
      __builtin_prefetch(w + (AHEAD * PANEL + b) * BLOCK_BYTES, 0, 3);
    });
    unrolled<ROWS>([&](auto r) {
      const Values values(x + r * depth + i);
      unrolled<BLOCKS>([&](auto b) { sums[r][b].add(weights[b], values); });
    });
  }
  float found[ROWS][BLOCKS * BLOCK];
  unrolled<ROWS>([&](auto r) {
    const auto minus = static_cast<int32_t>(uint32_t(SHIFT) * uint32_t(product.rows.sum[row + r]));  // wraps, as sums do
    unrolled<BLOCKS>([&](auto b) { sums[r][b].store(found[r] + b * BLOCK, minus); });
  });
  const int64_t j = block * BLOCK, n = std::min<int64_t>(BLOCKS * BLOCK, product.out - j);
  for (int r = 0; r < ROWS; ++r) finish(product, found[r], y, row + r, j, n);
}

template <class Y, int BLOCKS>
inline void tile_of(int64_t count, const Product& product, Y* y, int64_t row, int64_t block) {
  switch (count) {
    case 1: return tile<Y, 1, BLOCKS>(product, y, row, block);
    case 2: return tile<Y, 2, BLOCKS>(product, y, row, block);
    case 3: return tile<Y, 3, BLOCKS>(product, y, row, block);
    case 4: return tile<Y, 4, BLOCKS>(product, y, row, block);
    case 5: return tile<Y, 5, BLOCKS>(product, y, row, block);
    case 6: return tile<Y, 6, BLOCKS>(product, y, row, block);
    case 7: return tile<Y, 7, BLOCKS>(product, y, row, block);
    default: return tile<Y, TILE, BLOCKS>(product, y, row, block);
  }
}

// All rows of the blocks `first` to `last`: a panel's weights (27 KB of 576 inputs) stay in the cache for all tiles of
// rows, of which none is much smaller than the others.
template <class Y>
void multiply(const Product& product, Y* y, int64_t first, int64_t last) {
  const int64_t count = product.rows.count, tiles = (count + TILE - 1) / TILE;
  for (int64_t block = first, blocks; block < last; block += blocks) {
    blocks = std::min(PANEL - block % PANEL, last - block);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = count * i / tiles, rows = count * (i + 1) / tiles - row;
      switch (blocks) {
        case 1: tile_of<Y, 1>(rows, product, y, row, block); break;
        case 2: tile_of<Y, 2>(rows, product, y, row, block); break;
        default: tile_of<Y, PANEL>(rows, product, y, row, block);
      }
    }
  }
}

void check(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale, const c10::optional<at::Tensor>& bias) {
  TORCH_CHECK_VALUE(x.dim() == 2, "int8_linear: x [T, in] expected, got ", x.sizes());
  const int64_t depth = (x.size(1) + DEPTH - 1) / DEPTH, out = scale.numel();
  const int64_t panels = (out + PANEL * BLOCK - 1) / (PANEL * BLOCK);
  TORCH_CHECK_VALUE(
      packed.scalar_type() == at::kByte && packed.is_contiguous() &&
          packed.sizes() == at::IntArrayRef({panels, depth, PANEL * BLOCK, DEPTH}),
      "int8_linear: packed weights ", packed.sizes(), " do not fit x ", x.sizes(), " and ", out, " outputs");
  const auto floats = [&](const at::Tensor& t) {
    return t.scalar_type() == at::kFloat && t.is_contiguous() && t.dim() == 1 && t.numel() == out;
  };
  TORCH_CHECK_VALUE(floats(scale), "int8_linear: scale is no contiguous float32 [out]: ", scale.sizes());
  TORCH_CHECK_VALUE(!bias || floats(*bias), "int8_linear: bias is no contiguous float32 [", out, "]");
}

at::Tensor int8_linear(
    const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale, const c10::optional<at::Tensor>& bias) {
  check(x, packed, scale, bias);
  at::Tensor y = at::empty({x.size(0), scale.numel()}, x.options());
  if (!y.numel()) return y;
  const Rows rows = quantize_rows(inner_contiguous(x));
  const Product product{
      packed.const_data_ptr<uint8_t>(), rows, scale.const_data_ptr<float>(),
      bias ? bias->const_data_ptr<float>() : nullptr, scale.numel()};
  const int64_t blocks = (product.out + BLOCK - 1) / BLOCK, tiles = (rows.count + TILE - 1) / TILE;
  const int64_t cost = rows.depth * BLOCK * tiles;
  with_float(y.scalar_type(), "x", [&](auto* y_type) {
    using Y = std::remove_pointer_t<decltype(y_type)>;
    Y* data = y.data_ptr<Y>();
    at::parallel_for(0, blocks, std::max<int64_t>(GRAIN_BYTES / std::max<int64_t>(cost, 1), 1), [&](int64_t begin, int64_t end) {
      multiply(product, data, begin, end);
    });
  });
  return y;
}

at::Tensor int8_linear_meta(
    const at::Tensor& x, const at::Tensor&, const at::Tensor& scale, const c10::optional<at::Tensor>&) {
  return at::empty_symint({x.sym_size(0), scale.sym_size(0)}, x.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(polyrank, m) {
  m.def("int8_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias) -> Tensor");
}
TORCH_LIBRARY_IMPL(polyrank, CPU, m) { m.impl("int8_linear", int8_linear); }
TORCH_LIBRARY_IMPL(polyrank, Meta, m) { m.impl("int8_linear", int8_linear_meta); }

}  // namespace polyrank
