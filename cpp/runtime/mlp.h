// The MLP of a layer, dense or sparse, in chunks of rows, so that its memory does not grow with intermediate_size *
// prompt. A chunk has at most kMlpChunkRows rows, or Backend::mlp_rows for a dense MLP.
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
  Products products;  // Model::products: they decide the rows of a chunk in all layers, since the workspace is shared
  int64_t rows;
  const void* x;  // [rows, hidden_size]
  int64_t x_stride;
  void* out;  // [rows, hidden_size], without down_bias: the next norm adds it
  int64_t out_stride;
  bool accumulate = false;  // add to `out`; for dense layers only (GemmParams::accumulate)
  void* workspace;          // mlp_workspace(model, rows, backend) bytes
  QuantizedRows quantized;  // quantized_mlp_bytes(spec, rows) bytes, and one scale per row of a chunk
};

size_t mlp_workspace(const Model& model, int64_t rows, const Backend& backend);

// Bytes of a chunk's rows in 8 bits.
size_t quantized_mlp_bytes(const ModelSpec& spec, int64_t rows);

void run_mlp(const MlpCall& call, Backend& backend);

}  // namespace pop
