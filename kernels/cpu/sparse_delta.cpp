// y[t] += w * (S x[t]), and of an embedding y[t] += w * S[ids[t]], in place. Meaning: kernels/reference_forms.py.
//
// Every output is one sum in the order of its columns, for one row as for a vector of rows. Columns are not looked at
// before they are used: the door takes what was checked when the adapter was loaded.
#include <torch/library.h>

#include <cmath>

#include "forms.h"

namespace polyrank {
namespace {

struct Sparse {
  const int32_t *start, *column;
  const float* value;
  int64_t rows, count;
};

constexpr int64_t COST = sizeof(int32_t) + sizeof(float);  // of a number of S, for each tile of rows

Sparse read_sparse(const int64_t* form, const Pool& pool) {
  const int64_t rows = form[SPARSE_ROWS], count = form[SPARSE_COUNT];
  TORCH_CHECK_VALUE(rows > 0 && count >= 0, "a sparse delta of ", rows, " rows and ", count, " numbers");
  const Sparse sparse{
      static_cast<const int32_t*>(pool.block(form[SPARSE_START], 4 * (rows + 1), "SPARSE_START")),
      static_cast<const int32_t*>(pool.block(form[SPARSE_COLUMN], 4 * count, "SPARSE_COLUMN")),
      static_cast<const float*>(pool.block(form[SPARSE_VALUE], 4 * count, "SPARSE_VALUE")), rows, count};
  TORCH_CHECK_VALUE(sparse.start[0] == 0 && sparse.start[rows] == count, "SPARSE_START does not end at ", count);
  return sparse;
}

// The outputs whose numbers begin in [first, last), of one row.
void multiply_row(const Sparse& sparse, const float* x, float* hidden, int64_t first, int64_t last) {
  for (int64_t j = first; j < last; ++j) {
    float sum = 0.0f;
    for (int64_t k = sparse.start[j]; k < sparse.start[j + 1]; ++k) sum = std::fma(sparse.value[k], x[sparse.column[k]], sum);
    hidden[j] = sum;
  }
}

// The same of `count` rows, a lane each. x: [in, LANES].
void multiply_rows(
    const Sparse& sparse, const float* x, float* hidden, int64_t count, int64_t stride, int64_t first, int64_t last) {
  for (int64_t j = first; j < last; ++j) {
    Vec sum(0.0f);
    for (int64_t k = sparse.start[j]; k < sparse.start[j + 1]; ++k)
      sum = at::vec::fmadd(Vec(sparse.value[k]), Vec::loadu(x + sparse.column[k] * LANES), sum);
    float lanes[LANES];
    sum.store(lanes);
    for (int64_t r = 0; r < count; ++r) hidden[r * stride + j] = lanes[r];
  }
}

template <class X>
void multiply(
    const Segment& segment, const Sparse& sparse, const Entry* entries, const X* x, int64_t stride, int64_t in, int64_t first,
    int64_t last) {
  std::vector<float> scratch(in * (segment.rows() == 1 ? 1 : LANES + 1));
  for (int64_t begin = 0; begin < segment.rows(); begin += LANES) {
    const int64_t count = std::min(LANES, segment.rows() - begin);
    float* hidden = segment.hidden + begin * segment.rank;
    const auto row = [&](int64_t r, float* to) {
      return float_row(x + entries[segment.first + begin + r].row * stride, in, to);
    };
    if (count == 1) {
      multiply_row(sparse, row(0, scratch.data()), hidden, first, last);
      continue;
    }
    float* turned = scratch.data() + in;
    for (int64_t r = 0; r < count; ++r) {
      const float* own = row(r, scratch.data());
      for (int64_t i = 0; i < in; ++i) turned[i * LANES + r] = own[i];
    }
    multiply_rows(sparse, turned, hidden, count, segment.rank, first, last);
  }
}

void sparse_delta_(
    at::Tensor& y, const at::Tensor& x, const at::Tensor& pool, const at::Tensor& forms, const at::Tensor& slot,
    const at::Tensor& start, const at::Tensor& token, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(
      y.dim() == 2 && x.dim() == 2 && y.size(0) == x.size(0), "sparse_delta: y [T, out] and x [T, in] expected, got ",
      y.sizes(), " and ", x.sizes());
  const Step step{pool, forms, slot, start, token, weight};
  const auto segments = step.resolve(y.size(0), y.size(1), [&](const int64_t* form, Segment& segment) {
    if (!form[SPARSE_ROWS]) return false;
    check_rows(form[SPARSE_ROWS], "SPARSE_ROWS", y.size(1));
    segment.left = form;
    segment.rank = y.size(1);
    return true;
  });
  if (segments.list.empty()) return;
  const Pool bytes(pool);
  std::vector<Sparse> found;
  std::vector<Share> shares;
  for (const auto& segment : segments.list) {
    found.push_back(read_sparse(static_cast<const int64_t*>(segment.left), bytes));
    // A unit is a number of S, or one of the outputs, whose sum begins and ends: so that empty ones are written too.
    shares.push_back({found.back().count + segment.rank, COST * ((segment.rows() + LANES - 1) / LANES)});
  }
  const at::Tensor rows = inner_contiguous(x);
  with_float(x.scalar_type(), "x", [&](auto* x_type) {
    const auto* values = rows.const_data_ptr<std::remove_pointer_t<decltype(x_type)>>();
    split_by_cost(shares, [&](int64_t i, int64_t first, int64_t last) {
      const Sparse& sparse = found[i];
      const auto output_at = [&](int64_t unit) {  // the first output whose units begin there or behind
        int64_t low = 0, high = sparse.rows;
        while (low < high) {
          const int64_t middle = (low + high) / 2;
          if (sparse.start[middle] + middle < unit) low = middle + 1; else high = middle;
        }
        return low;
      };
      multiply(
          segments.list[i], sparse, segments.entries.data(), values, rows.stride(0), x.size(1), output_at(first),
          output_at(last));
    });
  });
  add_changes(segments, y);
}

void sparse_embedding_(
    at::Tensor& y, const at::Tensor& ids, const at::Tensor& pool, const at::Tensor& forms, const at::Tensor& slot,
    const at::Tensor& start, const at::Tensor& token, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(
      y.dim() == 2 && ids.dim() == 1 && y.size(0) == ids.size(0) && ids.scalar_type() == at::kLong,
      "sparse_embedding: y [T, dim] and int64 ids [T] expected, got ", y.sizes(), " and ", ids.scalar_type(), " ",
      ids.sizes());
  const int64_t out = y.size(1);
  const Step step{pool, forms, slot, start, token, weight};
  const auto segments = step.resolve(y.size(0), out, [&](const int64_t* form, Segment& segment) {
    segment.left = form;
    segment.rank = out;
    return form[SPARSE_ROWS] != 0;
  });
  const Pool bytes(pool);
  const auto contiguous = ids.contiguous();
  const int64_t* id = contiguous.const_data_ptr<int64_t>();
  for (const auto& segment : segments.list) {
    const Sparse sparse = read_sparse(static_cast<const int64_t*>(segment.left), bytes);
    std::fill_n(segment.hidden, segment.rows() * out, 0.0f);
    for (int64_t i = 0; i < segment.rows(); ++i) {
      const int64_t row = id[segments.entries[segment.first + i].row];
      TORCH_CHECK_VALUE(row >= 0 && row < sparse.rows, "sparse_embedding: id ", row, " lies outside 0 to ", sparse.rows - 1);
      for (int64_t k = sparse.start[row]; k < sparse.start[row + 1]; ++k) {
        const int64_t column = sparse.column[k];
        TORCH_CHECK_VALUE(column >= 0 && column < out, "sparse_embedding: column ", column, " lies outside ", out);
        segment.hidden[i * out + column] = sparse.value[k];
      }
    }
  }
  if (!segments.list.empty()) add_changes(segments, y);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(polyrank, m) {
  m.def(
      "sparse_delta_(Tensor(a!) y, Tensor x, Tensor pool, Tensor forms, Tensor slot, Tensor start, Tensor token, "
      "Tensor weight) -> ()");
  m.def(
      "sparse_embedding_(Tensor(a!) y, Tensor ids, Tensor pool, Tensor forms, Tensor slot, Tensor start, Tensor token, "
      "Tensor weight) -> ()");
}
TORCH_LIBRARY_IMPL(polyrank, CPU, m) {
  m.impl("sparse_delta_", sparse_delta_);
  m.impl("sparse_embedding_", sparse_embedding_);
}

}  // namespace polyrank
