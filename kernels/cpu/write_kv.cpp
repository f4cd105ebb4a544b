// Keys and values of a step into their slots of the paged pool. Meaning: kernels/reference.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "factors.h"
#include "pages.h"

namespace polyrank {
namespace {

constexpr int64_t FETCHED = 16;  // rows whose lines come into the cache together

void check(const at::Tensor& tokens, const at::Tensor& pool, const at::Tensor& slots, const char* name) {
  TORCH_CHECK_VALUE(
      tokens.dim() == 3 && pool.dim() == 4 && tokens.size(0) == slots.size(0) && tokens.size(1) == pool.size(2) &&
          tokens.size(2) == pool.size(3),
      "write_kv: ", name, " [T, kv_heads, dim] and pool [pages, page_size, kv_heads, dim] expected, got ", tokens.sizes(),
      " and ", pool.sizes(), " for ", slots.size(0), " slots");
}

// A row is a handful of cache lines that nothing has touched for a step: asked for all at once and not one store after
// another, 8 rows take 5 us a layer instead of 47 (2-core AVX-512 VM, 2026-11-25).
void fetch(const at::Tensor& pool, const int64_t* slots, int64_t first, int64_t last) {
  const Pages pages(pool, "write_kv pool");
  const int64_t bytes = pool.element_size(), row_bytes = pages.heads * pages.dim * bytes;
  const char* base = static_cast<const char*>(pool.const_data_ptr());
  for (int64_t t = first; t < last; ++t) {
    const char* row = base + pages.token(slots[t] / pages.page_size, slots[t] % pages.page_size) * bytes;
    for (int64_t byte = 0; byte < row_bytes; byte += CACHE_LINE) __builtin_prefetch(row + byte, 1, 3);
  }
}

template <class To, class From>
void store(const at::Tensor& tokens, const at::Tensor& pool, const int64_t* slots, int64_t first, int64_t last) {
  const int64_t heads = tokens.size(1), dim = tokens.size(2);
  const Pages pages(pool, "write_kv pool");
  const From* from = tokens.const_data_ptr<From>();
  To* to = pool.data_ptr<To>();
  const bool one_run = tokens.stride(1) == dim;
  for (int64_t t = first; t < last; ++t) {
    const From* token = from + t * tokens.stride(0);
    To* row = to + pages.token(slots[t] / pages.page_size, slots[t] % pages.page_size);
    if (one_run) {
      convert_row(row, token, heads * dim);
    } else {
      for (int64_t h = 0; h < heads; ++h) convert_row(row + h * dim, token + h * tokens.stride(1), dim);
    }
  }
}

void store_any(const at::Tensor& tokens, const at::Tensor& pool, const int64_t* slots, int64_t first, int64_t last) {
  with_float(tokens.scalar_type(), "key", [&](auto* from) {
    with_float(pool.scalar_type(), "key pool", [&](auto* to) {
      store<std::remove_pointer_t<decltype(to)>, std::remove_pointer_t<decltype(from)>>(tokens, pool, slots, first, last);
    });
  });
}

void write_kv(
    const at::Tensor& key, const at::Tensor& value, at::Tensor& key_pool, at::Tensor& value_pool, const at::Tensor& slots) {
  TORCH_CHECK_VALUE(
      slots.dim() == 1 && slots.scalar_type() == at::kLong && slots.is_contiguous(),
      "write_kv: contiguous int64 slots [T] expected, got ", slots.scalar_type(), " ", slots.sizes());
  check(key, key_pool, slots, "key");
  check(value, value_pool, slots, "value");
  Pages(key_pool, "write_kv key pool"), Pages(value_pool, "write_kv value pool");
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  const int64_t count = std::min(key_pool.size(0) * key_pool.size(1), value_pool.size(0) * value_pool.size(1));
  for (int64_t t = 0; t < slots.size(0); ++t)
    TORCH_CHECK_VALUE(slot[t] >= 0 && slot[t] < count, "write_kv: slot ", slot[t], " lies outside the pool's ", count);
  const auto keys = inner_contiguous(key), values = inner_contiguous(value);
  const int64_t grain = std::max<int64_t>(65536 / std::max<int64_t>(key.size(1) * key.size(2), 1), 1);  // rows worth a thread
  at::parallel_for(0, slots.size(0), grain, [&](int64_t first, int64_t last) {
    for (int64_t begin = first, end; begin < last; begin = end) {
      end = std::min(begin + FETCHED, last);
      fetch(key_pool, slot, begin, end);
      fetch(value_pool, slot, begin, end);
      store_any(keys, key_pool, slot, begin, end);
      store_any(values, value_pool, slot, begin, end);
    }
  });
}

void write_kv_meta(const at::Tensor&, const at::Tensor&, at::Tensor&, at::Tensor&, const at::Tensor&) {}

}  // namespace

TORCH_LIBRARY_FRAGMENT(polyrank, m) {
  m.def("write_kv(Tensor key, Tensor value, Tensor(a!) key_pool, Tensor(b!) value_pool, Tensor slots) -> ()");
}
TORCH_LIBRARY_IMPL(polyrank, CPU, m) { m.impl("write_kv", write_kv); }
TORCH_LIBRARY_IMPL(polyrank, Meta, m) { m.impl("write_kv", write_kv_meta); }

}  // namespace polyrank
