#include "runtime/mlp.h"

#include <algorithm>

#include "core/math.h"
#include "runtime/experts.h"
#include "runtime/product.h"

namespace pop {

namespace {

int64_t most_rows(DType dtype, bool sparse, Products products, const Backend& backend) {
  return sparse ? kMlpChunkRows : std::min(kMlpChunkRows, backend.mlp_rows(dtype, products));
}

// Rows of a chunk. Chunks are about equal: a short last one would read all weights again for a few rows.
int64_t chunk_rows(int64_t rows, int64_t most) {
  constexpr int64_t kTile = 128;
  const int64_t equal = ceil_div(rows, ceil_div(rows, most));
  return std::min(most, round_up(equal, kTile));
}

// A gated MLP: that of a dense layer, or the shared expert of a sparse one.
struct DenseWeights {
  int64_t inner_size;
  const Linear &gate_proj, &up_proj, &down_proj;
  const void *gate_bias = nullptr, *up_bias = nullptr;
};

size_t dense_bytes(DType dtype, int64_t inner_size, int64_t rows) {
  return 2 * aligned(rows * inner_size * element_size(dtype));
}

void dense(const MlpCall& call, const DenseWeights& weights, Backend& backend) {
  const ModelSpec& spec = call.spec;
  const int64_t hidden = spec.hidden_size, inner = weights.inner_size;
  void* gate = call.workspace;
  void* up = static_cast<char*>(call.workspace) + dense_bytes(spec.dtype, inner, call.rows) / 2;
  const ProductRows x =
      rows_for(backend, spec.dtype, weights.gate_proj, call.rows, hidden, call.x, call.x_stride, call.quantized);
  const auto from_x = [&](const Linear& w, void* out) {
    return product(spec.dtype, call.rows, inner, hidden, x, w, out, inner);
  };
  backend.gated_gemm({.gate = from_x(weights.gate_proj, gate),
                      .up = from_x(weights.up_proj, up),
                      .act = {.dtype = spec.dtype,
                              .activation = spec.activation,
                              .rows = call.rows,
                              .width = inner,
                              .gate = gate,
                              .gate_stride = inner,
                              .up = up,
                              .up_stride = inner,
                              .gate_bias = weights.gate_bias,
                              .up_bias = weights.up_bias,
                              .out = gate,
                              .out_stride = inner,
                              .swiglu_alpha = static_cast<float>(spec.swiglu_alpha),
                              .swiglu_limit = static_cast<float>(spec.swiglu_limit)}});
  const ProductRows activated =
      rows_for(backend, spec.dtype, weights.down_proj, call.rows, inner, gate, inner, call.quantized);
  GemmParams down =
      product(spec.dtype, call.rows, hidden, inner, activated, weights.down_proj, call.out, call.out_stride);
  down.accumulate = call.accumulate;
  backend.gemm(&down, 1);
}

void dense(const MlpCall& call, Backend& backend) {
  const LayerWeights& weights = call.weights;
  dense(call,
        {.inner_size = call.spec.intermediate_size,
         .gate_proj = weights.gate_proj,
         .up_proj = weights.up_proj,
         .down_proj = weights.down_proj,
         .gate_bias = weights.gate_bias,
         .up_bias = weights.up_bias},
        backend);
}

void sparse(const MlpCall& call, Backend& backend) {
  const LayerWeights& weights = call.weights;
  if (call.spec.shared_intermediate_size > 0) {
    dense(call,
          {.inner_size = call.spec.shared_intermediate_size,
           .gate_proj = weights.shared_gate_proj,
           .up_proj = weights.shared_up_proj,
           .down_proj = weights.shared_down_proj},
          backend);
  }
  run_experts({.shape = experts_shape(call.spec),
               .rows = call.rows,
               .x = call.x,
               .x_stride = call.x_stride,
               .router = weights.router,
               .router_bias = weights.router_bias,
               .router_logit_bias = weights.router_logit_bias,
               .gate_up = weights.experts_gate_up,
               .gate_up_bias = weights.experts_gate_up_bias,
               .down = weights.experts_down,
               .down_bias = weights.experts_down_bias,
               .shared_gate = weights.shared_gate,
               .out = call.out,
               .out_stride = call.out_stride,
               .workspace = call.workspace},
              backend);
}

}  // namespace

size_t mlp_workspace(const Model& model, int64_t rows, const Backend& backend) {
  const ModelSpec& spec = model.spec;
  const int64_t dense_rows = std::min(rows, most_rows(spec.dtype, false, model.products, backend));
  const size_t bytes = dense_bytes(spec.dtype, spec.intermediate_size, dense_rows);
  if (!spec.has_experts()) return bytes;
  const int64_t sparse_rows = std::min(rows, kMlpChunkRows);
  return std::max({bytes, dense_bytes(spec.dtype, spec.shared_intermediate_size, sparse_rows),
                   experts_workspace(experts_shape(spec), sparse_rows)});
}

size_t quantized_mlp_bytes(const ModelSpec& spec, int64_t rows) {
  return std::min(rows, kMlpChunkRows) * std::max(spec.hidden_size, spec.intermediate_size);
}

void run_mlp(const MlpCall& call, Backend& backend) {
  if (call.rows == 0) return;
  const int64_t chunk = chunk_rows(call.rows, most_rows(call.spec.dtype, call.sparse, call.products, backend));
  const int64_t element = element_size(call.spec.dtype);
  for (int64_t begin = 0; begin < call.rows; begin += chunk) {
    const MlpCall part{.spec = call.spec,
                       .weights = call.weights,
                       .sparse = call.sparse,
                       .products = call.products,
                       .rows = std::min(chunk, call.rows - begin),
                       .x = static_cast<const char*>(call.x) + begin * call.x_stride * element,
                       .x_stride = call.x_stride,
                       .out = static_cast<char*>(call.out) + begin * call.out_stride * element,
                       .out_stride = call.out_stride,
                       .accumulate = call.accumulate,
                       .workspace = call.workspace,
                       .quantized = call.quantized};
    call.sparse ? sparse(part, backend) : dense(part, backend);
  }
}

}  // namespace pop
