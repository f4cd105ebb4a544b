// What a module has besides a low-rank part. Meaning: kernels/reference_forms.py.
//
// Every operation fills `hidden` with the change of each of its rows first, all threads over all segments, and adds the
// changes then: so what it reads is what the rows were on entry, and a row of several adapters is rounded once.
#pragma once

#include "expand.h"
#include "pool.h"
#include "segments.h"
#include "split.h"

namespace polyrank {

enum FormField {  // kernels.segments.FormField
  SPARSE_START, SPARSE_COLUMN, SPARSE_VALUE, SPARSE_ROWS, SPARSE_COUNT, DENSE, DENSE_SCALE, DENSE_DTYPE, DENSE_ROWS,
  TRANSFORM, TRANSFORM_SIZE, SCALE, SCALE_BIAS, SCALE_PAIR, SCALE_STRIDE, FORM_FIELDS
};

// What a step's operation is given beside its rows.
struct Step {
  const at::Tensor &pool, &forms, &slot, &start, &token, &weight;

  Segments resolve(int64_t rows, int64_t columns, const Read& read) const {
    check_pool(pool);
    return resolve_step(rows, columns, forms, "forms", FORM_FIELDS, slot, start, token, weight, read);
  }
};

inline void check_rows(int64_t found, const char* name, int64_t expected) {
  TORCH_CHECK_VALUE(found == expected, name, " is ", found, "; y has ", expected, " columns");
}

// A row in floats: where it lies if it is of floats, else converted into `scratch`.
template <class X>
inline const float* float_row(const X* row, int64_t n, float* scratch) {
  if constexpr (std::is_same_v<X, float>) {
    return row;
  } else {
    convert_row(scratch, row, n);
    return scratch;
  }
}

}  // namespace polyrank
