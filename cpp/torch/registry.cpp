#include "torch/registry.h"

#include <algorithm>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "torch/aten.h"
#include "torch/backends.h"
#include "torch/checks.h"

namespace pop {

namespace {

// A hash of up to 64 elements spread over a tensor in host memory: notices a change made
// through `.data`, which leaves the version counter alone.
uint64_t sample_of(const Tensor& tensor) {
  if (!tensor.is_cpu() || tensor.numel() == 0) return 0;
  constexpr int64_t kSamples = 64;
  const int64_t element = element_size(dtype_of(tensor, "weight"));
  const char* data = static_cast<const char*>(tensor.const_data_ptr());
  const int64_t cols = tensor.size(tensor.dim() - 1);
  const int64_t row_stride = tensor.dim() > 1 ? tensor.stride(0) : 0;
  uint64_t hash = 0xcbf29ce484222325ull;  // FNV-1a
  for (int64_t i = 0; i < kSamples; ++i) {
    const int64_t index = (tensor.numel() - 1) * i / (kSamples - 1);
    const char* bytes = data + ((index / cols) * row_stride + index % cols) * element;
    for (int64_t b = 0; b < element; ++b) hash = (hash ^ static_cast<unsigned char>(bytes[b])) * 0x100000001b3ull;
  }
  return hash;
}

bool is_folded(const std::string& name) {
  return name.ends_with(".k_proj") || name.ends_with(".v_proj") || name.ends_with(".input_norm");
}

// Copies are of the matrices of dense layers.
std::string dense_missing(const ModelSpec& spec) {
  return spec.has_experts() ? join("expected a model without experts, got one of ", spec.num_experts) : "";
}

// A layer's matrices, of which `fp8` and `prepack` make copies.
struct NamedLinear {
  const char* name;
  Linear LayerWeights::* linear;
};
constexpr NamedLinear kLinears[] = {{"q_proj", &LayerWeights::q_proj},       {"k_proj", &LayerWeights::k_proj},
                                    {"v_proj", &LayerWeights::v_proj},       {"o_proj", &LayerWeights::o_proj},
                                    {"gate_proj", &LayerWeights::gate_proj}, {"up_proj", &LayerWeights::up_proj},
                                    {"down_proj", &LayerWeights::down_proj}};

bool is_matrix(const std::string& name) {
  return std::ranges::any_of(kLinears,
                             [&](const NamedLinear& linear) { return name.ends_with(join(".", linear.name)); });
}

// What a norm multiplies with: its weight and the family's offset, in float32.
Tensor gamma_of(const Tensor& norm, double offset) {
  const Tensor gamma = torch::stable::to(aten::detach(norm), ScalarType::Float);
  if (offset == 0) return gamma;
  Tensor minus = torch::stable::empty_like(gamma);
  torch::stable::fill_(minus, -offset);
  return torch::stable::subtract(gamma, minus);
}

struct Registry {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<const LoadedModel>> models;
  int64_t next_handle = 1;
};

Registry& registry() {
  static Registry instance;
  return instance;
}

}  // namespace

Tensor fold_kv(const std::vector<Tensor>& k_proj, const std::vector<Tensor>& v_proj,
               const std::vector<Tensor>& input_norm, double norm_offset) {
  check(!k_proj.empty() && k_proj.size() == v_proj.size() && (input_norm.empty() || k_proj.size() == input_norm.size()),
        "pop::fold_kv: expected k_proj, v_proj and input_norm of one length > 0, got ", k_proj.size(), ", ",
        v_proj.size(), " and ", input_norm.size());
  const Tensor& first = k_proj.front();
  dtype_of(first, "pop::fold_kv: k_proj[0]");
  check_shape(first, {-1, -1}, "pop::fold_kv: k_proj[0]");
  const int64_t kv_dim = first.size(0), hidden = first.size(1);
  const int64_t count = static_cast<int64_t>(k_proj.size());
  Tensor stack = torch::stable::new_empty(first, {count * 2 * kv_dim, hidden});
  int64_t row = 0;
  for (int64_t i = 0; i < count; ++i) {
    const std::string at = join("[", i, "]");
    std::optional<Tensor> gamma;
    if (!input_norm.empty()) {
      check_like(input_norm[i], first, "pop::fold_kv: input_norm" + at);
      check_shape(input_norm[i], {hidden}, "pop::fold_kv: input_norm" + at);
      gamma = gamma_of(input_norm[i], norm_offset);
    }
    for (const auto& [weight, name] : {std::pair{&k_proj[i], "k_proj"}, std::pair{&v_proj[i], "v_proj"}}) {
      check_like(*weight, first, join("pop::fold_kv: ", name, at));
      check_shape(*weight, {kv_dim, hidden}, join("pop::fold_kv: ", name, at));
      Tensor rows = torch::stable::narrow(stack, 0, row, kv_dim);
      const Tensor plain = aten::detach(*weight);
      // In float32, so that the fold rounds once.
      torch::stable::copy_(rows, gamma ? aten::mul(torch::stable::to(plain, ScalarType::Float), *gamma) : plain);
      row += kv_dim;
    }
  }
  return stack;
}

std::string fp8_missing(const ModelSpec& spec, const Tensor& like) {
  if (std::string missing = dense_missing(spec); !missing.empty()) return missing;
  const std::pair<int64_t, const char*> sizes[] = {{spec.hidden_size, "hidden_size"},
                                                   {spec.q_dim(), "num_heads * head_dim"},
                                                   {spec.kv_dim(), "num_kv_heads * head_dim"},
                                                   {spec.intermediate_size, "intermediate_size"}};
  for (const auto& [size, name] : sizes) {
    if (size % kFp8Multiple == 0) continue;
    return join("expected ", name, " to be a multiple of ", kFp8Multiple, ", got ", size);
  }
  return BackendOfCall(like)->fp8_missing(spec.dtype);
}

std::string prepack_missing(const ModelSpec& spec, const Tensor& like) {
  if (std::string missing = dense_missing(spec); !missing.empty()) return missing;
  return BackendOfCall(like)->prepack_missing(spec.dtype);
}

LoadedModel::LoadedModel(const ModelSpec& spec, const Plan& plan, std::vector<Tensor> weights,
                         const std::optional<std::vector<Tensor>>& projections, bool fp8, bool prepack)
    : slots_(spec.weight_slots()), weights_(std::move(weights)) {
  check(!fp8 || !prepack, "pop::load: prepack: expected False with fp8=True, got True");
  check(plan.num_layers == spec.num_layers, "pop::load: plan: expected num_layers ", spec.num_layers,
        " like the model, got ", plan.num_layers);
  check_head_dim(spec.head_dim, "pop::load: spec");
  check(weights_.size() == slots_.size(), "pop::load: weights: expected ", slots_.size(), " tensors, got ",
        weights_.size());
  for (size_t i = 0; i < slots_.size(); ++i) {
    index_[slots_[i].name] = i;
    const std::string name = "pop::load: weight " + slots_[i].name;
    check_dtype(weights_[i], spec.dtype, name);
    check_shape(weights_[i], slots_[i].shape, name);
    check_same_device(weights_[i], weights_.front(), name);
    check_last_dim_contiguous(weights_[i], name);
    check(weights_[i].is_cpu() || weights_[i].is_cuda(), name,
          ": expected memory on a CPU or a CUDA device, got another device, or a meta or fake tensor");
  }
  model_.spec = spec;
  model_.plan = plan;
  model_.embed_tokens = {weight("embed_tokens")->const_data_ptr(), weight("embed_tokens")->stride(0)};
  model_.norm = weight("norm")->const_data_ptr();
  model_.layers.resize(spec.num_layers);
  for (int64_t layer = 0; layer < spec.num_layers; ++layer) set_layer(layer);
  for (const LayerRange& layers : plan.projected_runs()) fold(layers);
  if (projections.has_value()) place_projections(*projections);
  if (fp8) quantize_layers();
  if (prepack) prepack_layers();
  stamps_.reserve(slots_.size());
  for (size_t i = 0; i < slots_.size(); ++i) stamps_.push_back(stamp_of(i));
}

const Tensor* LoadedModel::weight(const std::string& name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &weights_[found->second];
}

void LoadedModel::set_layer(int64_t layer) {
  const std::string prefix = join("layers.", layer, ".");
  const auto vector = [&](const char* name) -> const void* {
    const Tensor* tensor = weight(prefix + name);
    return tensor == nullptr ? nullptr : tensor->const_data_ptr();
  };
  const auto linear = [&](const char* name) -> Linear {
    const Tensor* tensor = weight(prefix + name);
    if (tensor == nullptr) return {};
    return {tensor->const_data_ptr(), tensor->stride(0)};
  };
  const auto stack = [&](const char* name) -> LinearStack {
    const Tensor* tensor = weight(prefix + name);
    if (tensor == nullptr) return {};
    return {tensor->const_data_ptr(), tensor->stride(0), tensor->stride(1)};
  };
  model_.layers[layer] = {.input_norm = vector("input_norm"),
                          .post_norm = vector("post_norm"),
                          .attention_out_norm = vector("attention_out_norm"),
                          .mlp_out_norm = vector("mlp_out_norm"),
                          .q_proj = linear("q_proj"),
                          .k_proj = linear("k_proj"),
                          .v_proj = linear("v_proj"),
                          .o_proj = linear("o_proj"),
                          .q_bias = vector("q_bias"),
                          .k_bias = vector("k_bias"),
                          .v_bias = vector("v_bias"),
                          .o_bias = vector("o_bias"),
                          .q_norm = vector("q_norm"),
                          .k_norm = vector("k_norm"),
                          .gate_proj = linear("gate_proj"),
                          .up_proj = linear("up_proj"),
                          .down_proj = linear("down_proj"),
                          .gate_bias = vector("gate_bias"),
                          .up_bias = vector("up_bias"),
                          .down_bias = vector("down_bias"),
                          .router = linear("router"),
                          .experts_gate_up = stack("experts_gate_up"),
                          .experts_down = stack("experts_down")};
}

void LoadedModel::fold(LayerRange layers) {
  std::vector<Tensor> k, v, gamma;
  RunWeights run{.layers = layers, .stack = nullptr, .k_bias = {}, .v_bias = {}, .k_norm = {}};
  for (int64_t layer = layers.begin; layer < layers.end; ++layer) {
    const std::string prefix = join("layers.", layer, ".");
    k.push_back(*weight(prefix + "k_proj"));
    v.push_back(*weight(prefix + "v_proj"));
    if (model_.spec.input_norms) gamma.push_back(*weight(prefix + "input_norm"));
    run.k_bias.push_back(model_.layers[layer].k_bias);
    run.v_bias.push_back(model_.layers[layer].v_bias);
    run.k_norm.push_back(model_.layers[layer].k_norm);
  }
  const Tensor stack = fold_kv(k, v, gamma, model_.spec.norm_weight_offset);
  run.stack = stack.const_data_ptr();
  extra_bytes_ += stack.numel() * element_size(model_.spec.dtype);
  stacks_.push_back(stack);
  model_.runs.push_back(std::move(run));
}

// Over the folded rows of their layers. What was folded is watched all the same: a fit belongs to those weights.
void LoadedModel::place_projections(const std::vector<Tensor>& projections) {
  const std::vector<int64_t>& omit = model_.plan.omit;
  const int64_t rows = 2 * model_.spec.kv_dim();
  check(projections.size() == omit.size(), "pop::load: projections: expected ", omit.size(),
        " matrices (one an omitted layer), got ", projections.size());
  for (size_t i = 0; i < omit.size(); ++i) {
    const std::string name = join("pop::load: projections[", i, "]");
    check_dtype(projections[i], model_.spec.dtype, name);
    check_shape(projections[i], {rows, model_.spec.hidden_size}, name);
    check_same_device(projections[i], weights_.front(), name);
    for (size_t run = 0; run < model_.runs.size(); ++run) {
      const LayerRange& layers = model_.runs[run].layers;
      if (omit[i] < layers.begin || omit[i] >= layers.end) continue;
      Tensor place = torch::stable::narrow(stacks_[run], 0, (omit[i] - layers.begin) * rows, rows);
      torch::stable::copy_(place, aten::detach(projections[i]));
    }
  }
}

bool LoadedModel::is_projected(int64_t layer) const {
  return std::ranges::any_of(
      model_.runs, [&](const RunWeights& run) { return layer >= run.layers.begin && layer < run.layers.end; });
}

// copy(given, linear) for the matrices of the layers that context rows pass through: boundary rows read those of the
// others as they are.
template <class Copy>
void LoadedModel::copy_matrices(const Copy& copy) {
  for (int64_t layer = 0; layer < model_.spec.num_layers; ++layer) {
    if (is_projected(layer)) continue;
    for (const NamedLinear& named : kLinears) {
      copy(*weight(join("layers.", layer, ".", named.name)), model_.layers[layer].*named.linear);
    }
  }
}

// One scale a row of a matrix.
void LoadedModel::quantize_layers() {
  const std::string missing = fp8_missing(model_.spec, weights_.front());
  check(missing.empty(), "pop::load: fp8: ", missing);
  const BackendOfCall backend(weights_.front());
  copy_matrices([&](const Tensor& given, Linear& linear) {
    const Tensor matrix = torch::stable::new_empty(given, {given.size(0), given.size(1)}, ScalarType::Float8_e4m3fn);
    const Tensor scale = torch::stable::new_empty(given, {given.size(0)}, ScalarType::Float);
    backend->quantize_rows({.dtype = model_.spec.dtype,
                            .rows = given.size(0),
                            .width = given.size(1),
                            .x = given.const_data_ptr(),
                            .x_stride = given.stride(0),
                            .out = static_cast<uint8_t*>(matrix.mutable_data_ptr()),
                            .out_stride = given.size(1),
                            .scale = static_cast<float*>(scale.mutable_data_ptr())});
    linear = {.data = matrix.const_data_ptr(),
              .stride = given.size(1),
              .scale = static_cast<const float*>(scale.const_data_ptr())};
    extra_bytes_ += matrix.numel() + scale.numel() * static_cast<int64_t>(sizeof(float));
    quantized_.insert(quantized_.end(), {matrix, scale});
  });
  model_.fp8 = true;
}

void LoadedModel::prepack_layers() {
  const std::string missing = prepack_missing(model_.spec, weights_.front());
  check(missing.empty(), "pop::load: prepack: ", missing);
  const BackendOfCall backend(weights_.front());
  copy_matrices([&](const Tensor& given, Linear& linear) {
    packed_.push_back(backend->prepack({.dtype = model_.spec.dtype,
                                        .n = given.size(0),
                                        .k = given.size(1),
                                        .w = given.const_data_ptr(),
                                        .w_stride = given.stride(0)}));
    linear.packed = packed_.back().get();
    extra_bytes_ += given.numel() * element_size(model_.spec.dtype);
  });
  model_.prepacked = true;
}

LoadedModel::Stamp LoadedModel::stamp_of(size_t index) const {
  const Tensor& tensor = weights_[index];
  const WeightSlot& slot = slots_[index];
  const bool copied =
      slot.layer >= 0 &&
      (is_projected(slot.layer) ? is_folded(slot.name) : (model_.fp8 || model_.prepacked) && is_matrix(slot.name));
  return {.data = tensor.const_data_ptr(),
          .dtype = static_cast<int32_t>(tensor.scalar_type()),
          .sizes = {tensor.sizes().begin(), tensor.sizes().end()},
          .strides = {tensor.strides().begin(), tensor.strides().end()},
          .copied = copied,
          .sample = copied ? sample_of(tensor) : 0};
}

std::string LoadedModel::stale_weight() const {
  for (size_t i = 0; i < weights_.size(); ++i) {
    const Tensor& tensor = weights_[i];
    const Stamp& stamp = stamps_[i];
    const bool current =
        tensor.const_data_ptr() == stamp.data && static_cast<int32_t>(tensor.scalar_type()) == stamp.dtype &&
        std::ranges::equal(tensor.sizes(), stamp.sizes) && std::ranges::equal(tensor.strides(), stamp.strides) &&
        (!stamp.copied || sample_of(tensor) == stamp.sample);
    if (!current) return slots_[i].name;
  }
  return "";
}

int64_t register_model(std::shared_ptr<const LoadedModel> model) {
  std::lock_guard lock(registry().mutex);
  const int64_t handle = registry().next_handle++;
  registry().models.emplace(handle, std::move(model));
  return handle;
}

std::shared_ptr<const LoadedModel> find_model(int64_t handle) {
  std::lock_guard lock(registry().mutex);
  const auto found = registry().models.find(handle);
  check(found != registry().models.end(), "pop: model: expected a handle of pop::load that was not freed, got ",
        handle);
  return found->second;
}

void unregister_model(int64_t handle) {
  // Freed outside the lock: the last reference to a weight may run Python code that comes back here.
  decltype(Registry::models)::node_type freed;
  {
    std::lock_guard lock(registry().mutex);
    freed = registry().models.extract(handle);
  }
  check(!freed.empty(), "pop::unload: model: expected a handle that was not freed, got ", handle);
}

}  // namespace pop
