#include "runtime/workspace.h"

#include <algorithm>

#include "runtime/arena.h"
#include "runtime/mlp.h"

namespace pop {

namespace {

// The most that a projection of some layers of a run needs. A run may be projected in parts, and a part of fewer layers
// may take more rows at once, so every number of layers counts.
size_t most_kv_project_bytes(const Model& model, const BatchLayout& layout, const Backend& backend) {
  const ModelSpec& spec = model.spec;
  size_t most = 0;
  for (const RunWeights& run : model.runs) {
    for (int64_t layers = 1; layers <= run.layers.size(); ++layers) {
      most = std::max(
          most, backend.kv_project_workspace(spec.dtype, layout.context_rows, spec.hidden_size, layers, spec.kv_dim()));
    }
  }
  return most;
}

// 8-bit products have results with adjacent rows, so they are not joined.
bool wants_joined_qkv(const Model& model, const Backend& backend) {
  return model.products == Products::plain && backend.joins_qkv() &&
         std::ranges::any_of(model.layers, [](const LayerWeights& layer) { return layer.qkv_adjacent; });
}

}  // namespace

Workspace::Workspace(const Model& model, const PrefillCall& call, const Backend& backend) {
  const ModelSpec& spec = model.spec;
  const BatchLayout& layout = *call.layout;
  const int64_t element = element_size(spec.dtype);
  const int64_t rows = layout.rows, half = spec.rotary_dim / 2;
  const int64_t q_dim = spec.q_dim(), kv_dim = spec.kv_dim();
  row_stride = std::max(spec.hidden_size, q_dim);
  joins_qkv = wants_joined_qkv(model, backend);
  out_stride = joins_qkv ? std::max(row_stride, q_dim + 2 * kv_dim) : row_stride;
  kv_stride = joins_qkv ? out_stride : kv_dim;

  Arena arena(call.workspace);
  hidden = arena.take(rows * spec.hidden_size * element);
  gemm_in = arena.take(rows * row_stride * element);
  gemm_out = arena.take(rows * out_stride * element);
  if (!joins_qkv) {
    k = arena.take(rows * kv_dim * element);
    v = arena.take(rows * kv_dim * element);
  } else if (gemm_out != nullptr) {
    k = static_cast<char*>(gemm_out) + q_dim * element;
    v = static_cast<char*>(k) + kv_dim * element;
  }
  if (model.products != Products::plain) {
    const size_t inputs = std::max<size_t>(rows * row_stride, quantized_mlp_bytes(spec, rows));
    quantized = {.data = static_cast<uint8_t*>(arena.take(inputs)), .scale = arena.take_array<float>(rows)};
  }
  rstd = arena.take_array<float>(rows);
  cos = arena.take_array<float>(rows * half);
  sin = arena.take_array<float>(rows * half);
  const bool local = spec.has_local_rope();
  cos_local = local ? arena.take_array<float>(rows * half) : nullptr;
  sin_local = local ? arena.take_array<float>(rows * half) : nullptr;
  row_tables = {.segments = nullptr,
                .num_segments = 0,
                .sequences = layout.sequences,
                .address = call.address,
                .row_sequence = arena.take_array<int64_t>(rows),
                .row_position = arena.take_array<int64_t>(rows),
                .row_source = arena.take_array<int64_t>(rows),
                .start = arena.take_array<int64_t>(layout.sequences),
                .slot_table = call.address.slot_table == nullptr
                                  ? nullptr
                                  : arena.take_array<int32_t>(layout.sequences * call.address.slot_table_stride)};
  scratch = arena.take(std::max(mlp_workspace(model, rows, backend), most_kv_project_bytes(model, layout, backend)));
  bytes = arena.used();
}

size_t workspace_bytes(const Model& model, const PrefillCall& call, const Backend& backend) {
  return Workspace(model, call, backend).bytes;
}

}  // namespace pop
