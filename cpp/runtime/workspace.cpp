#include "runtime/workspace.h"

#include <algorithm>

#include "runtime/cutter.h"
#include "runtime/mlp.h"

namespace pop {

Workspace::Workspace(const Model& model, const PrefillCall& call, const Backend& backend) {
  const ModelSpec& spec = model.spec;
  const BatchLayout& layout = *call.layout;
  const int64_t element = element_size(spec.dtype);
  const int64_t rows = layout.rows;
  wide = std::max(spec.hidden_size, spec.q_dim());

  Cutter cutter(call.workspace);
  x = cutter.take(rows * spec.hidden_size * element);
  y = cutter.take(rows * wide * element);
  z = cutter.take(rows * wide * element);
  k = cutter.take(rows * spec.kv_dim() * element);
  v = cutter.take(rows * spec.kv_dim() * element);
  if (model.fp8) {
    const size_t inputs = std::max<size_t>(rows * wide, quantized_mlp_bytes(spec, rows));
    quantized = {.data = static_cast<uint8_t*>(cutter.take(inputs)), .scale = cutter.take_array<float>(rows)};
  }
  rstd = cutter.take_array<float>(rows);
  cos = cutter.take_array<float>(rows * (spec.rotary_dim / 2));
  sin = cutter.take_array<float>(rows * (spec.rotary_dim / 2));
  const bool local = spec.has_local_rope();
  cos_local = local ? cutter.take_array<float>(rows * (spec.rotary_dim / 2)) : nullptr;
  sin_local = local ? cutter.take_array<float>(rows * (spec.rotary_dim / 2)) : nullptr;
  place_rows = {.segments = nullptr,
                .num_segments = 0,
                .sequences = layout.sequences,
                .address = call.address,
                .row_sequence = cutter.take_array<int64_t>(rows),
                .row_position = cutter.take_array<int64_t>(rows),
                .row_source = cutter.take_array<int64_t>(rows),
                .start = cutter.take_array<int64_t>(layout.sequences),
                .slot_table = call.address.slot_table == nullptr
                                  ? nullptr
                                  : cutter.take_array<int32_t>(layout.sequences * call.address.slot_table_stride)};

  // The projection of a run and the MLP of a layer never run at once, so they share memory.
  size_t scratch_bytes = mlp_workspace(model, rows, backend);
  for (const RunWeights& run : model.runs) {
    // A run may be projected in parts, and a part of fewer layers may take more rows at once.
    for (int64_t layers = 1; layers <= run.layers.size(); ++layers) {
      scratch_bytes = std::max(scratch_bytes, backend.kv_project_workspace(spec.dtype, layout.context_rows,
                                                                           spec.hidden_size, layers, spec.kv_dim()));
    }
  }
  scratch = cutter.take(scratch_bytes);
  bytes = cutter.used();
}

size_t workspace_bytes(const Model& model, const PrefillCall& call, const Backend& backend) {
  return Workspace(model, call, backend).bytes;
}

}  // namespace pop
