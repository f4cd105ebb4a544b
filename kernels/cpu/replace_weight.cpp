// y[t] = (1 - sum w) * y[t] + sum w * (W' x[t] + b'), in place. Meaning: kernels/reference.py.
//
// The product is the shrink kernel with W' as left factor: as many "ranks" as W' has rows. So a row's result does
// not depend on its batch-mates, which at::mm does not promise.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "shrink.h"

namespace polyrank {
namespace {

constexpr int64_t MIX_UNIT = 256;  // columns

std::vector<float> weight_of_base(const Segments& segments, int64_t rows) {
  std::vector<float> base(rows, 1.0f);
  for (const auto& entry : segments.entries) base[entry.row] -= entry.weight;
  return base;
}

template <class Y>
void mix(
    const Segments& segments, const std::vector<float>& base, Y* y, int64_t stride, int64_t columns, int64_t begin,
    int64_t end) {
  for (const auto& segment : segments.list) {
    for (int64_t i = 0; i < segment.rows(); ++i) {
      const Entry& entry = segments.entries[segment.first + i];
      const float* product = segment.hidden + i * segment.rank;
      Y* row = y + entry.row * stride;
      float* sums = entry.partial < 0 ? nullptr : segments.partial.get() + entry.partial * columns;
      const Vec keep(base[entry.row]), weight(entry.weight);
      for (int64_t j = begin; j < end; j += STEP) {
        const int64_t n = std::min(STEP, end - j);
        Pair sum;
        if (!entry.first) {
          sum = load_pair(sums + j, n);
        } else if (base[entry.row] == 0.0f) {
          sum = {Vec(0.0f), Vec(0.0f)};  // wholly replaced: not even an infinity of the base product remains
        } else {
          const Pair before = load_pair(row + j, n);
          sum = {keep * before.low, keep * before.high};
        }
        Pair own = load_pair(product + j, n);
        if (segment.bias) {
          const Pair bias = load_pair(segment.bias + j, n);
          own = {own.low + bias.low, own.high + bias.high};
        }
        sum = fmadd(weight, own, sum);
        if (entry.last) {
          store_pair(row + j, sum, n);
        } else {
          store_pair(sums + j, sum, n);
        }
      }
    }
  }
}

void replace_weight_(
    at::Tensor& y, const at::Tensor& x, const at::Tensor& pool, const at::Tensor& records, const at::Tensor& slot,
    const at::Tensor& start, const at::Tensor& token, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(
      y.dim() == 2 && x.dim() == 2 && y.size(0) == x.size(0), "replace_weight: y [T, out] and x [T, in] expected, got ",
      y.sizes(), " and ", x.sizes());
  const int64_t out = y.size(1);
  const auto segments = resolve(Use::REPLACE, y.size(0), x.size(1), out, pool, records, slot, start, token, weight);
  if (segments.list.empty()) return;
  shrink(segments, inner_contiguous(x));
  const auto base = weight_of_base(segments, y.size(0));
  write_back(y, [&](at::Tensor& rows) {
    with_float(rows.scalar_type(), "y", [&](auto* y_type) {
      using Y = std::remove_pointer_t<decltype(y_type)>;
      const int64_t cost = MIX_UNIT * segments.entries.size();
      split_by_cost({{(out + MIX_UNIT - 1) / MIX_UNIT, cost}}, [&](int64_t, int64_t first, int64_t last) {
        mix(segments, base, rows.data_ptr<Y>(), rows.stride(0), out, first * MIX_UNIT, std::min(last * MIX_UNIT, out));
      });
    });
  });
}

void replace_weight_meta(
    at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
    const at::Tensor&, const at::Tensor&) {}

}  // namespace

TORCH_LIBRARY_FRAGMENT(polyrank, m) {
  m.def(
      "replace_weight_(Tensor(a!) y, Tensor x, Tensor pool, Tensor records, Tensor slot, Tensor start, Tensor token, "
      "Tensor weight) -> ()");
}
TORCH_LIBRARY_IMPL(polyrank, CPU, m) { m.impl("replace_weight_", replace_weight_); }
TORCH_LIBRARY_IMPL(polyrank, Meta, m) { m.impl("replace_weight_", replace_weight_meta); }

}  // namespace polyrank
