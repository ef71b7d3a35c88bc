// A product with a weight matrix, as the loop asks for it.
#pragma once

#include "backend.h"
#include "runtime/model.h"

namespace pop {

// out [rows, n] = a [rows, k] . w^T, with w [n, k].
inline GemmParams product(DType dtype, int64_t rows, int64_t n, int64_t k, const void* a, int64_t a_stride,
                          const Linear& w, void* out, int64_t out_stride) {
  return {.dtype = dtype,
          .m = rows,
          .n = n,
          .k = k,
          .a = a,
          .a_stride = a_stride,
          .w = w.data,
          .w_stride = w.stride,
          .out = out,
          .out_stride = out_stride};
}

}  // namespace pop
