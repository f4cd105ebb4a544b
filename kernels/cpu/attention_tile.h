// Attention of one tile: some neighbouring queries of one request, with all query heads of one KV head.
//
// Keys are taken in chunks of CHUNK at fixed positions, chunks in order, with an online softmax per row (one query
// of one head). The sums restart every PARTITION keys and are merged in order. Both borders are absolute positions,
// and a row skips what it does not see: its result depends neither on its neighbours in the tile, nor on how the prompt
// was cut into steps, nor on which thread took which partition.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "factors.h"
#include "pages.h"

namespace polyrank {

constexpr int64_t CHUNK = 32;       // keys per pass: one chunk of K, V and scores fits the L1 cache at dim 64
constexpr int64_t PARTITION = 512;  // keys after which another thread may take over
constexpr float HIDDEN = -std::numeric_limits<float>::infinity();

struct Tile {
  int64_t request, kv_head;
  int64_t first, queries;  // rows of `query`
  int64_t position;        // of the first query
  int64_t begin, end;      // keys that any query sees
};

struct Attention {
  int64_t heads, kv_heads, group, dim, padded;  // padded: dim rounded up to whole vectors
  float scale, softcap;
  int64_t window;
  const int32_t* block_table;
  int64_t table_stride;

  int64_t rows(const Tile& tile) const { return tile.queries * group; }
  const int32_t* table(const Tile& tile) const { return block_table + tile.request * table_stride; }
};

// Softmax state of a tile's rows over some keys: weighted sums of V, maxima, sums of exponentials (one per lane).
struct Sums {
  float *values, *maximum, *total;
  static int64_t floats(int64_t rows, int64_t padded) { return rows * (padded + 1 + LANES); }
  Sums(float* memory, int64_t rows, int64_t padded)
      : values(memory), maximum(memory + rows * padded), total(maximum + rows) {}
  void clear(int64_t rows, int64_t padded) {
    std::fill(values, values + rows * padded, 0.0f);
    std::fill(maximum, maximum + rows, HIDDEN);
    std::fill(total, total + rows * LANES, 0.0f);
  }
};

// Lines of memory that come into the cache one by one, between the steps of a product. All at once they would fill the
// core's few buffers for lines on their way, and what is computed next would wait for one: attention of 8 requests of 130
// keys took 3.5 ms for 30 layers so, and 3.0 spread out (2.1 with all of it in the cache; 2-core AVX-512 VM, 2026-11-26).
class Ahead {
 public:
  void add(const void* line) { lines_.push_back(line); }
  void fetch_one() {
    if (next_ < lines_.size()) __builtin_prefetch(lines_[next_++], 0, TO_L2);
  }
  void fetch_rest() {
    while (next_ < lines_.size()) fetch_one();
    lines_.clear();
    next_ = 0;
  }

