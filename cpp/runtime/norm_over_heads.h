// RMSNorm over all heads of q, or of k, of a token (OLMo 2), before RoPE. A norm of each head by itself is part of
// rope_cache_write; this one needs the whole row.
#pragma once

#include "backend/backend.h"

namespace pop {

// Normalises rows x [rows, width] of q or k in place.
inline void norm_over_heads(Backend& backend, DType dtype, void* x, int64_t rows, int64_t width, int64_t stride,
                            const void* weight, float weight_offset, float eps) {
  backend.rms_norm({.dtype = dtype,
                    .rows = rows,
                    .width = width,
                    .x = x,
                    .x_stride = stride,
                    .weight = weight,
                    .weight_offset = weight_offset,
                    .eps = eps,
                    .out = x,
                    .out_stride = stride});
}

}  // namespace pop
