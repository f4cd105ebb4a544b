// y += w * (h B + bias): every output column is one sum over the ranks, in their order.
#pragma once

#include "matrix.h"
#include "segments.h"
#include "split.h"
#include "unrolled.h"

namespace polyrank {

constexpr int64_t EXPAND_UNIT = 2 * STEP;  // columns: the unit in which threads share a right factor

// Pairs of columns of a tile: its sums fill half of the registers, 32 of AVX-512 or 16 of AVX2. One row reads 512
// neighbouring bytes of B in bfloat16 so.
constexpr int pairs_of_tile(int rows) { return std::max<int>((LANES == 16 ? 8 : 4) / rows, 1); }

template <class Y>
struct Output {
  Y* y;
  int64_t stride, columns;
  const Entry* entries;
  float* partial;

  // Adds w * delta to `n` columns at `j`; rounds when this is the row's last entry.
  void add(const Entry& entry, const float* bias, Pair delta, int64_t j, int64_t n) const {
    if (bias) {
      const Pair b = load_pair(bias + j, n);
      delta = {delta.low + b.low, delta.high + b.high};
    }
    Y* row = y + entry.row * stride + j;
    float* sums = entry.partial < 0 ? nullptr : partial + entry.partial * columns + j;
    const Pair before = entry.first ? load_pair(row, n) : load_pair(sums, n);
    const Pair after = fmadd(Vec(entry.weight), delta, before);
    if (entry.last) {
      store_pair(row, after, n);
    } else {
      store_pair(sums, after, n);
    }
  }
};

// ROWS entries from `i` on, PAIRS pairs of columns from `j` on, of which a single one may be cut: `n` columns. Meanwhile
// the tile at `ahead` comes into the cache.
template <class F, class Y, int ROWS, int PAIRS, bool CUT>
inline void expand_tile(
    const Segment& segment, const Output<Y>& output, int64_t i, int64_t j, int64_t n, const char* ahead) {
  static_assert(PAIRS == 1 || !CUT);
  const int64_t rank = segment.rank, columns = output.columns;
  Matrix<F> b(segment.right, rank, columns);
  const float* hidden = segment.hidden + i * rank;
  Pair sums[ROWS][PAIRS];
  unrolled<ROWS>([&](auto r) { unrolled<PAIRS>([&](auto p) { sums[r][p] = {Vec(0.0f), Vec(0.0f)}; }); });
  for (int64_t q = 0; q < rank; ++q, b = b.from(1), ahead += b.offset(1, 0)) {
    unrolled<PAIRS>([&](auto p) {
      __builtin_prefetch(ahead + b.offset(0, p * STEP), 0, TO_L2);
      Pair factor;
      if constexpr (CUT) {
        factor = b.load(0, j, n);
      } else {
        factor = b.load(0, j + p * STEP);
      }
      unrolled<ROWS>([&](auto r) { sums[r][p] = fmadd(Vec(hidden[r * rank + q]), factor, sums[r][p]); });
    });
  }
  unrolled<ROWS>([&](auto r) {
    unrolled<PAIRS>([&](auto p) {
      output.add(output.entries[segment.first + i + r], segment.bias, sums[r][p], j + p * STEP, CUT ? n : STEP);
    });
  });
}

template <class F, class Y, int ROWS, int PAIRS>
inline int64_t expand_tiles(
    const Segment& segment, const Output<Y>& output, int64_t i, int64_t j, int64_t end, const void* next) {
  constexpr int64_t WIDTH = PAIRS * STEP;
  const Matrix<F> b(segment.right, segment.rank, output.columns);
  const auto ahead = [&] { return j + WIDTH < end ? b.address(0, j + WIDTH) : static_cast<const char*>(next); };
  for (; j + WIDTH <= end; j += WIDTH) expand_tile<F, Y, ROWS, PAIRS, false>(segment, output, i, j, STEP, ahead());
  if constexpr (PAIRS == 1) {
    if (j < end) expand_tile<F, Y, ROWS, 1, true>(segment, output, i, j, end - j, ahead());
    j = end;
  }
  return j;  // the first column that is left
}

// As `expand_tile` for one row, reading only its active ranks. Adding 0 * b changes no sum of finite numbers (importers
// take no others), so a row's bits are the same either way.
template <class F, class Y, int PAIRS, bool CUT>
inline void gather_tile(const Segment& segment, const Output<Y>& output, int64_t i, int64_t j, int64_t n) {
  const Matrix<F> b(segment.right, segment.rank, output.columns);
  const float* hidden = segment.hidden + i * segment.rank;
  const int32_t* active = segment.active + i * segment.chosen;
  Pair sums[PAIRS];
  unrolled<PAIRS>([&](auto p) { sums[p] = {Vec(0.0f), Vec(0.0f)}; });
  for (int64_t c = 0; c < segment.chosen; ++c) {
    const Matrix<F> row = b.from(active[c]);
    const Vec h(hidden[active[c]]);
    unrolled<PAIRS>([&](auto p) {
      __builtin_prefetch(row.address(0, j + (PAIRS + p) * STEP), 0, TO_L2);
      if constexpr (CUT) {
        sums[p] = fmadd(h, row.load(0, j, n), sums[p]);
      } else {
        sums[p] = fmadd(h, row.load(0, j + p * STEP), sums[p]);
      }
    });
  }
  unrolled<PAIRS>([&](auto p) {
    output.add(output.entries[segment.first + i], segment.bias, sums[p], j + p * STEP, CUT ? n : STEP);
  });
}

template <class F, class Y>
void gather_segment(const Segment& segment, const Output<Y>& output, int64_t first, int64_t last) {
  constexpr int PAIRS = pairs_of_tile(1);
  for (int64_t begin = first; begin < last; begin += PAIRS * STEP) {  // a strip of B stays in the L1 cache for all rows
    const int64_t end = std::min(begin + PAIRS * STEP, last);
    for (int64_t i = 0; i < segment.rows(); ++i) {
      int64_t j = begin;
      if (j + PAIRS * STEP <= end) {
        gather_tile<F, Y, PAIRS, false>(segment, output, i, j, STEP);
        continue;
      }
      for (; j + 2 * STEP <= end; j += 2 * STEP) gather_tile<F, Y, 2, false>(segment, output, i, j, STEP);
      for (; j + STEP <= end; j += STEP) gather_tile<F, Y, 1, false>(segment, output, i, j, STEP);
      if (j < end) gather_tile<F, Y, 1, true>(segment, output, i, j, end - j);
    }
  }
}

template <class F, class Y>
void expand_segment(
    const Segment& segment, const Output<Y>& output, int64_t first, int64_t last, const void* next) {
  // A strip of B stays in the L1 cache for all tiles of rows; a single tile needs none.
  const int64_t tiles = segment.tiles(), strip = tiles == 1 ? last - first : EXPAND_UNIT;
  for (int64_t begin = first; begin < last; begin += strip) {
    const int64_t end = std::min(begin + strip, last);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t i = segment.tile_begin(tile);
      with_constant<TILE_ROWS>(segment.tile_begin(tile + 1) - i, [&](auto rows) {
        constexpr int PAIRS = pairs_of_tile(rows);
        int64_t j = expand_tiles<F, Y, rows, PAIRS>(segment, output, i, begin, end, next);
        if constexpr (PAIRS > 2) j = expand_tiles<F, Y, rows, 2>(segment, output, i, j, end, next);
        if constexpr (PAIRS > 1) expand_tiles<F, Y, rows, 1>(segment, output, i, j, end, next);
      });
    }
  }
}

