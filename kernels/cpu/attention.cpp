// Causal attention over paged keys and values, decode and chunked prefill alike. Meaning: kernels/reference.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <memory>

#include "attention_tile.h"

namespace polyrank {
namespace {

// A piece of work: some partitions of a tile. Pieces of a tile that is cut leave their sums in `parts`.
struct Piece {
  int64_t tile, begin, end, cost;
  float* sums;  // null: the piece is the whole tile
};

constexpr int64_t TILE_FLOATS = 2048;  // of queries: 32 rows at dim 64; with K, V and scores they fill the L1 cache
// Cost below which one thread is as fast as two: 200 keys of 3 KV heads of 64 (269 k) take 25.7 us on one thread and 23.4
// on two (2-core AVX-512 VM, 2026-11-23).
constexpr int64_t SMALL = 1 << 17;

int64_t next_border(int64_t position) { return (position / PARTITION + 1) * PARTITION; }

std::vector<Tile> cut_tiles(const Attention& a, const int32_t* start, const int32_t* length, int64_t requests) {
  std::vector<Tile> tiles;
  const int64_t rows = std::clamp<int64_t>(TILE_FLOATS / a.padded, 8, 32);
  const int64_t most = std::max<int64_t>(rows / a.group, 1);
  for (int64_t request = 0; request < requests; ++request) {
    const int64_t queries = start[request + 1] - start[request], past = length[request] - queries;
    for (int64_t q = 0; q < queries; q += most) {
      const int64_t count = std::min(most, queries - q);
      const int64_t begin = a.window > 0 ? std::max<int64_t>(past + q - a.window + 1, 0) : 0;
      for (int64_t head = 0; head < a.kv_heads; ++head)
        tiles.push_back({request, head, start[request] + q, count, past + q, begin, past + q + count});
    }
  }
  return tiles;
}

// Cuts tiles at partition borders if there are too few of them for the threads; dearest pieces first.
std::vector<Piece> cut_pieces(const Attention& a, const std::vector<Tile>& tiles, std::unique_ptr<float[]>& parts) {
  std::vector<Piece> pieces;
  const bool cut = int64_t(tiles.size()) < 4 * at::get_num_threads();
  size_t floats = 0;
  for (size_t i = 0; i < tiles.size(); ++i) {
    const Tile& tile = tiles[i];
    const bool whole = !cut || tile.end <= next_border(tile.begin);
    for (int64_t begin = tile.begin; begin < tile.end;) {
      const int64_t end = whole ? tile.end : std::min(tile.end, next_border(begin));
      // Reading a chunk of K and V costs about as much as the products of four rows.
      pieces.push_back({int64_t(i), begin, end, (end - begin) * a.padded * (a.rows(tile) + 4), nullptr});
      if (!whole) floats += Sums::floats(a.rows(tile), a.padded);
      begin = end;
    }
  }
  parts.reset(new float[floats]);
  float* next = parts.get();
  for (auto& piece : pieces) {
    const Tile& tile = tiles[piece.tile];
    if (piece.begin == tile.begin && piece.end == tile.end) continue;
    piece.sums = next;
    next += Sums::floats(a.rows(tile), a.padded);
  }
  return pieces;
}

// Threads take `run` neighbouring pieces from the front until none is left; work(i, first that is not its run's, scratch).
template <class Work>
void share_out(int64_t pieces, int64_t run, int64_t threads, const Work& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(threads, pieces), 1, [&](int64_t, int64_t) {
    Scratch scratch;
    for (int64_t first = next.fetch_add(run); first < pieces; first = next.fetch_add(run))
      for (int64_t i = first; i < std::min(first + run, pieces); ++i) work(i, first + run, scratch);
  });
}

template <class Q>
void run(const Attention& a, const at::Tensor& query, const Cache& cache, const std::vector<Tile>& tiles, at::Tensor& out) {
  std::unique_ptr<float[]> parts;
  const auto pieces = cut_pieces(a, tiles, parts);
  std::vector<int64_t> order(pieces.size());
  int64_t total = 0;
  for (size_t i = 0; i < pieces.size(); ++i) order[i] = i, total += pieces[i].cost;
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return pieces[x].cost > pieces[y].cost; });

  const int64_t threads = total > SMALL ? at::get_num_threads() : 1;
  // The KV heads of a request lie side by side in memory, so one core reads them best: what the hardware fetches of one
  // head's neighbours is the next head's.
  const int64_t count = pieces.size(), run = count >= 4 * threads * a.kv_heads ? a.kv_heads : 1;
  share_out(count, run, threads, [&](int64_t i, int64_t end, Scratch& scratch) {
    const int64_t following = i + 1 < end ? i + 1 : i + 1 + (threads - 1) * run;  // most likely this thread's next piece
    const Piece* next = following < count ? &pieces[order[following]] : nullptr;
    scratch.next = next ? &tiles[next->tile] : nullptr;
    scratch.next_begin = next ? next->begin : 0;
    const Piece& piece = pieces[order[i]];
    const Tile& tile = tiles[piece.tile];
    const int64_t rows = a.rows(tile);
    scratch.reserve(rows, a.padded);
    load_query<Q>(a, tile, query, scratch.query.data());
    if (piece.sums) {
      Sums sums(piece.sums, rows, a.padded);
      return cache.attend_to(a, tile, cache, piece.begin, piece.end, scratch, sums);
    }
    Sums all(scratch.all.data(), rows, a.padded), part(scratch.partition.data(), rows, a.padded);
    all.clear(rows, a.padded);
    for (int64_t begin = tile.begin; begin < tile.end; begin = next_border(begin)) {
      cache.attend_to(a, tile, cache, begin, std::min(next_border(begin), tile.end), scratch, part);
      merge(a, rows, part, all);
    }
    store_output<Q>(a, tile, all, out);
  });

  std::vector<float> memory;
  for (size_t i = 0; i < pieces.size();) {  // merge the tiles that were cut
    const Tile& tile = tiles[pieces[i].tile];
    const int64_t tile_index = pieces[i].tile, rows = a.rows(tile);
    const bool was_cut = pieces[i].sums;
    memory.resize(Sums::floats(rows, a.padded));
    Sums all(memory.data(), rows, a.padded);
    if (was_cut) all.clear(rows, a.padded);
    for (; i < pieces.size() && pieces[i].tile == tile_index; ++i)
      if (was_cut) merge(a, rows, Sums(pieces[i].sums, rows, a.padded), all);
    if (was_cut) store_output<Q>(a, tile, all, out);
  }
}

