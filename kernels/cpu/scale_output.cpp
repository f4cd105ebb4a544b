// y[t] += sum w ((scale - 1) y0 + pair * partner(y0) + bias), in place. Meaning: kernels/reference_forms.py.
#include <torch/library.h>

#include "forms.h"

namespace polyrank {
namespace {

struct Scale {
  const float *scale, *bias, *pair;  // [out], each may be null
  int64_t stride;
};

// partner(y)[i], for every i.
void swap_halves(const float* y, float* to, int64_t columns, int64_t stride) {
  for (int64_t first = 0; first < columns; first += 2 * stride) {
    std::copy_n(y + first + stride, stride, to + first);
    std::copy_n(y + first, stride, to + first + stride);
  }
}

// What is added to a row; partner: null without pairs.
void change(const Scale& scale, const float* y, const float* partner, float* hidden, int64_t columns) {
  for (int64_t j = 0; j < columns; j += STEP) {
    const int64_t n = std::min(STEP, columns - j);
    Pair sum{Vec(0.0f), Vec(0.0f)};
    if (scale.bias) sum = load_pair(scale.bias + j, n);
    if (partner) {
      const Pair factor = load_pair(scale.pair + j, n), other = load_pair(partner + j, n);
      sum = {at::vec::fmadd(factor.low, other.low, sum.low), at::vec::fmadd(factor.high, other.high, sum.high)};
    }
    if (scale.scale) {
      const Pair factor = load_pair(scale.scale + j, n), own = load_pair(y + j, n);
      const Vec one(1.0f);
      sum = {at::vec::fmadd(factor.low - one, own.low, sum.low), at::vec::fmadd(factor.high - one, own.high, sum.high)};
    }
    store_pair(hidden + j, sum, n);
  }
}

void scale_output_(
    at::Tensor& y, const at::Tensor& pool, const at::Tensor& forms, const at::Tensor& slot, const at::Tensor& start,
    const at::Tensor& token, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(y.dim() == 2, "scale_output: y [T, out] expected, got ", y.sizes());
  const int64_t columns = y.size(1);
  const Step step{pool, forms, slot, start, token, weight};
  const auto segments = step.resolve(y.size(0), columns, [&](const int64_t* form, Segment& segment) {
    segment.left = form;
    segment.rank = columns;
    return form[SCALE_STRIDE] != 0;
  });
  if (segments.list.empty()) return;
  const Pool bytes(pool);
  std::vector<Scale> found;
  std::vector<Share> shares;
  for (const auto& segment : segments.list) {
    const int64_t* form = static_cast<const int64_t*>(segment.left);
    found.push_back(
        {bytes.floats(form[SCALE], columns, "SCALE"), bytes.floats(form[SCALE_BIAS], columns, "SCALE_BIAS"),
         bytes.floats(form[SCALE_PAIR], columns, "SCALE_PAIR"), form[SCALE_STRIDE]});
    const int64_t stride = found.back().stride;
    TORCH_CHECK_VALUE(
        stride > 0 && (!found.back().pair || columns % (2 * stride) == 0), "pairs ", stride, " apart do not fit ", columns,
        " outputs");
    shares.push_back({segment.rows(), 16 * columns});
  }
  const at::Tensor rows = inner_contiguous(y);
  with_float(y.scalar_type(), "y", [&](auto* y_type) {
    const auto* values = rows.const_data_ptr<std::remove_pointer_t<decltype(y_type)>>();
    split_by_cost(shares, [&](int64_t i, int64_t first, int64_t last) {
      std::vector<float> scratch(2 * columns);
      for (int64_t r = first; r < last; ++r) {
        const auto* row = values + segments.entries[segments.list[i].first + r].row * rows.stride(0);
        const float* own = float_row(row, columns, scratch.data());
        float* partner = found[i].pair ? scratch.data() + columns : nullptr;
        if (partner) swap_halves(own, partner, columns, found[i].stride);
        change(found[i], own, partner, segments.list[i].hidden + r * columns, columns);
      }
    });
  });
  add_changes(segments, y);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(polyrank, m) {
  m.def(
      "scale_output_(Tensor(a!) y, Tensor pool, Tensor forms, Tensor slot, Tensor start, Tensor token, Tensor weight) -> "
      "()");
}
TORCH_LIBRARY_IMPL(polyrank, CPU, m) { m.impl("scale_output_", scale_output_); }

}  // namespace polyrank
