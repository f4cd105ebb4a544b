#include "segments.h"

#include <ATen/Parallel.h>

#include "pool.h"

namespace polyrank {
namespace {

enum Field { A, B, D, BIAS, RANK, DTYPE, WEIGHT, WEIGHT_BIAS, CORE, RECORD_FIELDS };  // kernels.segments.Field

void check_vector(const at::Tensor& tensor, const char* name, at::ScalarType type, int64_t size) {
  TORCH_CHECK_VALUE(
      tensor.dim() == 1 && tensor.scalar_type() == type && tensor.size(0) == size && tensor.is_contiguous(), name,
      ": contiguous ", type, " [", size, "] expected, got ", tensor.scalar_type(), " ", tensor.sizes());
}

Segment read_record(Use use, const int64_t* record, int64_t in, int64_t out, const Pool& pool) {
  Segment segment{};
  segment.type = record[DTYPE];
  TORCH_CHECK_VALUE(segment.type >= 0 && segment.type <= INT4, "factor type ", segment.type, " is unknown");
  const auto factor = [&](int64_t offset, int64_t rows, int64_t columns, const char* name) {
    return pool.block(offset, factor_bytes(segment.type, rows, columns), name);
  };
  if (use == Use::REPLACE) {
    segment.rank = record[WEIGHT] < 0 ? 0 : out;
    segment.bias = pool.floats(record[WEIGHT_BIAS], out, "WEIGHT_BIAS");
    TORCH_CHECK_VALUE(!segment.rank || segment.type != 3, "a replacement weight of int8 would have no scales");
    TORCH_CHECK_VALUE(!segment.rank || segment.type != INT4, "a replacement weight of 4-bit numbers is not possible");
    if (segment.rank) segment.left = factor(record[WEIGHT], out, in, "WEIGHT");
    return segment;
  }
  segment.rank = record[RANK];
  TORCH_CHECK_VALUE(segment.rank >= 0, "rank ", segment.rank, " is negative");
  segment.bias = pool.floats(record[BIAS], out, "BIAS");
  if (segment.rank) {
    TORCH_CHECK_VALUE(
        use != Use::EMBEDDING || segment.type != INT4, "an embedding's A of 4-bit numbers is not possible");
    segment.left = factor(record[A], segment.rank, in, "A");
    segment.right = factor(record[B], segment.rank, out, "B");
    segment.d = static_cast<const float*>(pool.block(record[D], 4 * segment.rank, "D"));
    segment.core = pool.floats(record[CORE], segment.rank * segment.rank, "CORE");
  }
  return segment;
}

void fill_entries(Segments& segments, int64_t rows, int64_t out, const int32_t* token, const float* weight) {
  constexpr int32_t UNSEEN = -1;
  std::vector<int32_t> seen(rows, UNSEEN);  // the row's latest entry
  int32_t shared = 0;
  for (auto& segment : segments.list) {
    const int64_t begin = segments.entries.size();
    for (int64_t i = segment.first; i < segment.last; ++i) {
      const int32_t row = token[i];
      TORCH_CHECK_VALUE(row >= 0 && row < rows, "token ", row, " lies outside the ", rows, " rows of y");
      Entry entry{row, -1, weight[i], true, true};
      if (seen[row] != UNSEEN) {
        Entry& before = segments.entries[seen[row]];
        if (before.partial < 0) before.partial = shared++;
        before.last = false;
        entry.partial = before.partial;
        entry.first = false;
      }
      seen[row] = segments.entries.size();
      segments.entries.push_back(entry);
    }
    segment.first = begin;
    segment.last = segments.entries.size();
  }
  if (shared) segments.partial.reset(new float[shared * out]);
}

// From so many tiles on it pays to widen factors to floats once and not once a tile, up to so many ranks.
constexpr int64_t WIDE_TILES = 4, WIDE_RANK = 256;

}  // namespace

bool has_many(const Segment& segment) {
  return segment.rank <= WIDE_RANK && segment.tiles() >= std::max<int64_t>(WIDE_TILES, at::get_num_threads());
}

void check_pool(const at::Tensor& pool) {
  TORCH_CHECK_VALUE(
      pool.scalar_type() == at::kByte && pool.is_contiguous(), "pool: contiguous uint8 expected, got ", pool.scalar_type());
}

Segments resolve_step(
    int64_t rows, int64_t columns, const at::Tensor& records, const char* name, int64_t width, const at::Tensor& slot,
    const at::Tensor& start, const at::Tensor& token, const at::Tensor& weight, const Read& read) {
  const int64_t count = slot.numel();
  TORCH_CHECK_VALUE(
      records.dim() == 2 && records.scalar_type() == at::kLong && records.size(1) == width && records.stride(1) == 1, name,
      ": int64 [slots, ", width, "] expected, got ", records.scalar_type(), " ", records.sizes());
  check_vector(slot, "slot", at::kInt, count);
  check_vector(start, "start", at::kInt, count + 1);
  check_vector(token, "token", at::kInt, token.numel());
  check_vector(weight, "weight", at::kFloat, token.numel());

  const int64_t* table = records.const_data_ptr<int64_t>();
  const int32_t* slots = slot.const_data_ptr<int32_t>();
  const int32_t* starts = start.const_data_ptr<int32_t>();
  Segments segments;
  segments.list.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(
        slots[i] >= 0 && slots[i] < records.size(0), "slot ", slots[i], " lies outside the ", records.size(0), " ", name);
    TORCH_CHECK_VALUE(
        starts[i] >= 0 && starts[i] <= starts[i + 1] && starts[i + 1] <= token.numel(), "segment ", i, " spans [",
        starts[i], ", ", starts[i + 1], ") of ", token.numel(), " tokens");
    Segment segment{};
    const bool does_something = read(table + slots[i] * records.stride(0), segment);
    segment.slot = slots[i];
    segment.first = starts[i];
    segment.last = starts[i + 1];
    segment.many = has_many(segment);
    if (segment.rows() && does_something) segments.list.push_back(segment);
  }
  segments.entries.reserve(token.numel());
  fill_entries(segments, rows, columns, token.const_data_ptr<int32_t>(), weight.const_data_ptr<float>());

  int64_t floats = 0;
  for (const auto& segment : segments.list) floats += segment.rows() * segment.rank;
  segments.hidden.reset(new float[floats]);
  float* hidden = segments.hidden.get();
  for (auto& segment : segments.list) {
    segment.hidden = hidden;
    hidden += segment.rows() * segment.rank;
  }
  return segments;
}

Segments resolve(
    Use use, int64_t rows, int64_t in, int64_t out, const at::Tensor& pool, const at::Tensor& records,
    const at::Tensor& slot, const at::Tensor& start, const at::Tensor& token, const at::Tensor& weight) {
  check_pool(pool);
  const Pool bytes(pool);
  return resolve_step(
      rows, out, records, "records", RECORD_FIELDS, slot, start, token, weight,
      [&](const int64_t* record, Segment& segment) {
        segment = read_record(use, record, in, out, bytes);
        return segment.rank != 0 || (use != Use::REPLACE && segment.bias);
      });
}

}  // namespace polyrank
