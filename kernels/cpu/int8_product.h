// Tiles of the 8-bit product: what `int8_linear` and `int8_linears` share. Meaning: kernels/reference.py.
//
// A row's sums are exact integers and its epilogue knows no other row, so its bits depend neither on its batch-mates
// nor on the threads.
#pragma once

#include <ATen/core/Tensor.h>

#include "int8_dot.h"
#include "int8_rows.h"

namespace polyrank {

constexpr int64_t GRAIN_BYTES = 65536;  // of weights times tiles of rows, below which a second thread does not pay
constexpr int AHEAD = 16;     // lines of weights fetched ahead, in units of a panel's four inputs

struct Product {
  const uint8_t* weights;  // [panels, depth / 4, PANEL * BLOCK, 4]
  const Rows& rows;
  const float* scale;  // [out]
  const float* bias;   // [out] or null
  int64_t out;

  Product(const at::Tensor& packed, const Rows& rows, const at::Tensor& scale, const c10::optional<at::Tensor>& bias)
      : weights(packed.const_data_ptr<uint8_t>()),
        rows(rows),
        scale(scale.const_data_ptr<float>()),
        bias(bias ? bias->const_data_ptr<float>() : nullptr),
        out(scale.numel()) {}

  int64_t blocks() const { return (out + BLOCK - 1) / BLOCK; }
  int64_t cost() const { return rows.depth * BLOCK * ((rows.count + TILE - 1) / TILE); }  // of a block: bytes times tiles
};

template <class Y>
inline void finish(const Product& product, const float* sums, Y* y, int64_t stride, int64_t row, int64_t j, int64_t n) {
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
    store_pair(y + row * stride + j + i, value, valid);
  }
}

// Rows from `row` on, BLOCKS blocks from `block` on, which lie in one panel; `fetch`: that panel comes into the cache.
template <class Y, int ROWS, int BLOCKS>
inline void tile(const Product& product, Y* y, int64_t stride, int64_t row, int64_t block, bool fetch) {
  const int64_t depth = product.rows.depth;
  const uint8_t* w = product.weights + (block / PANEL * (depth / DEPTH) * PANEL + block % PANEL) * BLOCK_BYTES;
  const Value* x = product.rows.values.get() + row * depth;
  Sums sums[ROWS][BLOCKS];
  for (int64_t i = 0; i < depth; i += DEPTH, w += PANEL * BLOCK_BYTES) {
    if (fetch) unrolled<PANEL>([&](auto b) { __builtin_prefetch(w + (AHEAD * PANEL + b) * BLOCK_BYTES, 0, 3); });
    add(sums, w, x + i, depth);
  }
  float found[ROWS][BLOCKS * BLOCK];
  unrolled<ROWS>([&](auto r) {
    const auto minus = static_cast<int32_t>(uint32_t(SHIFT) * uint32_t(product.rows.sum[row + r]));  // wraps, as sums do
    unrolled<BLOCKS>([&](auto b) { sums[r][b].store(found[r] + b * BLOCK, minus); });
  });
  const int64_t j = block * BLOCK, n = std::min<int64_t>(BLOCKS * BLOCK, product.out - j);
  for (int r = 0; r < ROWS; ++r) finish(product, found[r], y, stride, row + r, j, n);
}

// All rows of the blocks `first` to `last`: a panel's weights (27 KB of 576 inputs) stay in the cache for all tiles of
// rows, of which none is much smaller than the others.
template <class Y>
void multiply(const Product& product, Y* y, int64_t stride, int64_t first, int64_t last) {
  const int64_t count = product.rows.count, tiles = (count + TILE - 1) / TILE;
  for (int64_t block = first, blocks; block < last; block += blocks) {
    blocks = std::min(PANEL - block % PANEL, last - block);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = count * i / tiles, rows = count * (i + 1) / tiles - row;
      with_constant<TILE>(rows, [&](auto tile_rows) {
        with_constant<PANEL>(blocks, [&](auto tile_blocks) {
          tile<Y, tile_rows, tile_blocks>(product, y, stride, row, block, i == 0);
        });
      });
    }
  }
}

inline void check(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale, const c10::optional<at::Tensor>& bias) {
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

}  // namespace polyrank
