// Products of 8-bit integers: out[m][n] = a_scale[m] * w_scale[n] * sum over k of a[m][k] * w[n][k]. The sums are exact
// int32; those of groups of elements with a scale of their own are added in float32. One table of kernels per
// instruction set that multiplies integers (cpu/int8_gemm.cpp), chosen apart from the other kernels (cpu/kernels.h):
// VNNI comes with and without AVX-512 BF16.
//
// Weights are read where they are, [n, k] with contiguous rows: a quantised checkpoint needs no copy. The operand that
// instructions read along their lanes is a, whose rows are packed in every product.
#pragma once

#include <cstddef>

#include "backend/params.h"

namespace pop::cpu {

// The most rows of a that one product of a table takes: their sums wait in scratch.
inline constexpr int64_t kInt8Rows = 512;  // a multiple of every panel

struct Int8Rows {
  int64_t m, k;     // m <= kInt8Rows
  const int8_t* a;  // [m, k]
  int64_t a_stride;
  void* out;  // Int8Kernels::packed_bytes(m, k) bytes, aligned to kAlignment; not used with few rows
};

struct Int8Weight {
  const int8_t* data;  // [n, k]
  int64_t stride;
  const float* scale;  // [n], or [n, k / group]
  int64_t group = 0;   // elements along k that share a scale (is_int8_group); 0: all of a row
};

struct Int8Gemm {
  DType dtype;           // of out
  int64_t m, k;          // m <= kInt8Rows
  Int8Rows rows;         // packed, unless there are few
  const float* a_scale;  // [m]
  Int8Weight w;
  void* out;  // [m, n]
  int64_t out_stride;
  // A second weight, or null data: out is then gated_act of both products, each rounded to `dtype` before.
  Int8Weight up{};
  const GatedActParams* act = nullptr;  // activation and biases; its operands and results are not read
  void (*gated_act)(const GatedActParams&, int64_t begin, int64_t end) = nullptr;  // see Kernels
};

struct Int8Kernels {
  const char* name;      // "amx", "avx512_vnni", "avx_vnni", "avx2", "baseline"
  int64_t panel;         // rows of a that are packed together
  int64_t tile_columns;  // blocks of columns are multiples of this but for the last, for the best speed
  // The most columns that a thread computes at a time, of both products together where there are two: w and the sums
  // stay in L2, which has 1 or 2 MB with AVX-512 and less in older processors.
  int64_t most_columns;
  bool (*reads_rows)(const Int8Gemm&, int64_t m);  // a product of so few rows reads a as it is
  size_t (*packed_bytes)(int64_t m, int64_t k);
  void (*pack)(const Int8Rows&, int64_t begin, int64_t end);  // panels [begin, end)
  // Bytes of scratch (aligned to kAlignment) for `columns` columns of `m` rows.
  size_t (*scratch)(const Int8Gemm&, int64_t columns);
  void (*gemm)(const Int8Gemm&, int64_t begin, int64_t end, void* scratch);  // columns [begin, end) of out
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
namespace amx {
extern const Int8Kernels int8_kernels;
}

// Chosen like kernels() in cpu/kernels.h.
const Int8Kernels& int8_kernels();

}  // namespace pop::cpu
