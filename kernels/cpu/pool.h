// The pool of all adapters' blocks, each within its bounds.
#pragma once

#include <ATen/core/Tensor.h>

namespace polyrank {

class Pool {
 public:
  explicit Pool(const at::Tensor& pool) : base_(pool.const_data_ptr<uint8_t>()), bytes_(pool.numel()) {}

  const void* block(int64_t offset, int64_t bytes, const char* name) const {
    TORCH_CHECK_VALUE(
        offset >= 0 && bytes <= bytes_ - offset, "block ", name, " at ", offset, " of ", bytes,
        " bytes lies outside the pool of ", bytes_);
    return base_ + offset;
  }

  const float* floats(int64_t offset, int64_t count, const char* name) const {
    return offset < 0 ? nullptr : static_cast<const float*>(block(offset, 4 * count, name));
  }

 private:
  const uint8_t* base_;
  int64_t bytes_;
};

}  // namespace polyrank
