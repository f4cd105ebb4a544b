// h = d * (left x): dot products of a segment's rows with the rank rows of its left factor.
#pragma once

#include "matrix.h"
#include "segments.h"
#include "split.h"
#include "unrolled.h"

namespace polyrank {

constexpr int SHRINK_UNIT = 8;  // rank rows: the unit in which threads share a left factor

// Rank rows of a tile. Sums and widened factors fill the registers, rows come from the L1 cache; one row hides the
// latency of fmadd behind 8 chains. 8 rows of one adapter of rank 64 in tiles of 4 x 4, with the rows in registers, took
// 9.5 ms a step instead of 5.5 (210 modules, one thread, 2-core AVX-512 VM, 2026-11-25).
constexpr int ranks_of_tile(int rows) {
  if (rows == 1) return 8;
  if (LANES < 16) return rows == 2 ? 4 : 2;
  return rows == 2 ? 6 : rows == 3 ? 5 : rows <= 5 ? 4 : 3;
}

// hidden[r][q] = d[q] * dot(x[r], a[q]). Every dot product has one vector sum, filled in the order of the elements and
// added up at the end, whatever ROWS and RANKS are: a row's result does not depend on its neighbours.
// `a` begins with the tile. Meanwhile the block at `ahead` comes into the cache: a factor is too short for the hardware to find its pattern.
template <class F, int ROWS, int RANKS>
inline void dot_tile(
    const Matrix<F>& a, const char* ahead, int64_t in, const float* const* x, const float* d, float* hidden, int64_t rank) {
  Vec sums[ROWS][RANKS];
  unrolled<ROWS>([&](auto r) { unrolled<RANKS>([&](auto q) { sums[r][q] = Vec(0.0f); }); });
  const auto step = [&](int64_t i, auto... n) {  // n: how many are left, where they are no whole pair
    Pair factors[RANKS];
    unrolled<RANKS>([&](auto q) {
      __builtin_prefetch(ahead + a.offset(q, i), 0, TO_L2);
      factors[q] = a.load(q, i, n...);
    });
    unrolled<ROWS>([&](auto r) {
      const Pair values = load_pair(x[r] + i, n...);
      unrolled<RANKS>([&](auto q) {
        sums[r][q] = at::vec::fmadd(factors[q].low, values.low, sums[r][q]);
        sums[r][q] = at::vec::fmadd(factors[q].high, values.high, sums[r][q]);
      });
    });
  };
  int64_t i = 0;
  for (; i + STEP <= in; i += STEP) step(i);
  if (i < in) step(i, in - i);
  unrolled<ROWS>([&](auto r) {
    unrolled<RANKS>([&](auto q) { hidden[r * rank + q] = sum(sums[r][q]) * (d ? d[q] : 1.0f); });
  });
}

template <class F, int ROWS>
inline void dot_rows(
    const Segment& segment, int64_t in, const float* const* x, float* hidden, int64_t first, int64_t last, const void* next) {
  constexpr int RANKS = ranks_of_tile(ROWS);
  const Matrix<F> a(segment.left, segment.rank, in);
  const auto d_at = [&](int64_t q) { return segment.d ? segment.d + q : nullptr; };
  int64_t q = first;
  const auto ahead = [&](int64_t following) {
    return following < last ? a.address(following, 0) : static_cast<const char*>(next);
  };
  for (; q + RANKS <= last; q += RANKS)
    dot_tile<F, ROWS, RANKS>(a.from(q), ahead(q + RANKS), in, x, d_at(q), hidden + q, segment.rank);
  for (; q < last; ++q) dot_tile<F, ROWS, 1>(a.from(q), ahead(q + 1), in, x, d_at(q), hidden + q, segment.rank);
}

template <class F, class X>
void shrink_segment(
    const Segment& segment, const Entry* entries, const X* x, int64_t stride, int64_t in, int64_t first, int64_t last,
    const void* next) {
  constexpr bool WIDE = std::is_same_v<X, float>;
  std::vector<float> scratch(WIDE ? 0 : TILE_ROWS * in);
  const float* rows[TILE_ROWS];
  for (int64_t tile = 0; tile < segment.tiles(); ++tile) {
    const int64_t begin = segment.tile_begin(tile), count = segment.tile_begin(tile + 1) - begin;
    for (int64_t r = 0; r < count; ++r) {
      const X* row = x + entries[segment.first + begin + r].row * stride;
      if constexpr (WIDE) {
        rows[r] = row;
      } else {
        convert_row(scratch.data() + r * in, row, in);
        rows[r] = scratch.data() + r * in;
      }
    }
    float* hidden = segment.hidden + begin * segment.rank;
    with_constant<TILE_ROWS>(
        count, [&](auto constant) { dot_rows<F, constant>(segment, in, rows, hidden, first, last, next); });
  }
}

// Units of a segment's left factor, in bytes read times tiles of rows.
inline Share shrink_share(const Segment& segment, int64_t in) {
  const int64_t bytes = factor_bytes(segment.type, SHRINK_UNIT, in);
  return {(segment.rank + SHRINK_UNIT - 1) / SHRINK_UNIT, std::max<int64_t>(bytes * segment.tiles(), 1)};
}

// Fills units [first, last) of the segment's `hidden`.
template <class X>
void shrink_units(const Segments& segments, int64_t i, const X* x, int64_t stride, int64_t in, int64_t first, int64_t last) {
  const Segment& segment = segments.list[i];
  with_factor(segment.type, [&](auto* factor_type) {
    shrink_segment<std::remove_pointer_t<decltype(factor_type)>>(
        segment, segments.entries.data(), x, stride, in, first * SHRINK_UNIT, std::min(last * SHRINK_UNIT, segment.rank),
        segments.after(i, &Segment::left));
  });
}

// Fills `hidden` of every segment.
inline void shrink(const Segments& segments, const at::Tensor& x) {
  const int64_t in = x.size(1);
  std::vector<Share> shares;
  shares.reserve(segments.list.size());
  for (const auto& segment : segments.list) shares.push_back(shrink_share(segment, in));
  with_float(x.scalar_type(), "x", [&](auto* x_type) {
    const auto* values = x.const_data_ptr<std::remove_pointer_t<decltype(x_type)>>();
    split_by_cost(shares, [&](int64_t i, int64_t first, int64_t last) {
      shrink_units(segments, i, values, x.stride(0), in, first, last);
    });
  });
}

}  // namespace polyrank
