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

  bool joins_qkv;           // q, k and v of a layer may come from one product
  int64_t row_stride;       // of gemm_in: max(hidden_size, q_dim)
  int64_t out_stride;       // of gemm_out: the same, or wide enough for [q | k | v]
  void* hidden;             // [rows, hidden_size] hidden states (the residual stream)
  void* gemm_in;            // [rows, row_stride] input of the next GEMM: normalised rows, or attention output
  void* gemm_out;           // [rows, out_stride] output of a GEMM: q, or the update to add to `hidden`
  int64_t kv_stride;        // of k and v
  void* k;                  // [rows, kv_dim]: in gemm_out behind q where the backend joins products, else by itself
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
