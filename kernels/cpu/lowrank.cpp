// y[t] += w * (B (C (d * (A x[t]))) + bias), in place. Meaning: kernels/reference.py.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "core.h"
#include "expand.h"
#include "shrink.h"

namespace polyrank {
namespace {

void lowrank_(
    at::Tensor& y, const at::Tensor& x, const at::Tensor& pool, const at::Tensor& records, const at::Tensor& slot,
    const at::Tensor& start, const at::Tensor& token, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(
      y.dim() == 2 && x.dim() == 2 && y.size(0) == x.size(0), "lowrank: y [T, out] and x [T, in] expected, got ",
      y.sizes(), " and ", x.sizes());
  const auto segments = resolve(
      Use::LOWRANK, y.size(0), x.size(1), y.size(1), pool, records, slot, start, token, weight);
  if (segments.list.empty()) return;
  shrink(segments, inner_contiguous(x));
  apply_cores(segments);
  write_back(y, [&](at::Tensor& rows) { expand(segments, rows); });
}

void lowrank_meta(
    at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
    const at::Tensor&, const at::Tensor&) {}

}  // namespace

TORCH_LIBRARY_FRAGMENT(polyrank, m) {
  m.def(
      "lowrank_(Tensor(a!) y, Tensor x, Tensor pool, Tensor records, Tensor slot, Tensor start, Tensor token, "
      "Tensor weight) -> ()");
}
TORCH_LIBRARY_IMPL(polyrank, CPU, m) { m.impl("lowrank_", lowrank_); }
TORCH_LIBRARY_IMPL(polyrank, Meta, m) { m.impl("lowrank_", lowrank_meta); }

}  // namespace polyrank
