// h = d * (left x): dot products of a segment's rows with the rank rows of its left factor.
#pragma once

#include "segments.h"
#include "split.h"

namespace polyrank {

// The rows of x, [T, in].
struct Input {
  const void* values;
  at::ScalarType type;
  int64_t stride, in;

  explicit Input(const at::Tensor& x) : values(x.const_data_ptr()), type(x.scalar_type()), stride(x.stride(0)), in(x.size(1)) {}
};

// Bytes of a left factor, or of a part of it. type: as `factor_bytes` takes it, or ONE_BIT.
int64_t left_bytes(int64_t type, int64_t rows, int64_t columns);

// A segment's work, in units that threads may share: rank rows of its left factor or, of many rows, tiles of them.
Share shrink_share(const Segment& segment, int64_t in);

// Fills units [first, last) of the `hidden` of segment `i`.
void shrink_units(const Segments& segments, int64_t i, const Input& x, int64_t first, int64_t last);

// Fills `hidden` of every segment.
void shrink(const Segments& segments, const at::Tensor& x);

}  // namespace polyrank
