// y[t] += w * (scale * (D x[t])), in place. Meaning: kernels/reference_forms.py.
//
// The product is the shrink kernel with D as left factor: a row's result does not depend on its batch-mates.
#include <torch/library.h>

#include "forms.h"
#include "shrink.h"
#include "signs.h"

namespace polyrank {
namespace {

int64_t dense_bytes(int64_t type, int64_t rows, int64_t columns) {
  return type == ONE_BIT ? rows * ((columns + 7) / 8) : factor_bytes(type, rows, columns);
}

template <class Work>
void with_dense(int64_t type, const Work& work) {
  switch (type) {
    case 0: return work(static_cast<float*>(nullptr));
    case 1: return work(static_cast<at::BFloat16*>(nullptr));
    case 2: return work(static_cast<at::Half*>(nullptr));
    case 3: return work(static_cast<int8_t*>(nullptr));
    default: return work(static_cast<Sign*>(nullptr));
  }
}

void multiply(const Segments& segments, const at::Tensor& x) {
  const int64_t in = x.size(1);
  std::vector<Share> shares;
  for (const auto& segment : segments.list) {
    // Signs are widened at the price of floats.
    const int64_t bytes = (segment.type == ONE_BIT ? 4 : 1) * dense_bytes(segment.type, SHRINK_UNIT, in);
    shares.push_back({(segment.rank + SHRINK_UNIT - 1) / SHRINK_UNIT, std::max<int64_t>(bytes * segment.tiles(), 1)});
  }
  with_float(x.scalar_type(), "x", [&](auto* x_type) {
    const auto* values = x.const_data_ptr<std::remove_pointer_t<decltype(x_type)>>();
    split_by_cost(shares, [&](int64_t i, int64_t first, int64_t last) {
      const Segment& segment = segments.list[i];
      with_dense(segment.type, [&](auto* factor_type) {
        shrink_segment<std::remove_pointer_t<decltype(factor_type)>>(
            segment, segments.entries.data(), values, x.stride(0), in, first * SHRINK_UNIT,
            std::min(last * SHRINK_UNIT, segment.rank), segments.after(i, &Segment::left));
      });
    });
  });
}

void dense_delta_(
    at::Tensor& y, const at::Tensor& x, const at::Tensor& pool, const at::Tensor& forms, const at::Tensor& slot,
    const at::Tensor& start, const at::Tensor& token, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(
      y.dim() == 2 && x.dim() == 2 && y.size(0) == x.size(0), "dense_delta: y [T, out] and x [T, in] expected, got ",
      y.sizes(), " and ", x.sizes());
  const int64_t in = x.size(1), out = y.size(1);
  const Step step{pool, forms, slot, start, token, weight};
  const auto segments = step.resolve(y.size(0), out, [&](const int64_t* form, Segment& segment) {
    if (!form[DENSE_ROWS]) return false;
    check_rows(form[DENSE_ROWS], "DENSE_ROWS", out);
    const int64_t type = form[DENSE_DTYPE];
    TORCH_CHECK_VALUE(type >= 0 && type <= ONE_BIT && type != INT4, "DENSE_DTYPE ", type, " is unknown");
    const Pool bytes(pool);
    segment.rank = out;
    segment.type = type;
    segment.left = bytes.block(form[DENSE], dense_bytes(type, out, in), "DENSE");
    segment.d = static_cast<const float*>(bytes.block(form[DENSE_SCALE], 4 * out, "DENSE_SCALE"));
    return true;
  });
  if (segments.list.empty()) return;
  multiply(segments, inner_contiguous(x));
  add_changes(segments, y);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(polyrank, m) {
  m.def(
      "dense_delta_(Tensor(a!) y, Tensor x, Tensor pool, Tensor forms, Tensor slot, Tensor start, Tensor token, "
      "Tensor weight) -> ()");
}
TORCH_LIBRARY_IMPL(polyrank, CPU, m) { m.impl("dense_delta_", dense_delta_); }

}  // namespace polyrank
