// y[t] += w * (B (C (d * A[:, ids[t]])) + bias), in place. Meaning: kernels/reference.py.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "core.h"
#include "expand.h"

namespace polyrank {
namespace {

// hidden = d * (the row of A transposed that belongs to the token's id).
void gather(const Segments& segments, const int64_t* ids) {
  for (const auto& segment : segments.list) {
    with_factor(segment.type, [&](auto* factor_type) {
      using F = std::remove_pointer_t<decltype(factor_type)>;
      if constexpr (!std::is_same_v<F, Int4>) {  // which `resolve` refuses
        const F* a = static_cast<const F*>(segment.left);
        for (int64_t i = 0; i < segment.rows(); ++i) {
          const F* row = a + ids[segments.entries[segment.first + i].row] * segment.rank;
          float* hidden = segment.hidden + i * segment.rank;
          for (int64_t q = 0; q < segment.rank; ++q) hidden[q] = static_cast<float>(row[q]) * segment.d[q];
        }
      }
    });
  }
}

void lowrank_embedding_(
    at::Tensor& y, const at::Tensor& ids, const at::Tensor& pool, const at::Tensor& records, const at::Tensor& slot,
    const at::Tensor& start, const at::Tensor& token, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(
      y.dim() == 2 && ids.dim() == 1 && y.size(0) == ids.size(0) && ids.scalar_type() == at::kLong,
      "lowrank_embedding: y [T, dim] and int64 ids [T] expected, got ", y.sizes(), " and ", ids.scalar_type(), " ",
      ids.sizes());
  const auto contiguous = ids.contiguous();
  const int64_t* id = contiguous.const_data_ptr<int64_t>();
  int64_t rows_of_a = 0;  // the records do not tell the vocabulary: A must reach as far as the ids do
  for (int64_t t = 0; t < ids.size(0); ++t) {
    TORCH_CHECK_VALUE(id[t] >= 0, "lowrank_embedding: id ", id[t], " is negative");
    rows_of_a = std::max(rows_of_a, id[t] + 1);
  }
  const auto segments = resolve(
      Use::EMBEDDING, y.size(0), rows_of_a, y.size(1), pool, records, slot, start, token, weight);
  if (segments.list.empty()) return;
  gather(segments, id);
  apply_cores(segments);
  write_back(y, [&](at::Tensor& rows) { expand(segments, rows); });
}

void lowrank_embedding_meta(
    at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
    const at::Tensor&, const at::Tensor&) {}

}  // namespace

TORCH_LIBRARY_FRAGMENT(polyrank, m) {
  m.def(
      "lowrank_embedding_(Tensor(a!) y, Tensor ids, Tensor pool, Tensor records, Tensor slot, Tensor start, "
      "Tensor token, Tensor weight) -> ()");
}
TORCH_LIBRARY_IMPL(polyrank, CPU, m) { m.impl("lowrank_embedding_", lowrank_embedding_); }
TORCH_LIBRARY_IMPL(polyrank, Meta, m) { m.impl("lowrank_embedding_", lowrank_embedding_meta); }

}  // namespace polyrank
