#include "expand.h"

#include "matrix.h"
#include "unrolled.h"

namespace polyrank {
namespace {

// Pairs of columns of a tile: its sums fill half of the registers, 32 of AVX-512 or 16 of AVX2. One row reads 512
// neighbouring bytes of B in bfloat16 so.
constexpr int pairs_of_tile(int rows) { return std::max<int>((LANES == 16 ? 8 : 4) / rows, 1); }

// Columns [j, end) of a segment's rows from `i` on.
struct Place {
  int64_t i, j, end;
};

// Adds w * delta to `n` columns of an entry's row; rounds when this is the row's last entry.
template <class Y>
inline void add_pair(const Output& output, const Entry& entry, const float* bias, Pair delta, int64_t j, int64_t n) {
  if (bias) {
    const Pair b = load_pair(bias + j, n);
    delta = {delta.low + b.low, delta.high + b.high};
  }
  Y* row = static_cast<Y*>(output.y) + entry.row * output.stride + j;
  float* sums = entry.partial < 0 ? nullptr : output.partial + entry.partial * output.columns + j;
  const Pair before = entry.first ? load_pair(row, n) : load_pair(sums, n);
  const Pair after = fmadd(Vec(entry.weight), delta, before);
  if (entry.last) {
    store_pair(row, after, n);
  } else {
    store_pair(sums, after, n);
  }
}

// Deltas of `rows` rows, which lie `distance` apart.
__attribute__((noinline)) void add(
    const Segment& segment, const Output& output, const Place& at, int64_t rows, const float* deltas, int64_t distance) {
  with_float(output.type, "y", [&](auto* type) {
    for (int64_t r = 0; r < rows; ++r, deltas += distance) {
      const Entry& entry = output.entries[segment.first + at.i + r];
      for (int64_t j = at.j; j < at.end; j += STEP) {
        const int64_t n = std::min(STEP, at.end - j);
        const Pair delta = load_pair(deltas + j - at.j, n);
        add_pair<std::remove_pointer_t<decltype(type)>>(output, entry, segment.bias, delta, j, n);
      }
    }
  });
}

// What a tile is added to lies in the L2 cache where there are many of them.
inline void fetch(const Segment& segment, const Output& output, const Place& at, int64_t rows) {
  const int64_t size = c10::elementSize(output.type);
  for (int64_t r = 0; r < rows; ++r) {
    const Entry& entry = output.entries[segment.first + at.i + r];
    const char* row = static_cast<const char*>(output.y) + (entry.row * output.stride + at.j) * size;
    __builtin_prefetch(row, 1, 3);
    __builtin_prefetch(row + STEP * size - 1, 1, 3);
  }
}

// The sums of a tile to y. By way of memory, for they lose their registers in the loop before if y's types, entries and
// borders stand behind it: 512 rows of one adapter of rank 64 take 113 ms so, over 30 layers, else 160.
template <int ROWS, int PAIRS>
inline void finish(const Segment& segment, const Output& output, const Place& at, const Pair (&sums)[ROWS][PAIRS]) {
  float deltas[ROWS * PAIRS * STEP];
  unrolled<ROWS>([&](auto r) {
    unrolled<PAIRS>([&](auto p) { store_pair(deltas + (r * PAIRS + p) * STEP, sums[r][p], STEP); });
  });
  add(segment, output, {at.i, at.j, std::min(at.j + PAIRS * STEP, at.end)}, ROWS, deltas, PAIRS * STEP);
}

// ROWS entries, PAIRS pairs of columns, of which a single one may be cut. `b` begins with them at `column`. Meanwhile the
// tile at `ahead` comes into the cache.
template <class F, int ROWS, int PAIRS, bool CUT>
inline void expand_tile(
    const Segment& segment, const Output& output, Matrix<F> b, int64_t column, const Place& at, const char* ahead) {
  static_assert(PAIRS == 1 || !CUT);
  const int64_t rank = segment.rank;
  const float* hidden = segment.hidden + at.i * rank;
  fetch(segment, output, at, ROWS);
  Pair sums[ROWS][PAIRS];
  unrolled<ROWS>([&](auto r) { unrolled<PAIRS>([&](auto p) { sums[r][p] = {Vec(0.0f), Vec(0.0f)}; }); });
  for (int64_t q = 0; q < rank; ++q, b = b.from(1), ahead += b.offset(1, 0)) {
    unrolled<PAIRS>([&](auto p) {
      __builtin_prefetch(ahead + b.offset(0, p * STEP), 0, TO_L2);
      Pair factor;
      if constexpr (CUT) {
        factor = b.load(0, column, at.end - at.j);
      } else {
        factor = b.load(0, column + p * STEP);
      }
      unrolled<ROWS>([&](auto r) { sums[r][p] = fmadd(Vec(hidden[r * rank + q]), factor, sums[r][p]); });
    });
  }
  finish(segment, output, at, sums);
}

// As many tiles as fit; the first column that is left. `b` has column `origin` first.
template <class F, int ROWS, int PAIRS>
inline int64_t expand_tiles(
    const Segment& segment, const Output& output, const Matrix<F>& b, int64_t origin, Place at, const void* next) {
  constexpr int64_t WIDTH = PAIRS * STEP;
  const auto ahead = [&] {
    return at.j + WIDTH < at.end ? b.address(0, at.j + WIDTH - origin) : static_cast<const char*>(next);
  };
  for (; at.j + WIDTH <= at.end; at.j += WIDTH)
    expand_tile<F, ROWS, PAIRS, false>(segment, output, b, at.j - origin, at, ahead());
  if constexpr (PAIRS == 1) {
    if (at.j < at.end) expand_tile<F, ROWS, 1, true>(segment, output, b, at.j - origin, at, ahead());
    at.j = at.end;
  }
  return at.j;
}

template <class F>
void expand_rows(
    const Segment& segment, const Output& output, const Matrix<F>& b, int64_t origin, Place at, int64_t rows,
    const void* next) {
  with_constant<TILE_ROWS>(rows, [&](auto constant) {
    constexpr int ROWS = constant, PAIRS = pairs_of_tile(ROWS);
    at.j = expand_tiles<F, ROWS, PAIRS>(segment, output, b, origin, at, next);
    if constexpr (PAIRS > 2) at.j = expand_tiles<F, ROWS, 2>(segment, output, b, origin, at, next);
    if constexpr (PAIRS > 1) expand_tiles<F, ROWS, 1>(segment, output, b, origin, at, next);
  });
}

template <class F>
void expand_segment(const Segment& segment, const Output& output, int64_t first, int64_t last, const void* next) {
  // A strip of B stays in the L1 cache for all tiles of rows; a single tile needs none.
  const Matrix<F> b(segment.right, segment.rank, output.columns);
  const int64_t tiles = segment.tiles(), strip = tiles == 1 ? last - first : EXPAND_UNIT;
  for (int64_t begin = first; begin < last; begin += strip) {
    const int64_t end = std::min(begin + strip, last);
    const auto each_tile = [&](const auto& matrix, int64_t origin, const void* after) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t i = segment.tile_begin(tile);
        expand_rows(segment, output, matrix, origin, {i, begin, end}, segment.tile_begin(tile + 1) - i, after);
      }
    };
    if (segment.many) {
      const Widened wide(b, segment.rank, begin, end);
      each_tile(wide.matrix, begin, wide.matrix.values);
    } else {
      each_tile(b, 0, next);
    }
  }
}

