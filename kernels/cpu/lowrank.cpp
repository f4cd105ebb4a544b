// y[t] += w * (B (C (d * (A x[t]))) + bias), in place. Meaning: kernels/reference.py.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "core.h"
#include "expand.h"
#include "gate.h"
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

// A x and router x of every segment at once: a router is to its rows what a left factor is.
void shrink_both(Segments& segments, const Gates& gates, const at::Tensor& x) {
  const size_t count = segments.list.size();
  for (size_t i = 0; i < count; ++i) {
    const Gate& gate = gates.list[i];
    if (!gate.router_rows) continue;
    Segment router{};
    router.first = segments.list[i].first;
    router.last = segments.list[i].last;
    router.rank = gate.router_rows;
    router.type = gate.type;
    router.left = gate.router;
    router.hidden = gate.scores;
    router.many = has_many(router);
    segments.list.push_back(router);
  }
  shrink(segments, x);
  segments.list.resize(count);
}

void gated_lowrank_(
    at::Tensor& y, const at::Tensor& x, const at::Tensor& pool, const at::Tensor& records, const at::Tensor& gates,
    const at::Tensor& slot, const at::Tensor& start, const at::Tensor& token, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(
      y.dim() == 2 && x.dim() == 2 && y.size(0) == x.size(0), "gated_lowrank: y [T, out] and x [T, in] expected, got ",
      y.sizes(), " and ", x.sizes());
  auto segments = resolve(
      Use::LOWRANK, y.size(0), x.size(1), y.size(1), pool, records, slot, start, token, weight);
  if (segments.list.empty()) return;
  const Gates resolved = resolve_gates(segments, gates, records.size(0), x.size(1), Pool(pool));
  shrink_both(segments, resolved, inner_contiguous(x));
  apply_gates(segments, resolved.list);
  apply_cores(segments);
  write_back(y, [&](at::Tensor& rows) { expand(segments, rows); });
}

void gated_lowrank_meta(
    at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
    const at::Tensor&, const at::Tensor&, const at::Tensor&) {}


}  // namespace

TORCH_LIBRARY_FRAGMENT(polyrank, m) {
  m.def(
      "lowrank_(Tensor(a!) y, Tensor x, Tensor pool, Tensor records, Tensor slot, Tensor start, Tensor token, "
      "Tensor weight) -> ()");
  m.def(
      "gated_lowrank_(Tensor(a!) y, Tensor x, Tensor pool, Tensor records, Tensor gates, Tensor slot, Tensor start, "
      "Tensor token, Tensor weight) -> ()");
}
TORCH_LIBRARY_IMPL(polyrank, CPU, m) {
  m.impl("lowrank_", lowrank_);
  m.impl("gated_lowrank_", gated_lowrank_);
}
TORCH_LIBRARY_IMPL(polyrank, Meta, m) {
  m.impl("lowrank_", lowrank_meta);
  m.impl("gated_lowrank_", gated_lowrank_meta);
}

}  // namespace polyrank
