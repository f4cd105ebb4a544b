// h = g * h, between shrink and expand: each row keeps the k ranks of the largest scores.
//
// In float32 whatever the types are. A row's choice and factors are made from its own numbers, in the order of the ranks.
#pragma once

#include <limits>

#include "factors.h"
#include "pool.h"
#include "segments.h"
#include "split.h"
#include "unrolled.h"

namespace polyrank {

enum GateField { ROUTER, BIAS, ROWS, DTYPE, RANK, ACTIVE, COUNTS, GATE_FIELDS };  // kernels.segments.GateField

constexpr int64_t GATE_COST = 64;  // of a rank of a row, in the bytes of split.h
constexpr int TOGETHER = 4;         // vectors of ranks whose places are counted at once

struct Gate {
  int64_t router_rows = 0;  // 0: none
  int64_t type;             // of the router
  int64_t active;
  const void* router;       // [router_rows, in]
  const float* bias;        // [rank] or null
  int64_t* counts;          // [rank] or null
  float* scores;            // [rows, router_rows]: first router x, then its sigmoid
  int32_t* chosen;          // [rows, active], ascending
};

inline Gate read_gate(const int64_t* record, const Segment& segment, int64_t in, const Pool& pool) {
  Gate gate;
  if (!segment.rank || !record[ROWS]) return gate;
  gate.router_rows = record[ROWS];
  gate.type = record[DTYPE];
  gate.active = record[ACTIVE];
  TORCH_CHECK_VALUE(
      record[RANK] == segment.rank && gate.router_rows > 0 && segment.rank % gate.router_rows == 0 && gate.active > 0 &&
          gate.active <= segment.rank,
      "a gate of rank ", record[RANK], ", ", gate.router_rows, " router rows, ", gate.active, " active ranks does not fit rank ",
      segment.rank);
  TORCH_CHECK_VALUE(gate.type >= 0 && gate.type < 3, "router type ", gate.type, " is no floating type");
  gate.router = pool.block(record[ROUTER], factor_bytes(gate.type, gate.router_rows, in), "ROUTER");
  gate.bias = pool.floats(record[BIAS], segment.rank, "gate BIAS");
  TORCH_CHECK_VALUE(record[COUNTS] < 0 || record[COUNTS] % 8 == 0, "block COUNTS at ", record[COUNTS], " is not aligned");
  gate.counts = record[COUNTS] < 0
      ? nullptr
      : static_cast<int64_t*>(const_cast<void*>(pool.block(record[COUNTS], 8 * segment.rank, "COUNTS")));
  return gate;
}

// What belongs to a step's gates; scores and choices of all rows in two allocations.
struct Gates {
  std::vector<Gate> list;  // of each segment
  std::unique_ptr<float[]> scores;
  std::unique_ptr<int32_t[]> chosen;
};

inline Gates resolve_gates(const Segments& segments, const at::Tensor& table, int64_t slots, int64_t in, const Pool& pool) {
  TORCH_CHECK_VALUE(
      table.dim() == 2 && table.scalar_type() == at::kLong && table.size(0) == slots && table.size(1) == GATE_FIELDS &&
          table.stride(1) == 1,
      "gates: int64 [", slots, ", ", int64_t(GATE_FIELDS), "] expected, got ", table.scalar_type(), " ", table.sizes());
  Gates gates;
  int64_t floats = 0, choices = 0;
  for (const auto& segment : segments.list) {
    const int64_t* record = table.const_data_ptr<int64_t>() + segment.slot * table.stride(0);
    const Gate& gate = gates.list.emplace_back(read_gate(record, segment, in, pool));
    if (!gate.router_rows) continue;
    floats += segment.rows() * gate.router_rows;
    choices += segment.rows() * gate.active;
  }
  gates.scores.reset(new float[floats]);
  gates.chosen.reset(new int32_t[choices]);
  float* scores = gates.scores.get();
  int32_t* chosen = gates.chosen.get();
  for (size_t i = 0; i < gates.list.size(); ++i) {
    Gate& gate = gates.list[i];
    if (!gate.router_rows) continue;
    gate.scores = scores;
    gate.chosen = chosen;
    scores += segments.list[i].rows() * gate.router_rows;
    chosen += segments.list[i].rows() * gate.active;
  }
  return gates;
}

inline void sigmoid(float* values, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    const int64_t valid = std::min(n - i, LANES);
    const Vec power = Vec::loadu(values + i, valid).neg().exp();
    (Vec(1.0f) / (Vec(1.0f) + power)).store(values + i, valid);
  }
}

