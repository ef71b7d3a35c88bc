// RMSNorm over all heads of q, or of k, of a token together (OLMo 2). Norms of each head by itself are part of
// rope_cache_write; these need the whole row and come between the projections and it.
#pragma once

#include "backend.h"

namespace pop {

// Rows [rows, width] of q or k in place.
inline void norm_over_heads(Backend& backend, DType dtype, void* x, int64_t rows, int64_t width, int64_t stride,
                            const void* weight, float weight_offset, float eps) {
  backend.rms_norm({.dtype = dtype,
                    .rows = rows,
                    .width = width,
                    .x = x,
                    .x_stride = stride,
                    .delta = nullptr,
                    .delta_stride = 0,
                    .delta_bias = nullptr,
                    .weight = weight,
                    .weight_offset = weight_offset,
                    .eps = eps,
                    .out = x,
                    .out_stride = stride,
                    .rstd = nullptr});
}

// K of every layer of a run; `kv` is [rows, layers * 2 * kv_dim] as the stacked GEMM left it.
inline void norm_stacked_keys(Backend& backend, const KvProjectParams& p, void* kv, int64_t rows) {
  const int64_t kv_dim = p.kv_heads * p.head_dim;
  for (int64_t layer = 0; layer < p.layers; ++layer) {
    void* k = static_cast<char*>(kv) + layer * 2 * kv_dim * element_size(p.dtype);
    norm_over_heads(backend, p.dtype, k, rows, kv_dim, p.layers * 2 * kv_dim, p.k_norm[layer], p.norm_offset, p.eps);
  }
}

}  // namespace pop
