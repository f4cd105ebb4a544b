// y = x W' + bias in 8-bit integers, activations rounded per row. Meaning: kernels/reference.py.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "int8_product.h"

namespace polyrank {
namespace {

at::Tensor int8_linear(
    const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale, const c10::optional<at::Tensor>& bias) {
  check(x, packed, scale, bias);
  at::Tensor y = at::empty({x.size(0), scale.numel()}, x.options());
  if (!y.numel()) return y;
  const Rows rows = quantize_rows(inner_contiguous(x));
  const Product product(packed, rows, scale, bias);
  const int64_t grain = std::max<int64_t>(GRAIN_BYTES / std::max<int64_t>(product.cost(), 1), 1);
  with_float(y.scalar_type(), "x", [&](auto* y_type) {
    using Y = std::remove_pointer_t<decltype(y_type)>;
    Y* data = y.data_ptr<Y>();
    at::parallel_for(0, product.blocks(), grain, [&](int64_t begin, int64_t end) {
      multiply(product, data, product.out, begin, end);
    });
  });
  return y;
}

at::Tensor int8_linear_meta(
    const at::Tensor& x, const at::Tensor&, const at::Tensor& scale, const c10::optional<at::Tensor>&) {
  return at::empty_symint({x.sym_size(0), scale.sym_size(0)}, x.options());
}

}  // namespace

int64_t int8_panel() { return PANEL * BLOCK; }

TORCH_LIBRARY_FRAGMENT(polyrank, m) {
  m.def("int8_panel() -> int", int8_panel);
  m.def("int8_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias) -> Tensor");
}
TORCH_LIBRARY_IMPL(polyrank, CPU, m) { m.impl("int8_linear", int8_linear); }
TORCH_LIBRARY_IMPL(polyrank, Meta, m) { m.impl("int8_linear", int8_linear_meta); }

}  // namespace polyrank
