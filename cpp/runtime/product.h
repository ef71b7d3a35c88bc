// Products with weight matrices, as the loop asks for them.
#pragma once

#include <stdexcept>

#include "backend.h"
#include "runtime/model.h"

namespace pop {

// Memory for rows in 8-bit floats, null in a call without such products.
struct QuantizedRows {
  uint8_t* data = nullptr;
  float* scale = nullptr;
};

// What products read: rows of the model's dtype, or with a scale of each in 8-bit floats.
struct ProductRows {
  const void* data;
  int64_t stride;
  const float* scale = nullptr;
};

// Rows [rows, k] for products with `w` and its like: as they are, or quantised into `place` where w is.
inline ProductRows rows_for(Backend& backend, DType dtype, const Linear& w, int64_t rows, int64_t k, const void* x,
                            int64_t x_stride, const QuantizedRows& place) {
  if (w.scale == nullptr) return {x, x_stride};
  backend.quantize_rows({.dtype = dtype,
                         .rows = rows,
                         .width = k,
                         .x = x,
                         .x_stride = x_stride,
                         .out = place.data,
                         .out_stride = k,
                         .scale = place.scale});
  return {place.data, k, place.scale};
}

// The same from row `row` on. Rows in 8-bit floats are not cut: layers with them have as many rows of q as of K and V.
inline ProductRows from_row(const ProductRows& rows, int64_t row, DType dtype) {
  if (row == 0) return rows;
  if (rows.scale != nullptr) throw std::logic_error("pop: rows in 8-bit floats: expected all of them");
  return {static_cast<const char*>(rows.data) + row * rows.stride * element_size(dtype), rows.stride};
}

// out [rows, n] = a [rows, k] . w^T, with w [n, k].
inline GemmParams product(DType dtype, int64_t rows, int64_t n, int64_t k, const ProductRows& a, const Linear& w,
                          void* out, int64_t out_stride) {
  return {.dtype = dtype,
          .m = rows,
          .n = n,
          .k = k,
          .a = a.data,
          .a_stride = a.stride,
          .w = w.data,
          .w_stride = w.stride,
          .out = out,
          .out_stride = out_stride,
          .a_scale = a.scale,
          .w_scale = w.scale,
          .packed = w.packed};
}

}  // namespace pop
