// The memory of one call, cut from a single allocation: made for the call, freed with it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend.h"
#include "runtime/batch.h"
#include "runtime/model.h"
#include "runtime/prefill.h"
#include "runtime/product.h"

namespace pop {

// Row r of a buffer belongs to row r of the batch; widths in elements.
struct Workspace {
  // Cut from call.workspace; without that only `bytes` is meaningful.
  Workspace(const Model& model, const PrefillCall& call, const Backend& backend);

  int64_t wide;  // max(hidden_size, q_dim)
  void* x;       // [rows, hidden_size] residual stream
  void* y;       // [rows, wide] input of the next GEMM: normalised rows or attention output
  void* z;       // [rows, wide] output of a GEMM: q, or what is to be added to x
  void* k;       // [rows, kv_dim]
  void* v;       // [rows, kv_dim]
  void* scratch;  // of the step that runs: MlpCall::workspace or KvProjectParams::workspace
  QuantizedRows quantized;  // input of the next product in a model with 8-bit weights, else null
  float* rstd;              // [rows]
  float* cos;               // [rows, rotary_dim / 2]
  float* sin;               // the same
  float* cos_local;         // the same; null where no layer takes a second table
  float* sin_local;
  PlaceRowsParams place_rows;
  size_t bytes;
};

}  // namespace pop