// sum + 1 in the lanes where a > b, or a >= b.
template <bool OR_EQUAL>
inline Vec count(const Vec& sum, const Vec& a, const Vec& b) {
#if defined(CPU_CAPABILITY_AVX512)  // at::vec makes four instructions of it
  const __mmask16 where = _mm512_cmp_ps_mask(a, b, OR_EQUAL ? _CMP_GE_OQ : _CMP_GT_OQ);
  return Vec(_mm512_mask_add_ps(sum, where, sum, _mm512_set1_ps(1.0f)));
#else
  return sum + (OR_EQUAL ? a.ge(b) : a.gt(b));
#endif
}

// The same, a being lane `lane` of the vector whose other lanes b holds: an equal one behind it counts.
inline Vec count_around(const Vec& sum, const Vec& a, const Vec& b, int64_t lane) {
#if defined(CPU_CAPABILITY_AVX512)
  const __mmask16 behind = 0xfffe << lane;
  const __mmask16 where = _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) | _mm512_mask_cmp_ps_mask(behind, a, b, _CMP_EQ_OQ);
  return Vec(_mm512_mask_add_ps(sum, where, sum, _mm512_set1_ps(1.0f)));
#else
  return sum + a.gt(b) + a.eq(b) * Vec(float(lane)).lt(Vec::arange(0.0f, 1.0f));
#endif
}

// ahead[i]: how many ranks go before rank i, for N vectors of them from `first` on.
template <int N>
inline void places_of(const float* z, int64_t rank, int64_t first, float* ahead) {
  Vec own[N], sums[N];
  unrolled<N>([&](auto n) {
    own[n] = Vec::loadu(z + first + n * LANES);
    sums[n] = Vec(0.0f);
  });
  for (int64_t j = 0; j < first; ++j) unrolled<N>([&](auto n) { sums[n] = count<true>(sums[n], Vec(z[j]), own[n]); });
  unrolled<N>([&](auto piece) {
    constexpr int PIECE = decltype(piece)::value;
    for (int64_t lane = 0; lane < LANES; ++lane) {
      const Vec other(z[first + PIECE * LANES + lane]);
      unrolled<N>([&](auto n) {
        constexpr int AT = decltype(n)::value;
        if constexpr (AT == PIECE) {
          sums[AT] = count_around(sums[AT], other, own[AT], lane);
        } else {
          sums[AT] = count<(AT > PIECE)>(sums[AT], other, own[AT]);
        }
      });
    }
  });
  for (int64_t j = first + N * LANES; j < rank; ++j)
    unrolled<N>([&](auto n) { sums[n] = count<false>(sums[n], Vec(z[j]), own[n]); });
  unrolled<N>([&](auto n) { sums[n].store(ahead + first + n * LANES); });
}

// Ranks of a larger score go before, and of equal ones the lower. Counted, not sorted: the gate of a row of 64 ranks takes
// 0.5 us, with std::nth_element 0.95 (2-core AVX-512 VM, 2026-11-26). Both arrays are filled up to whole vectors.
inline void places(const float* z, int64_t rank, float* ahead) {
  for (int64_t first = 0; first < rank; first += TOGETHER * LANES) {
    const int64_t vectors = (rank - first + LANES - 1) / LANES;
    with_constant<TOGETHER>(std::min<int64_t>(vectors, TOGETHER), [&](auto n) { places_of<n>(z, rank, first, ahead); });
  }
}

struct Scratch {
  std::vector<float> z, ahead;
  std::vector<int32_t> chosen;