template <bool GATED, class Y>
void expand_columns(
    const Segment& segment, const Output<Y>& output, int64_t first, int64_t last, const void* next) {
  with_factor(segment.type, [&](auto* factor_type) {
    using F = std::remove_pointer_t<decltype(factor_type)>;
    if constexpr (GATED) {
      if (segment.active) return gather_segment<F>(segment, output, first, last);
    }
    expand_segment<F>(segment, output, first, last, next);
  });
}

// The parts of an expansion that threads may take: all columns of a segment, or, where two segments may write the same
// row, all segments of a column: a thread then keeps its columns through all of them, in their order.
template <class Y, bool GATED = false>
struct Expansion {
  const Segments& segments;
  Output<Y> output;

  Expansion(const Segments& segments, at::Tensor& y)
      : segments(segments),
        output{y.data_ptr<Y>(), y.stride(0), y.size(1), segments.entries.data(), segments.partial.get()} {}

  void add_shares(std::vector<Share>& shares) const {
    const int64_t units = (output.columns + EXPAND_UNIT - 1) / EXPAND_UNIT;
    int64_t together = 0;
    for (const auto& segment : segments.list) {
      const int64_t read = segment.active ? segment.rows() * (segment.chosen + 1) : segment.tiles() * (segment.rank + 1);
      const int64_t cost = factor_bytes(segment.type, 1, EXPAND_UNIT) * read;
      together += cost;
      if (!segments.partial) shares.push_back({units, cost});
    }
    if (segments.partial) shares.push_back({units, together});
  }

  // Units [first, last) of part `i`.
  void run(int64_t i, int64_t first, int64_t last) const {
    const int64_t count = segments.partial ? segments.list.size() : i + 1;
    for (; i < count; ++i)
      expand_columns<GATED>(
          segments.list[i], output, first * EXPAND_UNIT, std::min(last * EXPAND_UNIT, output.columns),
          segments.after(i, &Segment::right));
  }
};

// Adds every segment's delta to y, from its `hidden`. GATED: segments may have active ranks (code of its own, for builds
// take long).
template <bool GATED = false>
inline void expand(const Segments& segments, at::Tensor& y) {
  with_float(y.scalar_type(), "y", [&](auto* y_type) {
    const Expansion<std::remove_pointer_t<decltype(y_type)>, GATED> expansion(segments, y);
    std::vector<Share> shares;
    expansion.add_shares(shares);
    split_by_cost(shares, [&](int64_t i, int64_t first, int64_t last) { expansion.run(i, first, last); });
  });
}

}  // namespace polyrank