// As `expand_tile` for one row, reading only its active ranks. Adding 0 * b changes no sum of finite numbers (importers
// take no others), so a row's bits are the same either way.
template <class F, int PAIRS, bool CUT>
inline void gather_tile(const Segment& segment, const Output& output, const Matrix<F>& b, const Place& at) {
  const float* hidden = segment.hidden + at.i * segment.rank;
  const int32_t* active = segment.active + at.i * segment.chosen;
  Pair sums[1][PAIRS];
  unrolled<PAIRS>([&](auto p) { sums[0][p] = {Vec(0.0f), Vec(0.0f)}; });
  for (int64_t c = 0; c < segment.chosen; ++c) {
    const Matrix<F> row = b.from(active[c]);
    const Vec h(hidden[active[c]]);
    unrolled<PAIRS>([&](auto p) {
      __builtin_prefetch(row.address(0, at.j + (PAIRS + p) * STEP), 0, TO_L2);
      if constexpr (CUT) {
        sums[0][p] = fmadd(h, row.load(0, at.j, at.end - at.j), sums[0][p]);
      } else {
        sums[0][p] = fmadd(h, row.load(0, at.j + p * STEP), sums[0][p]);
      }
    });
  }
  finish(segment, output, at, sums);
}

template <class F>
void gather_segment(const Segment& segment, const Output& output, int64_t first, int64_t last) {
  constexpr int PAIRS = pairs_of_tile(1);
  const Matrix<F> b(segment.right, segment.rank, output.columns);
  for (int64_t begin = first; begin < last; begin += PAIRS * STEP) {  // a strip of B stays in the L1 cache for all rows
    const int64_t end = std::min(begin + PAIRS * STEP, last);
    for (int64_t i = 0; i < segment.rows(); ++i) {
      Place at{i, begin, end};
      if (begin + PAIRS * STEP <= end) {
        gather_tile<F, PAIRS, false>(segment, output, b, at);
        continue;
      }
      for (; at.j + STEP <= end; at.j += STEP) gather_tile<F, 1, false>(segment, output, b, at);
      if (at.j < end) gather_tile<F, 1, true>(segment, output, b, at);
    }
  }
}

