// y += w * (h B + bias): every output column is one sum over the ranks, in their order.
#pragma once

#include "segments.h"
#include "split.h"

namespace polyrank {

constexpr int64_t EXPAND_UNIT = 2 * STEP;  // columns: the unit in which threads share a right factor

// Where the deltas go: y [T, columns].
struct Output {
  void* y;
  at::ScalarType type;
  int64_t stride, columns;
  const Entry* entries;
  float* partial;

  Output(const Segments& segments, at::Tensor& y)
      : y(y.data_ptr()),
        type(y.scalar_type()),
        stride(y.stride(0)),
        columns(y.size(1)),
        entries(segments.entries.data()),
        partial(segments.partial.get()) {}
};

// The parts of an expansion that threads may take: all columns of a segment, or, where two segments may write the same
// row, all segments of a column: a thread then keeps its columns through all of them, in their order.
struct Expansion {
  const Segments& segments;
  Output output;

  Expansion(const Segments& segments, at::Tensor& y) : segments(segments), output(segments, y) {}

  int64_t cost() const;  // of a unit, all segments together
  void add_shares(std::vector<Share>& shares) const;

  // Units [first, last) of part `i`.
  void run(int64_t i, int64_t first, int64_t last) const;

  // Columns [first, last), whole units but at the end, of every segment.
  void run_columns(int64_t first, int64_t last) const;
};

// Adds every segment's delta to y, from its `hidden`.
void expand(const Segments& segments, at::Tensor& y);

// y += w * hidden, where `hidden` [rows, columns] is the delta itself.
void add_changes(const Segments& segments, at::Tensor& y);

}  // namespace polyrank
