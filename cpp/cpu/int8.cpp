#include "cpu/int8.h"

#include <algorithm>
#include <vector>

#include "core/math.h"
#include "cpu/int8_kernels.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace pop::cpu {
namespace {

// The most columns of out that a thread computes at a time. Rows of a are prepared again for each such block.
constexpr int64_t kMostColumns = 256;

}  // namespace

int64_t int8_weight_bytes(int64_t n, int64_t k) { return int8_kernels().layout.bytes(n, k); }

void quantize_weight(const QuantizeWeightParams& p) {
  const Int8Kernels& table = int8_kernels();
  const Int8Layout& layout = table.layout;
  auto* panels = static_cast<int8_t*>(p.out);
  auto* starts = reinterpret_cast<int32_t*>(panels + layout.starts(p.n, p.k));
  parallel_for(0, layout.panels(p.n), 1, [&](int64_t begin, int64_t end) {
    std::vector<int8_t> rounded(layout.panel * p.k);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * layout.panel, columns = std::min(layout.panel, p.n - first);
      const int64_t offset = first * p.w_stride * element_size(p.dtype);
      kernels().quantize_rows({.dtype = p.dtype,
                               .products = Products::int8,
                               .rows = columns,
                               .width = p.k,
                               .x = static_cast<const char*>(p.w) + offset,
                               .x_stride = p.w_stride,
                               .out = reinterpret_cast<uint8_t*>(rounded.data()),
                               .out_stride = p.k,
                               .scale = p.scale + first},
                              0, columns);
      table.pack({.columns = columns,
                  .k = p.k,
                  .w = rounded.data(),
                  .panel = panels + panel * layout.panel_bytes(p.k),
                  .start = starts + first});
    }
  });
}

void int8_gemm(const GemmParams& p) {
  const Int8Kernels& table = int8_kernels();
  const Int8Gemm product{.dtype = p.dtype,
                         .m = p.m,
                         .n = p.n,
                         .k = p.k,
                         .a = static_cast<const int8_t*>(p.a),
                         .a_stride = p.a_stride,
                         .w = p.w,
                         .a_scale = p.a_scale,
                         .w_scale = p.w_scale,
                         .out = p.out,
                         .out_stride = p.out_stride};
  // Blocks of about equal width, the same number for each thread unless there is little to do.
  const int64_t threads = p.n * p.k < 2 * kGrainElements ? 1 : num_threads();
  const int64_t count = round_up(ceil_div(p.n, kMostColumns), threads);
  const int64_t columns = round_up(ceil_div(p.n, count), table.layout.panel);
  const int64_t tasks = ceil_div(p.n, columns);
  const size_t bytes = aligned(table.scratch(p.m, columns));
  const Scratch scratch = allocate(workers_for(tasks) * bytes);
  parallel_tasks(tasks, [&](int64_t i, int64_t worker) {
    const int64_t begin = i * columns;
    table.gemm(product, begin, std::min(begin + columns, p.n), scratch.get() + worker * bytes);
  });
}

}  // namespace pop::cpu
