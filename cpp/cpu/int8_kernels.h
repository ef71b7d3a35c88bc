// Products of 8-bit integers: out[m][n] = a_scale[m] * w_scale[n] * sum over k of a[m][k] * w[n][k]. The sums are exact
// int32. One table of kernels per instruction set that multiplies integers (cpu/int8_gemm.cpp), chosen apart from the
// other kernels (cpu/kernels.h): VNNI comes with and without AVX-512 BF16.
#pragma once

#include <cstddef>

#include "backend/params.h"
#include "core/math.h"

namespace pop::cpu {

// The layout of a quantised weight [n, k], one for each table: panels of columns of out, each [groups][panel][group],
// zero beyond n and k. After the panels come the values that the sums start from, one int32 per column.
struct Int8Layout {
  int64_t panel;  // columns of a panel
  int64_t group;  // elements along k that one instruction multiplies and adds up for a column

  int64_t panels(int64_t n) const { return ceil_div(n, panel); }
  int64_t panel_bytes(int64_t k) const { return round_up(k, group) * panel; }
  int64_t starts(int64_t n, int64_t k) const {  // offset in bytes
    return static_cast<int64_t>(aligned(panels(n) * panel_bytes(k)));
  }
  int64_t bytes(int64_t n, int64_t k) const { return starts(n, k) + panels(n) * panel * 4; }
};

struct Int8Gemm {
  DType dtype;  // of out
  int64_t m, n, k;
  const int8_t* a;  // [m, k]
  int64_t a_stride;
  const void* w;         // a weight in the layout of the table, aligned to kAlignment
  const float* a_scale;  // [m]
  const float* w_scale;  // [n]
  void* out;             // [m, n]
  int64_t out_stride;
};

struct Int8Pack {
  int64_t columns, k;  // columns <= Int8Layout::panel
  const int8_t* w;     // [columns, k], contiguous
  int8_t* panel;       // a whole panel
  int32_t* start;      // [Int8Layout::panel]
};

struct Int8Kernels {
  const char* name;  // "avx512_vnni", "avx_vnni", "avx2", "baseline"
  Int8Layout layout;
  void (*pack)(const Int8Pack&);
  // Bytes of scratch (aligned to kAlignment) for `columns` columns of `m` rows.
  size_t (*scratch)(int64_t m, int64_t columns);
  // Columns [begin, end) of out; `begin` is a multiple of Int8Layout::panel.
  void (*gemm)(const Int8Gemm&, int64_t begin, int64_t end, void* scratch);
};

namespace baseline {
extern const Int8Kernels int8_kernels;
}
namespace avx2 {
extern const Int8Kernels int8_kernels;
}
namespace avx_vnni {
extern const Int8Kernels int8_kernels;
}
namespace avx512_vnni {
extern const Int8Kernels int8_kernels;
}

// Chosen like kernels() in cpu/kernels.h.
const Int8Kernels& int8_kernels();

}  // namespace pop::cpu
