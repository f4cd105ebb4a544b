// Several 8-bit products of the same rows (query, key and value; gate and up) with the adapters of their rows: what
// `int8_linear` and then `lowrank_` make of each, to the bit.
//
// One call instead of up to six: the rows are rounded once, the step's segments are read once a module, and the threads
// meet twice. A step of 8 rows under 8 adapters takes 27.4 ms so instead of 30.1, without adapters 18.2 instead of 19.2
// (2-core AVX-512 VM, 2026-11-25).
//
// At most three products, in arguments of their own, and one output: lists of tensors are what Inductor's C++ code does
// not pass.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <deque>
#include <numeric>

#include "core.h"
#include "expand.h"
#include "int8_product.h"
#include "shrink.h"

namespace polyrank {
namespace {

// Columns of y that a thread makes at once: whole panels and whole pairs. 512 rows of them are 196 KB in floats.
constexpr int64_t STRIP = std::lcm<int64_t>(PANEL * BLOCK, EXPAND_UNIT / 2) * (LANES == 16 ? 1 : 4);

using Optional = c10::optional<at::Tensor>;

// One weight, and the records of the adapters on it.
struct Module {
  const at::Tensor &packed, &scale;
  const Optional& bias;
  const Optional& records;
};

// What the adapters of all modules share.
struct Step {
  const Optional &pool, &slot, &start, &token, &weight;
};

std::vector<Module> modules_of(
    const at::Tensor& packed, const at::Tensor& scale, const Optional& bias, const Optional& packed_1,
    const Optional& scale_1, const Optional& bias_1, const Optional& packed_2, const Optional& scale_2,
    const Optional& bias_2, const Optional& records, const Optional& records_1, const Optional& records_2) {
  TORCH_CHECK_VALUE(
      packed_1.has_value() == scale_1.has_value() && packed_2.has_value() == scale_2.has_value() && (packed_1 || !packed_2),
      "int8_linears: every weight needs a scale, and a third a second");
  std::vector<Module> modules{{packed, scale, bias, records}};
  if (packed_1) modules.push_back({*packed_1, *scale_1, bias_1, records_1});
  if (packed_2) modules.push_back({*packed_2, *scale_2, bias_2, records_2});
  return modules;
}

// The adapters of each module, or nothing at all.
std::deque<Segments> adapters_of(
    const at::Tensor& x, const std::vector<Module>& modules, const std::vector<at::Tensor>& ys, const Step& step) {
  std::deque<Segments> found;  // never moved: they are referred to
  if (!step.pool) return found;
  TORCH_CHECK_VALUE(
      step.slot && step.start && step.token && step.weight, "int8_linears: a pool without segments");
  for (size_t i = 0; i < modules.size(); ++i) {
    TORCH_CHECK_VALUE(modules[i].records, "int8_linears: weight ", i, " has no records of adapters");
    found.push_back(resolve(
        Use::LOWRANK, x.size(0), x.size(1), ys[i].size(1), *step.pool, *modules[i].records, *step.slot, *step.start,
        *step.token, *step.weight));
  }
  return found;
}

std::vector<Product> products_of(const std::vector<Module>& modules, const Rows& rows) {
  std::vector<Product> products;
  for (const auto& module : modules) products.emplace_back(module.packed, rows, module.scale, module.bias);
  return products;
}

// The left factors of all modules' segments: what they cost, and which they are.
struct LeftFactors {
  std::vector<std::pair<const Segments*, int64_t>> list;
  std::vector<Share> shares;

  LeftFactors(const std::deque<Segments>& adapters, int64_t in) {
    for (const auto& segments : adapters)
      for (size_t i = 0; i < segments.list.size(); ++i) {
        list.emplace_back(&segments, i);
        shares.push_back(shrink_share(segments.list[i], in));
      }
  }

