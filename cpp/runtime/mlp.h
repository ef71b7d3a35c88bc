// The MLP of a layer, dense or sparse, a chunk of rows at a time (kMlpChunkRows; of a dense one, Backend::mlp_rows): so
// extra memory does not grow with intermediate_size * prompt.
#pragma once

#include <cstddef>

#include "backend/backend.h"
#include "runtime/model.h"
#include "runtime/product.h"

namespace pop {

struct MlpCall {
  const ModelSpec& spec;
  const LayerWeights& weights;
  bool sparse;
  int64_t rows;
  const void* x;  // [rows, hidden_size]
  int64_t x_stride;
  void* out;  // [rows, hidden_size]; down_bias is left to who adds it to the residual stream
  int64_t out_stride;
  void* workspace;          // mlp_workspace(model, rows, backend) bytes
  QuantizedRows quantized;  // of quantized_mlp_bytes(spec, rows) bytes, and as many scales as a chunk has rows
};

size_t mlp_workspace(const Model& model, int64_t rows, const Backend& backend);

// Of the rows of a chunk in 8-bit floats.
size_t quantized_mlp_bytes(const ModelSpec& spec, int64_t rows);

void run_mlp(const MlpCall& call, Backend& backend);

}  // namespace pop
