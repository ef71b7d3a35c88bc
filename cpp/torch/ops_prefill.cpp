// pop::load, unload, info and prefill, and the operators that describe the process.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/int8_kernels.h"
#include "cpu/kernels.h"
#include "torch/aten.h"
#include "torch/backends.h"
#include "torch/caches.h"
#include "torch/checks.h"
#include "torch/device_keys.h"
#include "torch/forks.h"
#include "torch/geometry.h"
#include "torch/handles.h"
#include "torch/interrupts.h"
#include "torch/negated.h"
#include "torch/profile.h"
#include "torch/schemas.h"
#include "torch/texts.h"

namespace pop {

namespace {

constexpr const char* kOp = "pop::prefill";

class CallObserver final : public ProfilerStages {
 public:
  void after_layers() override { poll_(); }

 private:
  InterruptPoll poll_;
};

int64_t load(TextArgument spec, TextArgument plan, std::vector<Tensor> weights,
             std::optional<std::vector<Tensor>> projections, bool fp8, bool prepack, bool int8,
             std::optional<std::vector<Tensor>> scales) try {
  check(!fp8 || !int8, "pop::load: int8: expected False with fp8=True, got True");
  const Products products = fp8 ? Products::fp8 : int8 ? Products::int8 : Products::plain;
  const ModelSpec parsed = ModelSpec::from_json(spec.text);
  return register_model(std::make_shared<LoadedModel>(parsed, Plan::from_json(plan.text), std::move(weights),
                                                      std::move(scales).value_or(std::vector<Tensor>{}), projections,
                                                      products, prepack));
} catch (const std::invalid_argument& error) {
  throw std::runtime_error(join("pop::load: ", error.what()));
}

Utf8 products_missing_op(TextArgument products, TextArgument spec, Tensor like) try {
  check_tensor(like, "pop::products_missing: like");
  return utf8(products_missing(parse_products(products.text), ModelSpec::from_json(spec.text), like));
} catch (const std::invalid_argument& error) {
  throw std::runtime_error(join("pop::products_missing: ", error.what()));
}

Utf8 prepack_missing_op(TextArgument spec, Tensor like) try {
  check_tensor(like, "pop::prepack_missing: like");
  return utf8(prepack_missing(ModelSpec::from_json(spec.text), like));
} catch (const std::invalid_argument& error) {
  throw std::runtime_error(join("pop::prepack_missing: ", error.what()));
}

Utf8 device_missing_op(Tensor like) {
  check_tensor(like, "pop::device_missing: like");
  return utf8(device_missing(like));
}

void unload(int64_t model) { unregister_model(model); }

Utf8 info(int64_t handle) {
  const auto loaded = find_model(handle);
  return utf8(join("{\"spec\": ", loaded->model().spec.to_json(), ", \"plan\": ", loaded->model().plan.to_json(),
                   ", \"products\": \"", to_string(loaded->model().products), "\", \"prepacked\": ",
                   loaded->model().prepacked ? "true" : "false", ", \"extra_bytes\": ", loaded->extra_bytes(), "}"));
}

int64_t extra_bytes(int64_t handle) { return find_model(handle)->extra_bytes(); }

int64_t stale_index(int64_t handle) { return find_model(handle)->stale_index(); }

Utf8 stale_weight(int64_t handle) {
  const auto loaded = find_model(handle);
  const int64_t index = loaded->stale_index();
  return index < 0 ? Utf8{} : utf8(loaded->weight_name(index));
}

// The packed ids as int64, or none if `input` is embeddings. Ids in host memory are checked against the vocabulary.
std::optional<Tensor> check_input(const ModelSpec& spec, const Tensor& input, const Tensor& like) {
  const std::string name = join(kOp, ": input");
  check_same_device(input, like, name);
  if (input.dim() == 2) {
    check_dtype(input, spec.dtype, name + " (embeddings)");
    check_shape(input, {-1, spec.hidden_size}, name + " (embeddings)");
    check_last_dim_contiguous(input, name + " (embeddings)");
    return std::nullopt;
  }
  check(input.dim() == 1, name, ": expected ids [rows] or embeddings [rows, ", spec.hidden_size, "], got ",
        shape_of(input));
  check(type_of(input) == ScalarType::Long || type_of(input) == ScalarType::Int, name,
        ": expected ids of dtype int64 or int32, got ", dtype_name(input));
  const Tensor ids = torch::stable::contiguous(torch::stable::to(input, ScalarType::Long));
  if (!ids.is_cpu()) return ids;  // reading them would synchronise: the kernel clamps and reports
  const int64_t* data = static_cast<const int64_t*>(ids.const_data_ptr());
  for (int64_t row = 0; row < ids.numel(); ++row) {
    check(data[row] >= 0 && data[row] < spec.vocab_size, name, ": expected ids from 0 to ", spec.vocab_size - 1,
          ", got ", data[row], " at row ", row);
  }
  return ids;
}

// cos or sin as contiguous float32 rows of rotary_dim or rotary_dim / 2 values; both halves of a full row are equal.
Tensor check_rope(const ModelSpec& spec, const Tensor& table, int64_t rows, const Tensor& like, const char* argument) {
  const std::string name = join(kOp, ": ", argument);
  check_same_device(table, like, name);
  dtype_of(table, name);
  check(table.dim() == 2 && table.size(0) == rows &&
            (table.size(1) == spec.rotary_dim || table.size(1) == spec.rotary_dim / 2),
        name, ": expected shape [", rows, ", ", spec.rotary_dim, "] or [", rows, ", ", spec.rotary_dim / 2, "], got ",
        shape_of(table));
  return torch::stable::contiguous(torch::stable::to(table, ScalarType::Float));
}

// RoPE table 1, required if and only if the model has layers that use it; same shape as the first table.
std::optional<Tensor> check_local_rope(const ModelSpec& spec, const std::optional<Tensor>& table, const Tensor& cos,
                                       const Tensor& like, const char* argument) {
  const bool wanted = spec.has_local_rope();
  check(table.has_value() == wanted, kOp, ": ", argument, ": expected ", wanted ? "a table" : "none",
        " (the model has ", wanted ? "" : "no ", "layers with a RoPE of their own), got ", wanted ? "none" : "one");
  if (!wanted) return std::nullopt;
  const Tensor rows = check_rope(spec, *table, cos.size(0), like, argument);
  check_shape(rows, {cos.size(0), cos.size(1)}, join(kOp, ": ", argument));
  return rows;
}

// The row of `features` of each packed row, or -1, as int64. Indices in host memory are checked.
std::optional<Tensor> check_feature_index(const std::optional<Tensor>& index,
                                          const std::optional<std::vector<Tensor>>& features, int64_t rows,
                                          const Tensor& like) {
  const std::string name = join(kOp, ": feature_index");
  check(index.has_value() == features.has_value(), name, ": expected ", features.has_value() ? "a table" : "none", " (",
        features.has_value() ? "" : "no ", "features are given), got ", index.has_value() ? "one" : "none");
  if (!index.has_value()) return std::nullopt;
  check_same_device(*index, like, name);
  check_shape(*index, {rows}, name);
  check(type_of(*index) == ScalarType::Long || type_of(*index) == ScalarType::Int, name,
        ": expected dtype int64 or int32, got ", dtype_name(*index));
  const Tensor rows_of = torch::stable::contiguous(torch::stable::to(*index, ScalarType::Long));
  if (!rows_of.is_cpu() || features->empty()) return rows_of;  // the kernel ignores indices out of range
  const int64_t* data = static_cast<const int64_t*>(rows_of.const_data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    check(data[row] >= -1 && data[row] < (*features)[0].size(0), name, ": expected -1 to ", (*features)[0].size(0) - 1,
          " (rows of features), got ", data[row], " at row ", row);
  }
  return rows_of;
}

std::vector<LayerFeatures> check_features(const ModelSpec& spec, const std::optional<std::vector<Tensor>>& features,
                                          const Tensor& like) {
  std::vector<LayerFeatures> layers;
  if (!features.has_value()) return layers;
  check(static_cast<int64_t>(features->size()) <= spec.num_layers, kOp, ": features: expected at most ",
        spec.num_layers, " tensors (one for each of the first layers), got ", features->size());
  for (const Tensor& layer : *features) {
    const std::string name = join(kOp, ": features[", layers.size(), "]");
    check_resolved(layer, name);
    check_same_device(layer, like, name);
    check_dtype(layer, spec.dtype, name);
    check_shape(layer, {(*features)[0].size(0), spec.hidden_size}, name);
    check_last_dim_contiguous(layer, name);
    layers.push_back({.data = layer.const_data_ptr(), .rows = layer.size(0), .stride = layer.stride(0)});
  }
  return layers;
}

Tensor prefill_op(int64_t handle, Tensor input, Tensor cos, Tensor sin, Tensor cu_seqlens, Tensor past_lens,
                  Tensor cache_start, Tensor boundary, Tensor logits_to_keep, std::vector<Tensor> key_cache,
                  std::vector<Tensor> value_cache, std::optional<Tensor> slot_table, bool restore_on_error,
                  bool window_only, std::optional<Tensor> cos_local, std::optional<Tensor> sin_local,
                  std::optional<Tensor> blocks, std::optional<Tensor> feature_index,
                  std::optional<std::vector<Tensor>> features) {
  const auto loaded = find_model(handle);
  const Model& model = loaded->model();
  const ModelSpec& spec = model.spec;
  const Tensor& like = loaded->embed_tokens();
  const int64_t stale = loaded->stale_index();
  check(stale < 0, kOp, ": weight ", stale < 0 ? "" : loaded->weight_name(stale),
        ": expected the memory, dtype and values it was loaded with, got others; ",
        "call native.refresh() (or load the model again)");
  const std::optional<Tensor> ids = check_input(spec, input, like);
  const int64_t rows = input.size(0);
  const Tensor cos_rows = check_rope(spec, cos, rows, like, "cos");
  const Tensor sin_rows = check_rope(spec, sin, rows, like, "sin");
  check_shape(sin_rows, {rows, cos_rows.size(1)}, join(kOp, ": sin"));
  const std::optional<Tensor> cos_local_rows = check_local_rope(spec, cos_local, cos_rows, like, "cos_local");
  const std::optional<Tensor> sin_local_rows = check_local_rope(spec, sin_local, cos_rows, like, "sin_local");
  const auto floats = [](const std::optional<Tensor>& table) {
    return table.has_value() ? static_cast<const float*>(table->const_data_ptr()) : nullptr;
  };
  const std::vector<LayerFeatures> layer_features = check_features(spec, features, like);
  const std::optional<Tensor> feature_rows = check_feature_index(feature_index, features, rows, like);
  for (const auto& [given, name] : {std::pair{&key_cache, "key_cache"}, std::pair{&value_cache, "value_cache"}}) {
    check(static_cast<int64_t>(given->size()) == spec.num_layers, kOp, ": ", name, ": expected ", spec.num_layers,
          " tensors (one a layer), got ", given->size());
  }
  const int64_t capacity = capacity_of(key_cache.front(), join(kOp, ": key_cache[0]"));
  const Geometry geometry(kOp, {cu_seqlens, past_lens, cache_start, slot_table, capacity}, rows, &boundary,
                          &logits_to_keep, blocks);
  const CacheForm form{.dtype = spec.dtype, .kv_heads = spec.num_kv_heads, .head_dim = spec.head_dim};
  OtherTensors others{.written = {}, .read = {}, .resident = &loaded->resident_weights()};
  const auto add_read = [&](const std::optional<Tensor>& tensor, const char* name) {
    if (tensor.has_value()) others.read.push_back({*tensor, join(kOp, ": ", name)});
  };
  add_read(input, "input");
  add_read(cos, "cos");
  add_read(sin, "sin");
  add_read(cos_local, "cos_local");
  add_read(sin_local, "sin_local");
  add_read(feature_index, "feature_index");
  if (features.has_value()) {
    for (const Tensor& layer : *features) add_read(layer, "features");
  }
  const std::vector<LayerCache> caches = check_caches(kOp, geometry, form, key_cache, value_cache, like, others);

  check_reported_ids(like);
  const BackendOfCall backend_of_call(like);
  Backend& backend = *backend_of_call;
  const BatchLayout& layout = geometry.layout();
  // The large allocations come before the first cache write. If a later step fails, the guard restores the caches.
  PrefillCall call{
      .layout = &layout,
      .ids = ids.has_value() ? static_cast<const int64_t*>(ids->const_data_ptr()) : nullptr,
      .embeds = ids.has_value() ? nullptr : input.const_data_ptr(),
      .embeds_stride = input.stride(0),
      .cos = static_cast<const float*>(cos_rows.const_data_ptr()),
      .sin = static_cast<const float*>(sin_rows.const_data_ptr()),
      .cos_local = floats(cos_local_rows),
      .sin_local = floats(sin_local_rows),
      .rope_stride = cos_rows.size(1),
      .address = geometry.address(),
      .caches = caches.data(),
      .window_only = window_only,
      .feature_index = feature_rows.has_value() ? static_cast<const int64_t*>(feature_rows->const_data_ptr()) : nullptr,
      .features = layer_features.data(),
      .feature_layers = static_cast<int64_t>(layer_features.size()),
      .hidden_states = nullptr,
      .workspace = nullptr};
  const Tensor hidden = torch::stable::new_empty(like, {layout.rows - layout.wanted_begin, spec.hidden_size});
  const Tensor workspace =
      torch::stable::new_empty(like, {static_cast<int64_t>(workspace_bytes(model, call, backend))}, ScalarType::Byte);
  CacheGuard guard(restore_on_error, backend, geometry, key_cache, value_cache);
  CallObserver observer;
  call.hidden_states = hidden.mutable_data_ptr();
  call.workspace = workspace.mutable_data_ptr();
  prefill(model, call, backend, observer);
  guard.keep();
  return hidden;
}

Utf8 foreign_schemas() { return utf8(foreign::kSchemas); }

void set_foreign(TextArgument name, int64_t variant, TextArgument reason) {
  foreign::set_variant(name.text, static_cast<int>(variant), reason.text);
}

int64_t tune_op(TextArgument option, int64_t value) { return tune(option.text, value); }

void set_interrupt_check_op(int64_t address) { set_interrupt_check(address); }

Utf8 cpu_isa() { return utf8(cpu::kernels().name); }

Utf8 int8_isa() { return utf8(cpu::int8_kernels().name); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pop, CompositeExplicitAutograd, m) {
  m.impl("load", TORCH_BOX(&ChecksThreads<&load>::call));
  m.impl("products_missing_utf8", TORCH_BOX(&products_missing_op));
  m.impl("prepack_missing_utf8", TORCH_BOX(&prepack_missing_op));
  m.impl("device_missing_utf8", TORCH_BOX(&device_missing_op));
  m.impl("unload", TORCH_BOX(&unload));
  m.impl("info_utf8", TORCH_BOX(&info));
  m.impl("extra_bytes", TORCH_BOX(&extra_bytes));
  m.impl("stale_index", TORCH_BOX(&stale_index));
  m.impl("stale_weight_utf8", TORCH_BOX(&stale_weight));
  m.impl("foreign_schemas_utf8", TORCH_BOX(&foreign_schemas));
  m.impl("set_foreign", TORCH_BOX(&set_foreign));
  m.impl("tune", TORCH_BOX(&tune_op));
  m.impl("set_interrupt_check", TORCH_BOX(&set_interrupt_check_op));
  m.impl("cpu_isa_utf8", TORCH_BOX(&cpu_isa));
  m.impl("int8_isa_utf8", TORCH_BOX(&int8_isa));
}

static void implement(torch::stable::detail::StableLibrary& m) {  // no template: gcc 12 would not instantiate them
  m.impl("prefill", TORCH_BOX(&ChecksThreads<&prefill_op>::call));
}

POP_IMPL_ON_DEVICES(implement)

STABLE_TORCH_LIBRARY_IMPL(pop, Negative, m) {
  m.impl("prefill", TORCH_BOX((&ChecksThreads<&OfNegated<&prefill_op, kPrefillSchema>::call>::call)));
}

}  // namespace pop
