#include "runtime/prefill.h"

#include <algorithm>
#include <initializer_list>
#include <utility>
#include <vector>

#include "runtime/mlp.h"
#include "runtime/norm_over_heads.h"
#include "runtime/product.h"
#include "runtime/workspace.h"

namespace pop {

namespace {

// Tells the observer that a stage runs while this object lives.
class StageRange {
 public:
  StageRange(PrefillObserver& observer, const char* stage) : observer_(observer) { observer_.begin(stage); }
  ~StageRange() { observer_.end(); }
  StageRange(const StageRange&) = delete;
  StageRange& operator=(const StageRange&) = delete;

 private:
  PrefillObserver& observer_;
};

// An update that an earlier step has computed but not yet added to the hidden states: gemm_out + bias, RMS-normalised
// with `norm` if it is not null. The next norm adds it in the same pass. Where a product adds its result to the hidden
// states itself (adds_directly), nothing is pending.
struct PendingUpdate {
  int64_t begin;  // first row that has one; all rows after it have one, too
  const void* bias = nullptr;
  const void* norm = nullptr;
};

class Prefill {
 public:
  Prefill(const Model& model, const PrefillCall& call, Backend& backend, PrefillObserver& observer)
      : model_(model),
        spec_(model.spec),
        call_(call),
        layout_(*call.layout),
        backend_(backend),
        observer_(observer),
        element_(element_size(model.spec.dtype)),
        work_(model, call, backend),
        pending_{.begin = layout_.rows} {}

  void run();

 private:
  void build_row_tables();
  void embed();
  void omitted_layers(const RunWeights& run, LayerRange layers);
  void project_context_rows(const RunWeights& run, LayerRange layers);
  void project(const RunWeights& run, LayerRange layers, int64_t first_row, int64_t rows, const float* rstd);
  void full_layer(int64_t layer, int64_t kv_begin, int64_t q_begin);
  void qkv(const LayerWeights& weights, int64_t kv_begin, int64_t q_begin);
  void rope_cache_write(int64_t layer, int64_t kv_begin, int64_t q_begin);
  void attention(int64_t layer, int64_t q_begin);
  void o_proj(const LayerWeights& weights, int64_t q_begin);
  void mlp(int64_t layer, int64_t q_begin);
  void add_features(int64_t layer);
  void final_norm();

  bool normalises_before_projection() const { return spec_.qk_norm_over_heads && spec_.input_norms; }
  Linear layer_input(int64_t begin, const void* weight);
  bool adds_directly(const Linear& weight, const void* bias, const void* out_norm, int64_t rows) const;
  void* update_rows(int64_t begin, bool added) {
    return added ? at(work_.hidden, begin, spec_.hidden_size) : at(work_.gemm_out, begin, work_.out_stride);
  }
  int64_t update_stride(bool added) const { return added ? spec_.hidden_size : work_.out_stride; }
  void set_pending(int64_t begin, bool added, const void* bias, const void* out_norm);
  void apply_pending(int64_t begin, int64_t end) { norm(begin, end, nullptr, nullptr, 0); }
  void norm(int64_t begin, int64_t end, const void* weight, void* out, int64_t out_stride, float* rstd = nullptr);
  void gemm(std::initializer_list<GemmParams> products) {
    backend_.gemm(products.begin(), static_cast<int64_t>(products.size()));
  }

  void* at(void* buffer, int64_t row, int64_t stride) const {
    return static_cast<char*>(buffer) + row * stride * element_;
  }
  const void* at(const void* buffer, int64_t row, int64_t stride) const {
    return static_cast<const char*>(buffer) + row * stride * element_;
  }