void check(
    const at::Tensor& query, const at::Tensor& key_pool, const at::Tensor& value_pool, const at::Tensor& query_start,
    const at::Tensor& kv_length, const at::Tensor& block_table, int64_t window) {
  TORCH_CHECK_VALUE(query.dim() == 3, "paged_attention: query [T, heads, dim] expected, got ", query.sizes());
  const Pages pages(key_pool, "key_pool"), value_pages(value_pool, "value_pool");
  TORCH_CHECK_VALUE(
      key_pool.sizes() == value_pool.sizes() && key_pool.scalar_type() == value_pool.scalar_type(),
      "paged_attention: key and value pool differ: ", key_pool.scalar_type(), " ", key_pool.sizes(), " and ",
      value_pool.scalar_type(), " ", value_pool.sizes());
  TORCH_CHECK_VALUE(
      pages.heads > 0 && query.size(1) % pages.heads == 0 && query.size(2) == pages.dim, "paged_attention: ", query.size(1),
      " heads of ", query.size(2), " do not fit ", pages.heads, " KV heads of ", pages.dim);
  const int64_t requests = kv_length.numel();
  const auto indices = [](const at::Tensor& t) { return t.scalar_type() == at::kInt && (t.numel() == 0 || t.stride(-1) == 1); };
  TORCH_CHECK_VALUE(
      indices(query_start) && indices(kv_length) && indices(block_table) && query_start.dim() == 1 &&
          query_start.size(0) == requests + 1 && block_table.dim() == 2 && block_table.size(0) == requests,
      "paged_attention: int32 query_start [R + 1], kv_length [R], block_table [R, pages] expected, got ",
      query_start.sizes(), ", ", kv_length.sizes(), ", ", block_table.sizes());
  const int32_t *start = query_start.const_data_ptr<int32_t>(), *length = kv_length.const_data_ptr<int32_t>();
  for (int64_t r = 0; r < requests; ++r) {
    const int64_t queries = start[r + 1] - start[r], used = (length[r] + pages.page_size - 1) / pages.page_size;
    TORCH_CHECK_VALUE(
        start[r] >= 0 && queries >= 0 && start[r + 1] <= query.size(0) && queries <= length[r] && used <= block_table.size(1),
        "paged_attention: request ", r, " has queries [", start[r], ", ", start[r + 1], ") of ", query.size(0), " and ",
        length[r], " keys in ", block_table.size(1), " pages of ", pages.page_size);
    const int32_t* table = block_table.const_data_ptr<int32_t>() + r * block_table.stride(0);
    const int64_t seen = window > 0 ? std::max<int64_t>(length[r] - queries - window + 1, 0) / pages.page_size : 0;
    for (int64_t p = seen; p < used; ++p)
      TORCH_CHECK_VALUE(
          table[p] >= 0 && table[p] < key_pool.size(0), "paged_attention: request ", r, " names page ", table[p], " of ",
          key_pool.size(0));
  }
}

