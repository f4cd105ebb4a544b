// y[t] += w * (scale * (D x[t])), in place. Meaning: kernels/reference_forms.py.
//
// The product is the shrink kernel with D as left factor: a row's result does not depend on its batch-mates.
#include <torch/library.h>

#include "forms.h"
#include "shrink.h"
#include "signs.h"

namespace polyrank {
namespace {

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
    segment.left = bytes.block(form[DENSE], left_bytes(type, out, in), "DENSE");
    segment.d = static_cast<const float*>(bytes.block(form[DENSE_SCALE], 4 * out, "DENSE_SCALE"));
    return true;
  });
  if (segments.list.empty()) return;
  shrink(segments, inner_contiguous(x));
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
