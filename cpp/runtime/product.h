// Products with weight matrices: builds GemmParams, and rounds rows to 8 bits where the weight is.
#pragma once

#include <stdexcept>

#include "backend/backend.h"
#include "runtime/model.h"

namespace pop {

// Memory for rows in 8 bits; null if no product of the call rounds its rows.
struct QuantizedRows {
  uint8_t* data = nullptr;
  float* scale = nullptr;  // one per row
};

// The left operand of a product: rows of the model's dtype, or 8-bit rows with one scale each.
struct ProductRows {
  const void* data;
  int64_t stride;
  const float* scale = nullptr;
};

// Rows x [rows, k] as the operand of products with `w`: x itself, or x rounded in `buffer` if its products round rows.
inline ProductRows rows_for(Backend& backend, DType dtype, const Linear& w, int64_t rows, int64_t k, const void* x,
                            int64_t x_stride, const QuantizedRows& buffer) {
  if (!rounds_rows(w.products)) return {x, x_stride};
  backend.quantize_rows({.dtype = dtype,
                         .products = w.products,
                         .rows = rows,
                         .width = k,
                         .x = x,
                         .x_stride = x_stride,
                         .out = buffer.data,
                         .out_stride = k,
                         .scale = buffer.scale});
  return {buffer.data, k, buffer.scale};
}

// The rows from `row` on. 8-bit rows are never cut: their layers compute q for the same rows as K and V.
inline ProductRows from_row(const ProductRows& rows, int64_t row, DType dtype) {
  if (row == 0) return rows;
  if (rows.scale != nullptr) throw std::logic_error("pop: rows in 8 bits: expected all of them");
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
          .products = w.products,
          .a_scale = a.scale,
          .w_scale = w.scale,
          .w_group = w.group,
          .packed = w.packed};
}

}  // namespace pop