 private:
  std::vector<const void*> lines_;
  size_t next_ = 0;
};

// Per thread; `keys` and `values` hold a chunk in the type of the pool or in float. `next`: the tile that this thread
// takes up after this one, from key `next_begin` on, or null.
struct Scratch {
  std::vector<float> query, scores, keys, transposed, values, partition, all;
  Ahead ahead;
  const Tile* next = nullptr;
  int64_t next_begin = 0;
  void reserve(int64_t rows, int64_t padded) {
    query.resize(rows * padded);
    scores.resize(rows * CHUNK);
    for (auto* chunk : {&keys, &transposed, &values}) chunk->resize(CHUNK * padded);
    for (auto* sums : {&partition, &all}) sums->resize(Sums::floats(rows, padded));
  }
};

// c[ROWS][2 * LANES] += a[ROWS][depth] b[depth][2 * LANES], every element summed in the order of depth. A product
// of scores starts from zero, one of values goes on from the sums so far.
template <int ROWS, class T>
inline void multiply_tile(
    const float* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc, int64_t depth, bool accumulate,
    Ahead& ahead) {
  Pair sums[ROWS];
  for (int r = 0; r < ROWS; ++r) sums[r] = accumulate ? load_pair(c + r * ldc) : Pair{Vec(0.0f), Vec(0.0f)};
  for (int64_t k = 0; k < depth; ++k) {
    const Pair factor = load_pair(b + k * ldb);
    ahead.fetch_one();
    for (int r = 0; r < ROWS; ++r) sums[r] = fmadd(Vec(a[r * lda + k]), factor, sums[r]);
  }
  for (int r = 0; r < ROWS; ++r) store_pair(c + r * ldc, sums[r], STEP);
}

// The same for any number of rows and `columns`, a multiple of STEP.
template <class T>
void multiply(
    const float* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t columns,
    int64_t depth, bool accumulate, Ahead& ahead) {
  for (int64_t r = 0; r < rows;) {
    const int64_t left = rows - r;
    const int64_t count = left >= 8 ? 8 : left >= 4 ? 4 : left;
    for (int64_t j = 0; j < columns; j += STEP) {
      const auto tile = [&](auto kernel) { kernel(a + r * lda, lda, b + j, ldb, c + r * ldc + j, ldc, depth, accumulate, ahead); };
      switch (count) {
        case 8: tile(multiply_tile<8, T>); break;
        case 4: tile(multiply_tile<4, T>); break;
        case 3: tile(multiply_tile<3, T>); break;
        case 2: tile(multiply_tile<2, T>); break;
        default: tile(multiply_tile<1, T>);
      }
    }
    r += count;
  }
  ahead.fetch_rest();
}

// Keys or values [first, last) are to come into the cache: the rows of a head are a stride apart, which the hardware does
// not foresee.
template <class T>
void foresee(
    const Attention& attention, const Tile& tile, const void* pool, const Pages& pages, int64_t first, int64_t last,
    Ahead& ahead) {
  const int64_t row_bytes = attention.dim * int64_t(sizeof(T));
  pages.walk<T>(pool, attention.table(tile), tile.kv_head, first, last, [&](int64_t, const T* row) {
    for (int64_t byte = 0; byte < row_bytes; byte += CACHE_LINE) ahead.add(reinterpret_cast<const char*>(row) + byte);
  });
}

// What comes after the chunk at `first`: the tile's next chunk, or the first one of the thread's next tile.
template <class T>
void foresee_next(
    const Attention& attention, const Tile& tile, const void* pool, const Pages& pages, int64_t first, Scratch& scratch) {
  const int64_t begin = first + CHUNK;
  if (begin < tile.end) {
    foresee<T>(attention, tile, pool, pages, begin, std::min(tile.end, begin + CHUNK), scratch.ahead);
  } else if (const Tile* next = scratch.next) {
    const int64_t end = std::min((scratch.next_begin / CHUNK + 1) * CHUNK, next->end);
    foresee<T>(attention, *next, pool, pages, scratch.next_begin, end, scratch.ahead);
  }
}

// Copies the keys or values [begin, end) of the chunk at `first` into rows of `padded` elements. All else is zero: a
// page may hold anything behind the request's last token, even NaN, and pages before a window may be gone.
template <class T, class To>
void load_chunk(
    const Attention& attention, const Tile& tile, const void* pool, const Pages& pages, int64_t first, int64_t begin,
    int64_t end, To* to) {
  const int64_t padded = attention.padded, last = std::min(end, first + CHUNK);
  std::fill(to, to + std::max<int64_t>(begin - first, 0) * padded, To(0));
  std::fill(to + (last - first) * padded, to + CHUNK * padded, To(0));
  pages.walk<T>(pool, attention.table(tile), tile.kv_head, std::max(begin, first), last, [&](int64_t position, const T* row) {
    convert_row(to + (position - first) * padded, row, attention.dim, true);
  });
}

// Scores of one row become weights of V; keys outside [low, high) of the chunk are hidden. Rescales the row's sums.
inline void softmax_row(const Attention& attention, float* scores, int64_t low, int64_t high, Sums& sums, int64_t row) {
  if (low >= high) {
    std::fill(scores, scores + CHUNK, 0.0f);
    return;
  }
  Vec highest(HIDDEN);
  for (int64_t k = 0; k < CHUNK; k += LANES) {
    Vec s = Vec::loadu(scores + k) * Vec(attention.scale);
    if (attention.softcap > 0) s = Vec(attention.softcap) * (s / Vec(attention.softcap)).tanh();
    if (k < low || k + LANES > high) {
      const Vec index = Vec::arange(float(k), 1.0f);
      s = Vec::blendv(Vec(HIDDEN), s, (index >= Vec(float(low))) & (index < Vec(float(high))));
    }
    s.store(scores + k);
    highest = at::vec::maximum(highest, s);
  }
  const float before = sums.maximum[row], now = std::max(before, maximum(highest));
  const float shrink = std::exp(before - now);
  Vec total = Vec::loadu(sums.total + row * LANES) * Vec(shrink);
  for (int64_t k = 0; k < CHUNK; k += LANES) {
    const Vec weight = (Vec::loadu(scores + k) - Vec(now)).exp();
    weight.store(scores + k);
    total = total + weight;
  }
  total.store(sums.total + row * LANES);
  sums.maximum[row] = now;
  float* values = sums.values + row * attention.padded;
  if (now != before)
    for (int64_t j = 0; j < attention.padded; j += LANES) (Vec::loadu(values + j) * Vec(shrink)).store(values + j);
}

struct Cache;

// Fills `sums` with the keys [begin, end) of one partition. T: element type of the pools.
template <class T>
void attend(
    const Attention& attention, const Tile& tile, const Cache& cache, int64_t begin, int64_t end, Scratch& scratch,
    Sums& sums);

// The pools; only `attend_to` knows their element type.
struct Cache {
  Pages key_pages, value_pages;
  const void *keys, *values;
  decltype(&attend<float>) attend_to;

