// The step's segments and the module's records, checked once and resolved to pointers.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#include "matrix.h"

namespace polyrank {

// Rows of a segment that share one reading and widening of a factor: as many as the sums have registers for.
constexpr int TILE_ROWS = LANES == 16 ? 8 : 4;

// Cost of a widened number for a tile of rows, in the bytes of split.h: 8 rows take it half a cycle of float products,
// a byte of an 8-bit product an eighth.
constexpr int64_t WIDE_COST = 4;

// One row of one segment. A row that stands in several segments is summed in a float buffer (`partial`)
// from its first to its last entry, so it is rounded once.
struct Entry {
  int32_t row;
  int32_t partial;  // row of the float buffer, -1: this entry is the row's only one
  float weight;
  bool first, last;
};

struct Segment {
  int64_t first, last;  // entries
  int64_t rank;         // rows of `left`
  int64_t type;         // index into FACTOR_DTYPES
  const void* left;     // A [rank, in], or the replacement weight [out, in]
  const void* right;    // B transposed [rank, out]
  const float* d;
  const float* core;    // [rank, rank], transposed, or null
  const float* bias;    // [out] or null
  float* hidden;        // [rows, rank]
  int64_t slot;         // row of the records
  const int32_t* active;  // [rows, chosen], ascending: the ranks whose `hidden` is not zero; null: any may be
  int64_t chosen;
  int64_t rows() const { return last - first; }
  int64_t tiles() const { return (rows() + TILE_ROWS - 1) / TILE_ROWS; }
  bool many;  // its factors are widened once, and threads share its tiles of rows
  int64_t tile_begin(int64_t tile) const { return rows() * tile / tiles(); }  // no tile is much smaller than the others
};

struct Segments {
  std::vector<Segment> list;
  std::vector<Entry> entries;
  std::unique_ptr<float[]> hidden;   // h of every entry
  std::unique_ptr<float[]> partial;  // sums of the rows that stand in several segments; null: there are none

  // The factor that is read next, to be fetched ahead.
  const void* after(int64_t i, const void* Segment::*factor) const {
    return list[std::min(i + 1, int64_t(list.size()) - 1)].*factor;
  }
};

// Whether a segment is one of many rows: enough tiles for all threads, and factors that the L2 cache holds once widened.
bool has_many(const Segment& segment);

// Reads a row of a table into a segment; false: it does nothing to its rows.
using Read = std::function<bool(const int64_t*, Segment&)>;

void check_pool(const at::Tensor& pool);

// The segments that do something, each with the slot's row as `read` takes it and with room for `hidden`. Throws
// ValueError as `resolve`. name, width: of the table; columns: of what is written.
Segments resolve_step(
    int64_t rows, int64_t columns, const at::Tensor& records, const char* name, int64_t width, const at::Tensor& slot,
    const at::Tensor& start, const at::Tensor& token, const at::Tensor& weight, const Read& read);

enum class Use { LOWRANK, EMBEDDING, REPLACE };

// Throws ValueError if a shape, a type, an index or an offset is wrong, before anything is written.
// `in`: elements of a row of A (the vocabulary for an embedding); `out`: columns of y.
Segments resolve(
    Use use, int64_t rows, int64_t in, int64_t out, const at::Tensor& pool, const at::Tensor& records,
    const at::Tensor& slot, const at::Tensor& start, const at::Tensor& token, const at::Tensor& weight);

}  // namespace polyrank