void expand_columns(const Segment& segment, const Output& output, int64_t first, int64_t last, const void* next) {
  with_factor(segment.type, [&](auto* factor_type) {
    using F = std::remove_pointer_t<decltype(factor_type)>;
    if (segment.active) return gather_segment<F>(segment, output, first, last);
    expand_segment<F>(segment, output, first, last, next);
  });
}

// Of a unit of columns.
int64_t cost_of(const Segment& segment) {
  if (segment.active) return factor_bytes(segment.type, 1, EXPAND_UNIT) * segment.rows() * (segment.chosen + 1);
  const int64_t number = segment.many ? WIDE_COST * EXPAND_UNIT : factor_bytes(segment.type, 1, EXPAND_UNIT);
  return number * segment.tiles() * (segment.rank + 1);
}

}  // namespace

int64_t Expansion::cost() const {
  int64_t together = 0;
  for (const auto& segment : segments.list) together += cost_of(segment);
  return together;
}

void Expansion::add_shares(std::vector<Share>& shares) const {
  const int64_t units = (output.columns + EXPAND_UNIT - 1) / EXPAND_UNIT;
  if (segments.partial) {
    shares.push_back({units, cost()});
  } else {
    for (const auto& segment : segments.list) shares.push_back({units, cost_of(segment)});
  }
}

void Expansion::run(int64_t i, int64_t first, int64_t last) const {
  const int64_t begin = first * EXPAND_UNIT, end = std::min(last * EXPAND_UNIT, output.columns);
  if (segments.partial) return run_columns(begin, end);
  expand_columns(segments.list[i], output, begin, end, segments.after(i, &Segment::right));
}

void Expansion::run_columns(int64_t first, int64_t last) const {
  for (size_t i = 0; i < segments.list.size(); ++i) {
    const Segment& following = segments.list[std::min(i + 1, segments.list.size() - 1)];
    const auto* next = static_cast<const char*>(following.right) + factor_bytes(following.type, 1, first);
    expand_columns(segments.list[i], output, first, last, next);
  }
}

void expand(const Segments& segments, at::Tensor& y) {
  const Expansion expansion(segments, y);
  std::vector<Share> shares;
  expansion.add_shares(shares);
  split_by_cost(shares, [&](int64_t i, int64_t first, int64_t last) { expansion.run(i, first, last); });
}

void add_changes(const Segments& segments, at::Tensor& y) {
  write_back(y, [&](at::Tensor& rows) {
    const Output output(segments, rows);
    const int64_t units = (output.columns + EXPAND_UNIT - 1) / EXPAND_UNIT;
    const int64_t cost = EXPAND_UNIT * sizeof(float) * segments.entries.size();
    // Each thread keeps its columns through all segments, in their order.
    split_by_cost({{units, cost}}, [&](int64_t, int64_t first, int64_t last) {
      const int64_t begin = first * EXPAND_UNIT, end = std::min(last * EXPAND_UNIT, output.columns);
      for (const auto& segment : segments.list)
        add(segment, output, {0, begin, end}, segment.rows(), segment.hidden + begin, segment.rank);
    });
  });
}

}  // namespace polyrank
