// The memory of one call, cut from a single allocation that the caller makes and frees.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"
#include "runtime/batch.h"
#include "runtime/model.h"
#include "runtime/prefill.h"
#include "runtime/product.h"

namespace pop {

// Row r of a buffer belongs to row r of the batch. Widths are in elements.
struct Workspace {
  // Cuts call.workspace; if that is null, only `bytes` is meaningful.
  Workspace(const Model& model, const PrefillCall& call, const Backend& backend);

  int64_t row_stride;       // of gemm_in and gemm_out: max(hidden_size, q_dim)
  void* hidden;             // [rows, hidden_size] hidden states (the residual stream)
  void* gemm_in;            // [rows, row_stride] input of the next GEMM: normalised rows, or attention output
  void* gemm_out;           // [rows, row_stride] output of a GEMM: q, or the update to add to `hidden`
  void* k;                  // [rows, kv_dim]
  void* v;                  // [rows, kv_dim]
  void* scratch;            // MlpCall::workspace or KvProjectParams::workspace, which are never in use at once
  QuantizedRows quantized;  // the next GEMM's input in 8 bits; null if the model has no 8-bit weights
  float* rstd;              // [rows]
  float* cos;               // [rows, rotary_dim / 2]
  float* sin;               // [rows, rotary_dim / 2]
  float* cos_local;         // [rows, rotary_dim / 2], or null if no layer uses RoPE table 1
  float* sin_local;         // the same
  RowTablesParams row_tables;
  size_t bytes;
};

}  // namespace pop