  Cache(const at::Tensor& key_pool, const at::Tensor& value_pool)
      : key_pages(key_pool, "key_pool"),
        value_pages(value_pool, "value_pool"),
        keys(key_pool.const_data_ptr()),
        values(value_pool.const_data_ptr()) {
    with_float(key_pool.scalar_type(), "key_pool", [&](auto* type) {
      attend_to = attend<std::remove_pointer_t<decltype(type)>>;
    });
  }
};

template <class T>
void attend(
    const Attention& attention, const Tile& tile, const Cache& cache, int64_t begin, int64_t end, Scratch& scratch,
    Sums& sums) {
  // 16-bit keys are turned as they are: half the work, widened while multiplying. at::vec does so for AVX-512 only.
  using Chunk = std::conditional_t<LANES == 16, T, float>;
  constexpr int64_t SQUARE = 64 / sizeof(Chunk);  // most that transpose_mxn takes of this type
  auto* keys = reinterpret_cast<Chunk*>(scratch.keys.data());
  auto* turned = reinterpret_cast<Chunk*>(scratch.transposed.data());
  auto* values = reinterpret_cast<Chunk*>(scratch.values.data());
  const int64_t rows = attention.rows(tile), padded = attention.padded;
  sums.clear(rows, padded);
  for (int64_t first = begin / CHUNK * CHUNK; first < end; first += CHUNK) {
    load_chunk<T>(attention, tile, cache.keys, cache.key_pages, first, begin, end, keys);
    for (int64_t k = 0; k < CHUNK; k += SQUARE)
      for (int64_t j = 0; j < padded; j += SQUARE)
        at::vec::transpose_mxn<Chunk>(keys + k * padded + j, padded, turned + j * CHUNK + k, CHUNK, SQUARE, SQUARE);
    foresee_next<T>(attention, tile, cache.keys, cache.key_pages, first, scratch);
    multiply(
        scratch.query.data(), padded, turned, CHUNK, scratch.scores.data(), CHUNK, rows, CHUNK, attention.dim, false,
        scratch.ahead);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t position = tile.position + row / attention.group;
      const int64_t low = attention.window > 0 ? position - attention.window + 1 - first : 0;
      softmax_row(
          attention, scratch.scores.data() + row * CHUNK, std::max<int64_t>(low, 0),
          std::min(CHUNK, position + 1 - first), sums, row);
    }
    load_chunk<T>(attention, tile, cache.values, cache.value_pages, first, begin, end, values);
    foresee_next<T>(attention, tile, cache.values, cache.value_pages, first, scratch);
    multiply(
        scratch.scores.data(), CHUNK, values, padded, sums.values, padded, rows, padded, std::min(CHUNK, end - first), true,
        scratch.ahead);
  }
}

// `all` takes up the next partition in order; rows that saw none of its keys stay as they are.
inline void merge(const Attention& attention, int64_t rows, const Sums& next, Sums& all) {
  for (int64_t row = 0; row < rows; ++row) {
    if (next.maximum[row] == HIDDEN) continue;
    const float now = std::max(all.maximum[row], next.maximum[row]);
    const Vec keep(std::exp(all.maximum[row] - now)), take(std::exp(next.maximum[row] - now));
    const auto mix = [&](float* to, const float* from, int64_t n) {
      for (int64_t j = 0; j < n; j += LANES)
        at::vec::fmadd(take, Vec::loadu(from + j), keep * Vec::loadu(to + j)).store(to + j);
    };
    mix(all.values + row * attention.padded, next.values + row * attention.padded, attention.padded);
    mix(all.total + row * LANES, next.total + row * LANES, LANES);
    all.maximum[row] = now;
  }
}

template <class Q>
void load_query(const Attention& attention, const Tile& tile, const at::Tensor& query, float* to) {
  const Q* from = query.const_data_ptr<Q>();
  for (int64_t q = 0; q < tile.queries; ++q)
    for (int64_t g = 0; g < attention.group; ++g)
      convert_row(
          to + (q * attention.group + g) * attention.padded,
          from + (tile.first + q) * query.stride(0) + (tile.kv_head * attention.group + g) * query.stride(1), attention.dim,
          true);
}

template <class Q>
void store_output(const Attention& attention, const Tile& tile, const Sums& sums, at::Tensor& out) {
  Q* to = out.data_ptr<Q>();
  for (int64_t row = 0; row < attention.rows(tile); ++row) {
    const Vec inverse(1.0f / sum(Vec::loadu(sums.total + row * LANES)));
    float* values = sums.values + row * attention.padded;
    for (int64_t j = 0; j < attention.padded; j += LANES) (Vec::loadu(values + j) * inverse).store(values + j);
    const int64_t q = row / attention.group, head = tile.kv_head * attention.group + row % attention.group;
    convert_row(to + ((tile.first + q) * attention.heads + head) * attention.dim, values, attention.dim);
  }
}

}  // namespace polyrank
