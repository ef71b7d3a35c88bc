#include "runtime/workspace.h"

#include <algorithm>

#include "runtime/prefill.h"

namespace pop {

namespace {

// A cache line, and what the widest vector load wants.
constexpr size_t kAlignment = 64;

class Cutter {
 public:
  explicit Cutter(void* base) : base_(static_cast<char*>(base)) {}

  void* take(size_t bytes) {
    void* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }

  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace

Workspace::Workspace(const Model& model, const BatchLayout& layout, const Backend& backend, void* base) {
  const ModelSpec& spec = model.spec;
  const int64_t element = element_size(spec.dtype);
  const int64_t rows = layout.rows;
  wide = std::max(spec.hidden_size, spec.q_dim());

  Cutter cutter(base);
  x = cutter.take(rows * spec.hidden_size * element);
  y = cutter.take(rows * wide * element);
  z = cutter.take(rows * wide * element);
  k = cutter.take(rows * spec.kv_dim() * element);
  v = cutter.take(rows * spec.kv_dim() * element);
  cos = static_cast<float*>(cutter.take(rows * (spec.rotary_dim / 2) * sizeof(float)));
  sin = static_cast<float*>(cutter.take(rows * (spec.rotary_dim / 2) * sizeof(float)));

  // The projection of a run and the MLP of a layer never run at once.
  size_t projection = 0;
  for (const RunWeights& run : model.runs) {
    projection = std::max(projection, backend.kv_project_workspace(spec.dtype, layout.context_rows, spec.hidden_size,
                                                                   run.layers.size(), spec.kv_dim()));
  }
  const size_t chunk = std::min(rows, kMlpChunkRows) * spec.intermediate_size * element;
  Cutter shared(cutter.take(0));
  gate = shared.take(chunk);
  up = shared.take(chunk);
  kv_project = gate;
  cutter.take(std::max(shared.used(), projection));
  bytes = cutter.used();
}

size_t workspace_bytes(const Model& model, const BatchLayout& layout, const Backend& backend) {
  return Workspace(model, layout, backend, nullptr).bytes;
}

}  // namespace pop
