#include "cpu/int8.h"

#include <algorithm>

#include "core/math.h"
#include "cpu/int8_kernels.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace pop::cpu {
namespace {

// The most bytes of packed rows, which every thread reads for each block of columns.
constexpr int64_t kPackedBytes = 4 << 20;

// Rows that are packed at once: about equal parts of all rows.
int64_t rows_at_once(const Int8Kernels& table, int64_t m, int64_t k) {
  const int64_t panel_bytes = static_cast<int64_t>(table.packed_bytes(table.panel, k));
  const int64_t most = std::min(kInt8Rows, std::max<int64_t>(1, kPackedBytes / panel_bytes) * table.panel);
  return round_up(ceil_div(m, ceil_div(m, most)), table.panel);
}

Int8Weight weight_of(const GemmParams& p) {
  return {.data = static_cast<const int8_t*>(p.w), .stride = p.w_stride, .scale = p.w_scale, .group = p.w_group};
}

// Rows of p, kInt8Rows at a time: packs them, then computes blocks of columns.
void multiply(const GemmParams& p, const GemmParams* up, const GatedActParams* act) {
  const Int8Kernels& table = int8_kernels();
  const int64_t weights = up == nullptr ? 1 : 2, element = element_size(p.dtype);
  Int8Gemm product{.dtype = p.dtype,
                   .m = rows_at_once(table, p.m, p.k),
                   .k = p.k,
                   .rows = {},
                   .a_scale = nullptr,
                   .w = weight_of(p),
                   .out = nullptr,
                   .out_stride = act == nullptr ? p.out_stride : act->out_stride,
                   .up = up == nullptr ? Int8Weight{} : weight_of(*up),
                   .act = act,
                   .gated_act = kernels().gated_act};
  // Blocks of about equal width, the same number for each thread unless there is little to do.
  const int64_t threads = weights * p.n * p.k < 2 * kGrainElements ? 1 : num_threads();
  const int64_t count = round_up(ceil_div(p.n, table.most_columns / weights), threads);
  const int64_t columns = round_up(ceil_div(p.n, count), table.tile_columns), tasks = ceil_div(p.n, columns);
  const size_t bytes = aligned(table.scratch(product, columns));
  const Scratch scratch = allocate(workers_for(tasks) * bytes);
  const Scratch packed = allocate(table.packed_bytes(product.m, p.k));
  const int64_t step = product.m;
  for (int64_t row = 0; row < p.m; row += step) {
    const Int8Rows rows{.m = std::min(step, p.m - row),
                        .k = p.k,
                        .a = static_cast<const int8_t*>(p.a) + row * p.a_stride,
                        .a_stride = p.a_stride,
                        .out = packed.get()};
    if (!table.reads_rows(product, rows.m)) {
      const int64_t grain = std::max<int64_t>(1, kGrainElements / (table.panel * p.k));
      parallel_for(0, ceil_div(rows.m, table.panel), grain,
                   [&](int64_t begin, int64_t end) { table.pack(rows, begin, end); });
    }
    product.m = rows.m;
    product.rows = rows;
    product.a_scale = p.a_scale + row;
    product.out = static_cast<char*>(act == nullptr ? p.out : act->out) + row * product.out_stride * element;
    parallel_tasks(tasks, [&](int64_t i, int64_t worker) {
      const int64_t begin = i * columns;
      table.gemm(product, begin, std::min(begin + columns, p.n), scratch.get() + worker * bytes);
    });
  }
}

}  // namespace

void int8_gemm(const GemmParams& p) { multiply(p, nullptr, nullptr); }

void int8_gated_gemm(const GatedGemmParams& p) {
  if (p.gate.m > 0 && p.gate.n > 0) multiply(p.gate, &p.up, &p.act);
}

}  // namespace pop::cpu