  void run(const Input& x, int64_t i, int64_t first, int64_t last) const {
    shrink_units(*list[i].first, list[i].second, x, first, last);
  }
};

// Every thread takes its share of the weights and of the left factors: both need the rows alone.
template <class X>
void multiply_all(
    const Input& x, const std::vector<Product>& products, const LeftFactors& factors, std::vector<at::Tensor>& ys) {
  const int64_t count = products.size();
  std::vector<Share> shares;
  for (const auto& product : products) shares.push_back({product.blocks(), product.cost()});
  shares.insert(shares.end(), factors.shares.begin(), factors.shares.end());
  split_by_cost(shares, [&](int64_t i, int64_t first, int64_t last) {
    if (i < count) return multiply(products[i], ys[i].data_ptr<X>(), ys[i].stride(0), first, last);
    factors.run(x, i - count, first, last);
  });
}

void expand_all(const std::vector<Expansion>& expansions) {
  std::vector<std::pair<int64_t, int64_t>> parts;
  std::vector<Share> shares;
  for (size_t i = 0; i < expansions.size(); ++i) {
    const size_t before = shares.size();
    expansions[i].add_shares(shares);
    for (size_t part = before; part < shares.size(); ++part) parts.emplace_back(i, part - before);
  }
  split_by_cost(shares, [&](int64_t i, int64_t first, int64_t last) {
    expansions[parts[i].first].run(parts[i].second, first, last);
  });
}

// After all left factors: every thread takes columns of y, in strips that are still in its cache when the adapters add to
// them.
template <class X>
void multiply_in_strips(
    const std::vector<Product>& products, const std::vector<Expansion>& expansions, std::vector<at::Tensor>& ys) {
  std::vector<Share> shares;
  for (size_t i = 0; i < products.size(); ++i) {
    const int64_t cost = products[i].cost() * STRIP / BLOCK + expansions[i].cost() * STRIP / EXPAND_UNIT;
    shares.push_back({(products[i].out + STRIP - 1) / STRIP, std::max<int64_t>(cost, 1)});
  }
  split_by_cost(shares, [&](int64_t i, int64_t first, int64_t last) {
    for (int64_t strip = first; strip < last; ++strip) {
      const int64_t begin = strip * STRIP, end = std::min(begin + STRIP, products[i].out);
      multiply(products[i], ys[i].data_ptr<X>(), ys[i].stride(0), begin / BLOCK, (end + BLOCK - 1) / BLOCK);
      expansions[i].run_columns(begin, end);
    }
  });
}

bool many_rows(const std::deque<Segments>& adapters) {
  return std::any_of(adapters.begin(), adapters.end(), [](const Segments& segments) {
    return std::any_of(segments.list.begin(), segments.list.end(), [](const Segment& segment) { return segment.many; });
  });
}

at::Tensor int8_linears(
    const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale, const Optional& bias,
    const Optional& packed_1, const Optional& scale_1, const Optional& bias_1, const Optional& packed_2,
    const Optional& scale_2, const Optional& bias_2, const Optional& pool, const Optional& records,
    const Optional& records_1, const Optional& records_2, const Optional& slot, const Optional& start,
    const Optional& token, const Optional& weight) {
  const auto modules = modules_of(
      packed, scale, bias, packed_1, scale_1, bias_1, packed_2, scale_2, bias_2, records, records_1, records_2);
  int64_t out = 0;
  for (const auto& module : modules) {
    check(x, module.packed, module.scale, module.bias);
    out += module.scale.numel();
  }
  at::Tensor y = at::empty({x.size(0), out}, x.options());
  std::vector<at::Tensor> ys;
  int64_t column = 0;
  for (const auto& module : modules) {
    ys.push_back(y.narrow(1, column, module.scale.numel()));
    column += module.scale.numel();
  }
  const auto adapters = adapters_of(x, modules, ys, {pool, slot, start, token, weight});
  if (!y.numel()) return y;
  const at::Tensor contiguous = inner_contiguous(x);
  const Rows rows = quantize_rows(contiguous);
  const auto products = products_of(modules, rows);
  const Input input(contiguous);
  const LeftFactors factors(adapters, input.in);
  std::vector<Expansion> expansions;
  for (size_t i = 0; i < adapters.size(); ++i) expansions.emplace_back(adapters[i], ys[i]);
  with_float(x.scalar_type(), "x", [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    const bool strips = many_rows(adapters);
    if (strips) {
      split_by_cost(factors.shares, [&](int64_t i, int64_t first, int64_t last) { factors.run(input, i, first, last); });
    } else {
      multiply_all<X>(input, products, factors, ys);
    }
    for (const auto& segments : adapters) apply_cores(segments);
    strips ? multiply_in_strips<X>(products, expansions, ys) : expand_all(expansions);
  });
  return y;
}

at::Tensor int8_linears_meta(
    const at::Tensor& x, const at::Tensor&, const at::Tensor& scale, const Optional&, const Optional&,
    const Optional& scale_1, const Optional&, const Optional&, const Optional& scale_2, const Optional&, const Optional&,
    const Optional&, const Optional&, const Optional&, const Optional&, const Optional&, const Optional&, const Optional&) {
  c10::SymInt out = scale.sym_size(0);
  if (scale_1) out += scale_1->sym_size(0);
  if (scale_2) out += scale_2->sym_size(0);
  return at::empty_symint({x.sym_size(0), out}, x.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(polyrank, m) {
  m.def(
      "int8_linears(Tensor x, Tensor packed, Tensor scale, Tensor? bias, Tensor? packed_1, Tensor? scale_1, "
      "Tensor? bias_1, Tensor? packed_2, Tensor? scale_2, Tensor? bias_2, Tensor? pool, Tensor? records, "
      "Tensor? records_1, Tensor? records_2, Tensor? slot, Tensor? start, Tensor? token, Tensor? weight) -> Tensor");
}
TORCH_LIBRARY_IMPL(polyrank, CPU, m) { m.impl("int8_linears", int8_linears); }
TORCH_LIBRARY_IMPL(polyrank, Meta, m) { m.impl("int8_linears", int8_linears_meta); }

}  // namespace polyrank