  const Model& model_;
  const ModelSpec& spec_;
  const PrefillCall& call_;
  const BatchLayout& layout_;
  Backend& backend_;
  PrefillObserver& observer_;
  const int64_t element_;
  Workspace work_;
  Batch batch_{};
  PendingUpdate pending_;
  bool added_directly_ = false;  // the last update of the hidden states
};

void Prefill::run() {
  build_row_tables();
  embed();
  auto next_run = model_.runs.begin();
  for (int64_t layer = 0; layer < spec_.num_layers;) {
    int64_t end = layer + 1;
    if (next_run == model_.runs.end() || layer < next_run->layers.begin) {
      full_layer(layer, 0, 0);
    } else {
      // Features that are added after a layer change the hidden state of context rows, so they end the run there.
      if (layer >= call_.feature_layers) end = next_run->layers.end;
      omitted_layers(*next_run, {layer, end});
      if (end == next_run->layers.end) ++next_run;
    }
    add_features(end - 1);
    observer_.after_layers();
    layer = end;
  }
  final_norm();
}

// Layers of a run, which share one hidden state of the context rows. Context rows only write their K and V (the
// independent KV projection). Boundary rows then go through the full layers and attend to them (the boundary
// recompute). In the last layer only rows whose logits are wanted need more than K and V.
void Prefill::omitted_layers(const RunWeights& run, LayerRange layers) {
  project_context_rows(run, layers);
  for (int64_t layer = layers.begin; layer < layers.end; ++layer) {
    const bool last = layer == spec_.num_layers - 1;
    full_layer(layer, layout_.context_rows, last ? layout_.wanted_begin : layout_.context_rows);
  }
}

// The full layer for rows [q_begin, rows); rows [kv_begin, q_begin) only write their K and V.
void Prefill::full_layer(int64_t layer, int64_t kv_begin, int64_t q_begin) {
  if (kv_begin == layout_.rows) return;
  const LayerWeights& weights = model_.layers[layer];
  qkv(weights, kv_begin, q_begin);
  rope_cache_write(layer, kv_begin, q_begin);
  attention(layer, q_begin);
  o_proj(weights, q_begin);
  mlp(layer, q_begin);
}

void Prefill::build_row_tables() {
  StageRange stage(observer_, "pop::build_row_tables");
  const std::vector<Segment> segments = layout_.segments(0, layout_.rows);
  RowTablesParams& tables = work_.row_tables;
  tables.segments = segments.data();
  tables.num_segments = static_cast<int64_t>(segments.size());
  backend_.build_row_tables(tables);
  batch_ = {.rows = layout_.rows,
            .sequences = layout_.sequences,
            .row_sequence = tables.row_sequence,
            .row_position = tables.row_position,
            .row_source = tables.row_source,
            .cos = work_.cos,
            .sin = work_.sin,
            .cos_local = work_.cos_local,
            .sin_local = work_.sin_local,
            .address = {.start = tables.start,
                        .slot_table = tables.slot_table,
                        .slot_table_stride = call_.address.slot_table_stride}};
}

void Prefill::embed() {
  StageRange stage(observer_, "pop::embed");
  const bool from_ids = call_.ids != nullptr;
  backend_.embed({.dtype = spec_.dtype,
                  .rows = layout_.rows,
                  .width = spec_.hidden_size,
                  .vocab_size = spec_.vocab_size,
                  .ids = call_.ids,
                  .row_source = batch_.row_source,
                  .table = from_ids ? model_.embed_tokens.data : call_.embeds,
                  .table_stride = from_ids ? model_.embed_tokens.stride : call_.embeds_stride,
                  .out = work_.hidden,
                  .scale = from_ids || spec_.scale_inputs ? static_cast<float>(spec_.embed_scale) : 1.0f});
  for (const auto& [packed, ordered] :
       {std::pair{call_.cos, work_.cos}, std::pair{call_.sin, work_.sin}, std::pair{call_.cos_local, work_.cos_local},
        std::pair{call_.sin_local, work_.sin_local}}) {
    if (packed == nullptr) continue;
    backend_.embed({.dtype = DType::f32,
                    .rows = layout_.rows,
                    .width = spec_.rotary_dim / 2,
                    .vocab_size = 0,
                    .ids = nullptr,
                    .row_source = batch_.row_source,
                    .table = packed,
                    .table_stride = call_.rope_stride,
                    .out = ordered});
  }
}

void Prefill::project_context_rows(const RunWeights& run, LayerRange all) {
  if (layout_.context_rows == 0) return;
  StageRange stage(observer_, "pop::kv_project");
  // The row scales (1 / RMS) are computed by a pass over the rows if an update is pending, which that pass then adds,
  // and if the last product added the update itself. Else the backend computes them. Norms over all heads need
  // normalised rows: they come before the write step, which applies the scales.
  const bool scaled = pending_.begin < layout_.context_rows || added_directly_;
  const bool normalised = normalises_before_projection();
  if (normalised) {
    norm(0, layout_.context_rows, nullptr, work_.gemm_in, work_.row_stride);
  } else if (scaled) {
    norm(0, layout_.context_rows, nullptr, nullptr, 0, work_.rstd);
  }
  const float* rstd = scaled && !normalised ? work_.rstd : nullptr;

  // With window_only, an omitted layer with a window writes only the positions that later rows can see.
  const std::vector<int64_t>& omit = model_.plan.omit;
  const auto window_of = [&](int64_t layer) {
    return call_.window_only && std::binary_search(omit.begin(), omit.end(), layer) ? spec_.window[layer] : 0;
  };
  LayerRange layers{all.begin, all.begin};
  for (; layers.begin < all.end; layers.begin = layers.end) {
    const int64_t window = window_of(layers.begin);
    while (layers.end < all.end && window_of(layers.end) == window) ++layers.end;
    if (window == 0) {
      project(run, layers, 0, layout_.context_rows, rstd);
      continue;
    }
    for (const Segment& segment : layout_.segments(0, layout_.context_rows)) {
      // The first boundary row reads next: it sees the window - 1 positions before it.
      const int64_t rows = std::min(segment.rows, window - 1);
      if (rows > 0) project(run, layers, segment.first_row + segment.rows - rows, rows, rstd);
    }
  }
}

void Prefill::project(const RunWeights& run, LayerRange layers, int64_t first_row, int64_t rows, const float* rstd) {
  const int64_t skip = layers.begin - run.layers.begin;
  const auto from = [skip](const std::vector<const void*>& vectors) { return vectors.data() + skip; };
  const bool normalised = normalises_before_projection();
  const void* x = normalised ? work_.gemm_in : work_.hidden;
  const int64_t x_stride = normalised ? work_.row_stride : spec_.hidden_size;
  backend_.kv_project({.dtype = spec_.dtype,
                       .first_row = first_row,
                       .rows = rows,
                       .hidden_size = spec_.hidden_size,
                       .kv_heads = spec_.num_kv_heads,
                       .head_dim = spec_.head_dim,
                       .rotary_dim = spec_.rotary_dim,
                       .x = at(x, first_row, x_stride),
                       .x_stride = x_stride,
                       .normalise = spec_.input_norms && !normalised,
                       .rstd = rstd == nullptr ? nullptr : rstd + first_row,
                       .layers = layers.size(),
                       .weight = at(run.stack, skip * 2 * spec_.kv_dim(), spec_.hidden_size),
                       .k_bias = spec_.qkv_bias ? from(run.k_bias) : nullptr,
                       .v_bias = spec_.qkv_bias ? from(run.v_bias) : nullptr,
                       .k_norm = spec_.qk_norm ? from(run.k_norm) : nullptr,
                       .eps = static_cast<float>(spec_.rms_norm_eps),
                       .norm_offset = static_cast<float>(spec_.norm_weight_offset),
                       .norm_over_heads = spec_.qk_norm_over_heads,
                       .rope_table = spec_.rope_table.data() + layers.begin,
                       .rope = spec_.rope_form(),
                       .batch = &batch_,
                       .caches = call_.caches + layers.begin,
                       .workspace = work_.scratch});
}

void Prefill::qkv(const LayerWeights& weights, int64_t kv_begin, int64_t q_begin) {
  StageRange stage(observer_, "pop::qkv");
  const Linear input = layer_input(kv_begin, weights.input_norm);
  const int64_t kv_rows = layout_.rows - kv_begin, q_rows = layout_.rows - q_begin;
  const int64_t hidden = spec_.hidden_size, q_dim = spec_.q_dim(), kv_dim = spec_.kv_dim();
  const int64_t q_stride = work_.out_stride, kv_stride = work_.kv_stride;
  const DType dtype = spec_.dtype;
  const auto rows_of = [&](const Linear& w, int64_t begin, int64_t rows) {
    return rows_for(backend_, dtype, w, rows, hidden, at(input.data, begin, input.stride), input.stride,
                    work_.quantized);
  };
  const ProductRows from = rows_of(weights.k_proj, kv_begin, kv_rows);
  // With int8, q alone rounds its rows.
  const ProductRows q_from = weights.q_proj.products == weights.k_proj.products
                                 ? from_row(from, q_begin - kv_begin, dtype)
                                 : rows_of(weights.q_proj, q_begin, q_rows);
  void *q = at(work_.gemm_out, q_begin, q_stride), *k = at(work_.k, kv_begin, kv_stride),
       *v = at(work_.v, kv_begin, kv_stride);
  if (weights.qkv_adjacent && work_.joins_qkv && q_begin == kv_begin) {
    gemm({product(dtype, q_rows, q_dim + 2 * kv_dim, hidden, from, weights.q_proj, q, q_stride)});
  } else {
    gemm({product(dtype, kv_rows, kv_dim, hidden, from, weights.k_proj, k, kv_stride),
          product(dtype, kv_rows, kv_dim, hidden, from, weights.v_proj, v, kv_stride),
          product(dtype, q_rows, q_dim, hidden, q_from, weights.q_proj, q, q_stride)});
  }
  if (!spec_.qk_norm_over_heads) return;
  const float offset = static_cast<float>(spec_.norm_weight_offset), eps = static_cast<float>(spec_.rms_norm_eps);
  norm_over_heads(backend_, spec_.dtype, q, q_rows, q_dim, q_stride, weights.q_norm, offset, eps);
  norm_over_heads(backend_, spec_.dtype, k, kv_rows, kv_dim, kv_stride, weights.k_norm, offset, eps);
}

void Prefill::rope_cache_write(int64_t layer, int64_t kv_begin, int64_t q_begin) {
  StageRange stage(observer_, "pop::rope_cache_write");
  const LayerWeights& weights = model_.layers[layer];
  const auto write = [&](int64_t begin, int64_t end, bool with_q) {
    if (begin == end) return;
    backend_.rope_cache_write({.dtype = spec_.dtype,
                               .heads = spec_.num_heads,
                               .kv_heads = spec_.num_kv_heads,
                               .head_dim = spec_.head_dim,
                               .rotary_dim = spec_.rotary_dim,
                               .first_row = begin,
                               .rows = end - begin,
                               .q = with_q ? at(work_.gemm_out, begin, work_.out_stride) : nullptr,
                               .q_stride = work_.out_stride,
                               .k = at(work_.k, begin, work_.kv_stride),
                               .v = at(work_.v, begin, work_.kv_stride),
                               .kv_stride = work_.kv_stride,
                               .q_bias = weights.q_bias,
                               .k_bias = weights.k_bias,
                               .v_bias = weights.v_bias,
                               .q_norm = spec_.qk_norm_over_heads ? nullptr : weights.q_norm,
                               .k_norm = spec_.qk_norm_over_heads ? nullptr : weights.k_norm,
                               .norm_eps = static_cast<float>(spec_.rms_norm_eps),
                               .norm_offset = static_cast<float>(spec_.norm_weight_offset),
                               .rope_table = spec_.rope_table[layer],
                               .q_rope_table = spec_.query_rope ? 1 : spec_.rope_table[layer],
                               .rope = spec_.rope_form(),
                               .row_scale = nullptr,
                               .batch = &batch_,
                               .cache = call_.caches[layer]});
  };
  write(kv_begin, q_begin, false);
  write(q_begin, layout_.rows, true);
}

void Prefill::attention(int64_t layer, int64_t q_begin) {
  StageRange stage(observer_, "pop::attention");
  const std::vector<Segment> segments = layout_.attention_segments(q_begin, layout_.rows);
  backend_.attention({.dtype = spec_.dtype,
                      .heads = spec_.num_heads,
                      .kv_heads = spec_.num_kv_heads,
                      .head_dim = spec_.head_dim,
                      .scale = static_cast<float>(spec_.attention_scale),
                      .softcap = static_cast<float>(spec_.attention_softcap),
                      .window = spec_.window[layer],
                      .sinks = model_.layers[layer].sinks,
                      .segments = segments.data(),
                      .num_segments = static_cast<int64_t>(segments.size()),
                      .first_row = 0,
                      .q = work_.gemm_out,
                      .q_stride = work_.out_stride,
                      .out = work_.gemm_in,
                      .out_stride = work_.row_stride,
                      .cache = call_.caches[layer],
                      .address = batch_.address});
}

void Prefill::o_proj(const LayerWeights& weights, int64_t q_begin) {
  StageRange stage(observer_, "pop::o_proj");
  const int64_t rows = layout_.rows - q_begin, stride = work_.row_stride;
  const ProductRows attended = rows_for(backend_, spec_.dtype, weights.o_proj, rows, spec_.q_dim(),
                                        at(work_.gemm_in, q_begin, stride), stride, work_.quantized);
  const bool added = adds_directly(weights.o_proj, weights.o_bias, weights.attention_out_norm, rows);
  GemmParams update = product(spec_.dtype, rows, spec_.hidden_size, spec_.q_dim(), attended, weights.o_proj,
                              update_rows(q_begin, added), update_stride(added));
  update.accumulate = added;
  gemm({update});
  set_pending(q_begin, added, weights.o_bias, weights.attention_out_norm);
}

void Prefill::mlp(int64_t layer, int64_t q_begin) {
  StageRange stage(observer_, "pop::mlp");
  const LayerWeights& weights = model_.layers[layer];
  const Linear from = layer_input(q_begin, weights.post_norm);
  const bool sparse = spec_.sparse[layer] != 0;
  const int64_t rows = layout_.rows - q_begin;
  const bool added = !sparse && adds_directly(weights.down_proj, weights.down_bias, weights.mlp_out_norm, rows);
  run_mlp({.spec = spec_,
           .weights = weights,
           .sparse = sparse,
           .products = model_.products,
           .rows = rows,
           .x = at(from.data, q_begin, from.stride),
           .x_stride = from.stride,
           .out = update_rows(q_begin, added),
           .out_stride = update_stride(added),
           .accumulate = added,
           .workspace = work_.scratch,
           .quantized = work_.quantized},
          backend_);
  set_pending(q_begin, added, weights.down_bias, weights.mlp_out_norm);
}

void Prefill::add_features(int64_t layer) {
  if (layer >= call_.feature_layers) return;
  StageRange stage(observer_, "pop::add_features");
  apply_pending(0, layout_.rows);
  const LayerFeatures& features = call_.features[layer];
  backend_.add_features({.dtype = spec_.dtype,
                         .rows = layout_.rows,
                         .width = spec_.hidden_size,
                         .row_source = batch_.row_source,
                         .index = call_.feature_index,
                         .num_features = features.rows,
                         .features = features.data,
                         .features_stride = features.stride,
                         .out = work_.hidden});
}

void Prefill::final_norm() {
  StageRange stage(observer_, "pop::final_norm");
  norm(layout_.wanted_begin, layout_.rows, model_.norm, call_.hidden_states, spec_.hidden_size);
}

// True if the product with `weight` can add its result to the hidden states: nothing is done to it before.
bool Prefill::adds_directly(const Linear& weight, const void* bias, const void* out_norm, int64_t rows) const {
  return bias == nullptr && out_norm == nullptr && spec_.residual_scale == 1.0 && weight.scale == nullptr &&
         backend_.accumulates(spec_.dtype, rows);
}

// After the update of rows from `begin` on was computed, or added.
void Prefill::set_pending(int64_t begin, bool added, const void* bias, const void* out_norm) {
  pending_ = {.begin = added ? layout_.rows : begin, .bias = bias, .norm = out_norm};
  added_directly_ = added;
}

// Adds the pending update to rows from `begin` on, and returns what attention or the MLP reads: those rows of the
// hidden states, normalised with `weight` if the family has input norms.
Linear Prefill::layer_input(int64_t begin, const void* weight) {
  if (!spec_.input_norms) {
    apply_pending(begin, layout_.rows);
    return {work_.hidden, spec_.hidden_size};
  }
  norm(begin, layout_.rows, weight, at(work_.gemm_in, begin, work_.row_stride), work_.row_stride);
  return {work_.gemm_in, work_.row_stride};
}

// For rows [begin, end): adds the pending update to the hidden states, then out = rms_norm(hidden) * weight and rstd,
// each [end - begin] rows and skipped if null.
void Prefill::norm(int64_t begin, int64_t end, const void* weight, void* out, int64_t out_stride, float* rstd) {
  const int64_t split = std::clamp(pending_.begin, begin, end);
  const auto norm_rows = [&](int64_t first, int64_t last, bool pending) {
    if (first == last || (!pending && out == nullptr && rstd == nullptr)) return;
    backend_.rms_norm({.dtype = spec_.dtype,
                       .rows = last - first,
                       .width = spec_.hidden_size,
                       .x = at(work_.hidden, first, spec_.hidden_size),
                       .x_stride = spec_.hidden_size,
                       .delta = pending ? at(work_.gemm_out, first, work_.out_stride) : nullptr,
                       .delta_stride = work_.out_stride,
                       .delta_bias = pending ? pending_.bias : nullptr,
                       .delta_norm = pending ? pending_.norm : nullptr,
                       .delta_scale = static_cast<float>(spec_.residual_scale),
                       .weight = weight,
                       .weight_offset = static_cast<float>(spec_.norm_weight_offset),
                       .eps = static_cast<float>(spec_.rms_norm_eps),
                       .out = out == nullptr ? nullptr : at(out, first - begin, out_stride),
                       .out_stride = out_stride,
                       .rstd = rstd == nullptr ? nullptr : rstd + (first - begin)});
  };
  norm_rows(begin, split, false);
  norm_rows(split, end, true);
  pending_.begin = std::max(pending_.begin, end);
}

}  // namespace

void prefill(const Model& model, const PrefillCall& call, Backend& backend, PrefillObserver& observer) {
  Prefill(model, call, backend, observer).run();
}

}  // namespace pop
