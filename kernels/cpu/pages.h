// Where a token's keys or values lie: pages of any stride, contiguous inside.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

namespace polyrank {

struct Pages {
  int64_t page_size, page_stride, heads, dim;  // strides in elements

  Pages(const at::Tensor& pool, const char* name) {
    TORCH_CHECK_VALUE(
        pool.dim() == 4, name, ": [pages, page_size, kv_heads, dim] expected, got ", pool.sizes());
    page_size = pool.size(1), page_stride = pool.stride(0), heads = pool.size(2), dim = pool.size(3);
    const auto dense = [&](int64_t axis, int64_t stride) { return pool.size(axis) <= 1 || pool.stride(axis) == stride; };
    TORCH_CHECK_VALUE(
        dense(3, 1) && dense(2, dim) && dense(1, heads * dim), name, ": a page must be contiguous, sizes ", pool.sizes(),
        ", strides ", pool.strides());
  }

  int64_t token(int64_t page, int64_t position) const { return page * page_stride + position * heads * dim; }

  // Calls work(position, row) for a request's positions [first, last), page by page: a division per page, not per token.
  template <class T, class Work>
  void walk(
      const void* pool, const int32_t* table, int64_t head, int64_t first, int64_t last, const Work& work) const {
    const T* base = static_cast<const T*>(pool) + head * dim;
    for (int64_t position = first; position < last;) {
      const int64_t page = position / page_size, border = std::min((page + 1) * page_size, last);
      const T* row = base + token(table[page], position - page * page_size);
      for (; position < border; ++position, row += heads * dim) work(position, row);
    }
  }
};

}  // namespace polyrank