  explicit Scratch(int64_t rank)
      : z((rank + LANES - 1) / LANES * LANES, -std::numeric_limits<float>::infinity()), ahead(z.size()), chosen(rank + 1) {}
};

inline void gate_row(const Segment& segment, const Gate& gate, int64_t row, Scratch& scratch) {
  const int64_t rank = segment.rank, active = gate.active, share = rank / gate.router_rows;
  float* hidden = segment.hidden + row * rank;
  float* scores = gate.scores + row * gate.router_rows;
  float* z = scratch.z.data();
  sigmoid(scores, gate.router_rows);
  for (int64_t q = 0, of_row = 0; q < rank; ++of_row)
    for (int64_t end = q + share; q < end; ++q) {
      const float score = scores[of_row] + (gate.bias ? gate.bias[q] : 0.0f);
      z[q] = score == score ? score : std::numeric_limits<float>::infinity();  // as torch sorts; its share becomes NaN
    }
  places(z, rank, scratch.ahead.data());
  int32_t* chosen = scratch.chosen.data();
  for (int64_t q = 0, i = 0; q < rank; ++q) {
    chosen[i] = q;
    i += scratch.ahead[q] < float(active);
  }
  float total = 0.0f;
  for (int64_t i = 0; i < active; ++i) total += z[chosen[i]];
  for (int64_t i = 0; i < active; ++i) z[chosen[i]] = hidden[chosen[i]] * (float(active) * z[chosen[i]] / total);
  std::fill_n(hidden, rank, 0.0f);
  for (int64_t i = 0; i < active; ++i) hidden[chosen[i]] = z[chosen[i]];
  std::copy_n(chosen, active, gate.chosen + row * active);
}

// Whether an expansion that reads only the active ranks of each row is faster than one of all ranks for all rows at once.
// Both give the same bits. Microseconds of a whole call, 576 x 1536 in bfloat16, gathered / not (one thread, 2-core AVX-512
// VM, 2026-11-26; 576 x 576 and 1536 x 576 cross at the same places):
//   rows              1          2          4          8          16         32          64
//   k =  8, r = 64    8.7/17.6   11.8/18.1  16.4/22.1  26.8/33.4  55.3/71.3  109/146
//   k = 21, r = 64    12.1/17.2  15.4/18.0  21.4/21.9  37.0/35.2  75.2/72.0  146/150
//   k = 32, r = 64    14.0/17.7  17.6/18.1  24.8/22.0  44.6/36.3  91.7/74.2  187/160
//   k =  2, r = 16    4.4/5.3    5.5/6.2    6.8/7.9    9.4/11.3   16.0/19.4  28.6/39.4   59.2/80.1
inline bool gathers(const Segment& segment, int64_t active) {
  if (segment.core || active == segment.rank) return false;
  return 3 * active <= segment.rank || segment.rows() <= 2;
}

// Gates every row of the segments that have a gate, and counts the choices. gates: of each segment.
inline void apply_gates(Segments& segments, const std::vector<Gate>& gates) {
  std::vector<Share> shares;
  for (size_t i = 0; i < gates.size(); ++i) {
    const Segment& segment = segments.list[i];
    shares.push_back({gates[i].router_rows ? segment.rows() : 0, std::max<int64_t>(GATE_COST * segment.rank, 1)});
  }
  split_by_cost(shares, [&](int64_t i, int64_t first, int64_t last) {
    Scratch scratch(segments.list[i].rank);
    for (int64_t row = first; row < last; ++row) gate_row(segments.list[i], gates[i], row, scratch);
  });
  for (size_t i = 0; i < gates.size(); ++i) {  // on one thread: segments may share a slot
    const Gate& gate = gates[i];
    Segment& segment = segments.list[i];
    if (!gate.router_rows) continue;
    if (gate.counts)
      for (int64_t n = 0; n < segment.rows() * gate.active; ++n) ++gate.counts[gate.chosen[n]];
    if (gathers(segment, gate.active)) {
      segment.active = gate.chosen;
      segment.chosen = gate.active;
    }
  }
}

}  // namespace polyrank