at::Tensor paged_attention(
    const at::Tensor& query, const at::Tensor& key_pool, const at::Tensor& value_pool, const at::Tensor& query_start,
    const at::Tensor& kv_length, const at::Tensor& block_table, double scale, int64_t window, double softcap) {
  check(query, key_pool, value_pool, query_start, kv_length, block_table, window);
  const auto rows = inner_contiguous(query);
  at::Tensor out = at::empty(query.sizes(), query.options());
  const int32_t* start = query_start.const_data_ptr<int32_t>();
  const int64_t requests = kv_length.numel();
  out.narrow(0, 0, start[0]).zero_();  // rows of no request: padding
  out.narrow(0, start[requests], query.size(0) - start[requests]).zero_();
  const int64_t kv_heads = key_pool.size(2), dim = query.size(2);
  const Attention attention{
      query.size(1), kv_heads, query.size(1) / kv_heads, dim, (dim + STEP - 1) / STEP * STEP, float(scale), float(softcap),
      window, block_table.const_data_ptr<int32_t>(), block_table.stride(0)};
  const auto tiles = cut_tiles(attention, start, kv_length.const_data_ptr<int32_t>(), requests);
  const Cache cache(key_pool, value_pool);
  with_float(query.scalar_type(), "query", [&](auto* type) {
    run<std::remove_pointer_t<decltype(type)>>(attention, rows, cache, tiles, out);
  });
  return out;
}

at::Tensor paged_attention_meta(
    const at::Tensor& query, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
    double, int64_t, double) {
  return at::empty_symint(query.sym_sizes(), query.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(polyrank, m) {
  m.def(
      "paged_attention(Tensor query, Tensor key_pool, Tensor value_pool, Tensor query_start, Tensor kv_length, "
      "Tensor block_table, float scale, int window=0, float softcap=0.0) -> Tensor");
}
TORCH_LIBRARY_IMPL(polyrank, CPU, m) { m.impl("paged_attention", paged_attention); }
TORCH_LIBRARY_IMPL(polyrank, Meta, m) { m.impl("paged_attention", paged_attention_meta); }

}  // namespace polyrank
