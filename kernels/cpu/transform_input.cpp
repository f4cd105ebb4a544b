// x[t] + sum w (R x[t] - x[t]), as a new tensor; R is block-diagonal. Meaning: kernels/reference_forms.py.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "forms.h"
#include "unrolled.h"

namespace polyrank {
namespace {

constexpr int TILE = 4;  // rows that share one reading of a block

// R x - x in blocks [first, last) of the rows of a tile. The blocks lie transposed, so that every output of a block is one
// lane's sum in the order of the inputs.
template <int ROWS>
void turn(const float* blocks, int64_t size, int64_t in, const float* const* x, float* hidden, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t base = block * size;
    const float* factor = blocks + base * size;
    for (int64_t i = 0; i < size; i += STEP) {
      const int64_t n = std::min(STEP, size - i);
      Pair sums[ROWS];
      unrolled<ROWS>([&](auto r) { sums[r] = {Vec(0.0f), Vec(0.0f)}; });
      for (int64_t j = 0; j < size; ++j) {
        const Pair column = load_pair(factor + j * size + i, n);
        unrolled<ROWS>([&](auto r) { sums[r] = fmadd(Vec(x[r][base + j]), column, sums[r]); });
      }
      unrolled<ROWS>([&](auto r) {
        const Pair before = load_pair(x[r] + base + i, n);
        store_pair(hidden + r * in + base + i, {sums[r].low - before.low, sums[r].high - before.high}, n);
      });
    }
  }
}

// The same for blocks of one number: inputs [first, last).
inline void stretch(const float* factors, const float* x, float* hidden, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i += STEP) {
    const int64_t n = std::min(STEP, last - i);
    const Pair factor = load_pair(factors + i, n), before = load_pair(x + i, n);
    store_pair(hidden + i, {factor.low * before.low - before.low, factor.high * before.high - before.high}, n);
  }
}

template <class X>
void turn_segment(
    const Segment& segment, const Entry* entries, const X* x, int64_t stride, int64_t size, int64_t first, int64_t last) {
  const int64_t in = segment.rank;
  const float* blocks = static_cast<const float*>(segment.left);
  std::vector<float> scratch(std::is_same_v<X, float> ? 0 : TILE * in);
  const float* rows[TILE];
  for (int64_t begin = 0; begin < segment.rows(); begin += TILE) {
    const int64_t count = std::min<int64_t>(TILE, segment.rows() - begin);
    float* hidden = segment.hidden + begin * in;
    for (int64_t r = 0; r < count; ++r)
      rows[r] = float_row(x + entries[segment.first + begin + r].row * stride, in, scratch.data() + r * in);
    if (size == 1) {
      for (int64_t r = 0; r < count; ++r) stretch(blocks, rows[r], hidden + r * in, first, last);
      continue;
    }
    with_constant<TILE>(count, [&](auto constant) { turn<constant>(blocks, size, in, rows, hidden, first, last); });
  }
}

at::Tensor transform_input(
    const at::Tensor& x, const at::Tensor& pool, const at::Tensor& forms, const at::Tensor& slot, const at::Tensor& start,
    const at::Tensor& token, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(x.dim() == 2, "transform_input: x [T, in] expected, got ", x.sizes());
  const int64_t in = x.size(1);
  const Step step{pool, forms, slot, start, token, weight};
  const auto segments = step.resolve(x.size(0), in, [&](const int64_t* form, Segment& segment) {
    const int64_t size = form[TRANSFORM_SIZE];
    if (!size) return false;
    TORCH_CHECK_VALUE(size > 0 && in % size == 0, "blocks of ", size, " do not fit ", in, " inputs");
    segment.left = Pool(pool).block(form[TRANSFORM], 4 * in * size, "TRANSFORM");
    segment.type = size;
    segment.rank = in;
    return true;
  });
  at::Tensor out = x.clone(at::MemoryFormat::Contiguous);
  if (segments.list.empty()) return out;
  std::vector<Share> shares;
  for (const auto& segment : segments.list) {
    const int64_t size = segment.type, tiles = (segment.rows() + TILE - 1) / TILE;
    shares.push_back({in / size, 4 * size * size * tiles});
  }
  const at::Tensor rows = inner_contiguous(x);
  with_float(x.scalar_type(), "x", [&](auto* x_type) {
    const auto* values = rows.const_data_ptr<std::remove_pointer_t<decltype(x_type)>>();
    split_by_cost(shares, [&](int64_t i, int64_t first, int64_t last) {
      const Segment& segment = segments.list[i];
      turn_segment(segment, segments.entries.data(), values, rows.stride(0), segment.type, first, last);
    });
  });
  add_changes(segments, out);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(polyrank, m) {
  m.def(
      "transform_input(Tensor x, Tensor pool, Tensor forms, Tensor slot, Tensor start, Tensor token, Tensor weight) -> "
      "Tensor");
}
TORCH_LIBRARY_IMPL(polyrank, CPU, m) { m.impl("transform_input", transform_input); }

}  // namespace polyrank
