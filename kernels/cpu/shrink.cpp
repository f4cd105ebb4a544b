#include "shrink.h"

#include "add_up.h"
#include "matrix.h"
#include "signs.h"
#include "unrolled.h"

namespace polyrank {
namespace {

constexpr int SHRINK_UNIT = 8;  // rank rows: the unit in which threads share a left factor

// Rank rows of a tile. Sums and widened factors fill the registers, rows come from the L1 cache; one row hides the
// latency of fmadd behind 8 chains. 8 rows of one adapter of rank 64 in tiles of 4 x 4, with the rows in registers, took
// 9.5 ms a step instead of 5.5 (210 modules, one thread, 2-core AVX-512 VM, 2026-11-25).
constexpr int ranks_of_tile(int rows) {
  if (rows == 1) return 8;
  if (LANES < 16) return rows == 2 ? 4 : 2;
  return rows == 2 ? 6 : rows == 3 ? 5 : rows <= 5 ? 4 : 3;
}

// Calls `work` with a null pointer of a left factor's type.
template <class Work>
void with_left(int64_t type, const Work& work) {
  if (type == ONE_BIT) return work(static_cast<Sign*>(nullptr));
  with_factor(type, work);
}

// What a tile of rows is multiplied with: a left factor from rank row `first` on, and where its products go.
template <class F>
struct Left {
  Matrix<F> a;
  int64_t in, count;   // rank rows
  const float* d;      // of each of them, or null
  int64_t rank;        // distance of the rows of `hidden`
  const void* next;    // what is read after it, to be fetched ahead
};

// hidden[r][q] = d[q] * dot(x[r], a[q]). Every dot product has one vector sum, filled in the order of the elements and
// added up at the end, whatever ROWS and RANKS are: a row's result does not depend on its neighbours.
// The tile begins at rank row q. Meanwhile what comes after it comes into the cache: a factor is too short for the
// hardware to find its pattern.
template <class F, int ROWS, int RANKS>
inline void dot_tile(const Left<F>& left, int64_t q, const float* const* x, float* hidden) {
  const Matrix<F> a = left.a.from(q);
  const char* ahead = q + RANKS < left.count ? a.address(RANKS, 0) : static_cast<const char*>(left.next);
  Vec sums[ROWS * RANKS];
  unrolled<ROWS * RANKS>([&](auto i) { sums[i] = Vec(0.0f); });
  const auto step = [&](int64_t i, auto... n) {  // n: how many are left, where they are no whole pair
    Pair factors[RANKS];
    unrolled<RANKS>([&](auto q) {
      __builtin_prefetch(ahead + a.offset(q, i), 0, TO_L2);
      factors[q] = a.load(q, i, n...);
    });
    unrolled<ROWS>([&](auto r) {
      const Pair values = load_pair(x[r] + i, n...);
      unrolled<RANKS>([&](auto q) {
        Vec& sum = sums[r * RANKS + q];
        sum = at::vec::fmadd(factors[q].high, values.high, at::vec::fmadd(factors[q].low, values.low, sum));
      });
    });
  };
  int64_t i = 0;
  for (; i + STEP <= left.in; i += STEP) step(i);
  if (i < left.in) step(i, left.in - i);
  float totals[ROWS * RANKS];
  add_up(sums, totals);
  for (int r = 0; r < ROWS; ++r)
    for (int k = 0; k < RANKS; ++k) hidden[r * left.rank + q + k] = totals[r * RANKS + k] * (left.d ? left.d[q + k] : 1.0f);
}

template <class F, int ROWS>
inline void dot_rows(const Left<F>& left, const float* const* x, float* hidden) {
  constexpr int RANKS = ranks_of_tile(ROWS);
  int64_t q = 0;
  for (; q + RANKS <= left.count; q += RANKS) dot_tile<F, ROWS, RANKS>(left, q, x, hidden);
  if constexpr (RANKS > 2)
    for (; q + 2 <= left.count; q += 2) dot_tile<F, ROWS, 2>(left, q, x, hidden);
  for (; q < left.count; ++q) dot_tile<F, ROWS, 1>(left, q, x, hidden);
}

// Tiles [first, last) of the segment's rows. `hidden`: of the left factor's first rank row.
template <class F>
void dot_tiles(
    const Segment& segment, const Entry* entries, const Input& x, const Left<F>& left, float* hidden, int64_t first,
    int64_t last) {
  std::unique_ptr<float[]> wide;
  if (x.type != at::kFloat) wide.reset(new float[TILE_ROWS * x.in]);
  const float* rows[TILE_ROWS];
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t begin = segment.tile_begin(tile), count = segment.tile_begin(tile + 1) - begin;
    with_float(x.type, "x", [&](auto* type) {
      using X = std::remove_pointer_t<decltype(type)>;
      for (int64_t r = 0; r < count; ++r) {
        const X* row = static_cast<const X*>(x.values) + entries[segment.first + begin + r].row * x.stride;
        if constexpr (std::is_same_v<X, float>) {
          rows[r] = row;
        } else {
          convert_row(wide.get() + r * x.in, row, x.in);
          rows[r] = wide.get() + r * x.in;
        }
      }
    });
    with_constant<TILE_ROWS>(
        count, [&](auto constant) { dot_rows<F, constant>(left, rows, hidden + begin * segment.rank); });
  }
}

}  // namespace

int64_t left_bytes(int64_t type, int64_t rows, int64_t columns) {
  return type == ONE_BIT ? rows * ((columns + 7) / 8) : factor_bytes(type, rows, columns);
}

Share shrink_share(const Segment& segment, int64_t in) {
  if (segment.many) return {segment.tiles(), std::max<int64_t>(WIDE_COST * segment.rank * in, 1)};
  // Signs are widened at the price of floats.
  const int64_t bytes = (segment.type == ONE_BIT ? 4 : 1) * left_bytes(segment.type, SHRINK_UNIT, in);
  return {(segment.rank + SHRINK_UNIT - 1) / SHRINK_UNIT, std::max<int64_t>(bytes * segment.tiles(), 1)};
}

void shrink_units(const Segments& segments, int64_t i, const Input& x, int64_t first, int64_t last) {
  const Segment& segment = segments.list[i];
  const Entry* entries = segments.entries.data();
  const void* next = segments.after(i, &Segment::left);
  with_left(segment.type, [&](auto* factor_type) {
    using F = std::remove_pointer_t<decltype(factor_type)>;
    const Matrix<F> a(segment.left, segment.rank, x.in);
    if (segment.many) {
      const Widened wide(a, segment.rank, 0, x.in);
      const Left<float> left{wide.matrix, x.in, segment.rank, segment.d, segment.rank, wide.matrix.values};
      return dot_tiles(segment, entries, x, left, segment.hidden, first, last);
    }
    const int64_t q = first * SHRINK_UNIT, count = std::min(last * SHRINK_UNIT, segment.rank) - q;
    const Left<F> left{a.from(q), x.in, count, segment.d ? segment.d + q : nullptr, segment.rank, next};
    dot_tiles(segment, entries, x, left, segment.hidden + q, 0, segment.tiles());
  });
}

void shrink(const Segments& segments, const at::Tensor& x) {
  const Input input(x);
  std::vector<Share> shares;
  shares.reserve(segments.list.size());
  for (const auto& segment : segments.list) shares.push_back(shrink_share(segment, input.in));
  split_by_cost(shares, [&](int64_t i, int64_t first, int64_t last) { shrink_units(segments, i, input, first, last); });
}

}  // namespace polyrank
