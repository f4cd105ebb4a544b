// `write_kv`, then `paged_attention`, for compiled code: one call that its compiler takes for a pure function.
//
// The pools are written, and the schema does not say so. A schema that did would make the compiler trace two inputs
// that share one storage (keys and values are views of one buffer), which AOTAutograd refuses to do with symbolic
// sizes, and guard a copy of the pool. It is safe because nothing else in a compiled layer reads or writes the pools.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace polyrank {
namespace {

template <class Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

at::Tensor attend(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& key_pool,
    const at::Tensor& value_pool, const at::Tensor& slots, const at::Tensor& query_start, const at::Tensor& kv_length,
    const at::Tensor& block_table, double scale, int64_t window, double softcap) {
  static const auto write = op<void(
      const at::Tensor&, const at::Tensor&, at::Tensor&, at::Tensor&, const at::Tensor&)>("polyrank::write_kv");
  static const auto read = op<at::Tensor(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
      double, int64_t, double)>("polyrank::paged_attention");
  at::Tensor keys = key_pool, values = value_pool;
  write.call(key, value, keys, values, slots);
  return read.call(query, keys, values, query_start, kv_length, block_table, scale, window, softcap);
}

at::Tensor attend_meta(
    const at::Tensor& query, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
    const at::Tensor&, const at::Tensor&, const at::Tensor&, double, int64_t, double) {
  return at::empty_symint(query.sym_sizes(), query.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(polyrank, m) {
  m.def(
      "attend(Tensor query, Tensor key, Tensor value, Tensor key_pool, Tensor value_pool, Tensor slots, "
      "Tensor query_start, Tensor kv_length, Tensor block_table, float scale, int window=0, float softcap=0.0) -> Tensor");
}
TORCH_LIBRARY_IMPL(polyrank, CPU, m) { m.impl("attend", attend); }
TORCH_LIBRARY_IMPL(polyrank, Meta, m) { m.impl("attend", attend_meta); }

}  // namespace polyrank
