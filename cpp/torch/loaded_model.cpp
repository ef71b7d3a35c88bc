#include "torch/loaded_model.h"

#include <algorithm>

#include "torch/backends.h"
#include "torch/checks.h"
#include "torch/copied_matrices.h"

namespace pop {

namespace {

// True if the rows of `next` follow those of `first` in the same storage.
bool follows(const Tensor& first, const Tensor& next) {
  const auto end = [](const Tensor& matrix, int64_t rows) {
    return static_cast<const char*>(matrix.const_data_ptr()) + rows * matrix.stride(0) * matrix.element_size();
  };
  const auto storage = [](const Tensor& matrix) {
    int64_t offset = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(matrix.get(), &offset));
    return static_cast<const char*>(matrix.const_data_ptr()) - offset * matrix.element_size();
  };
  return first.stride(0) == next.stride(0) && end(first, first.size(0)) == end(next, 0) &&
         storage(first) == storage(next);
}

void check_option(const char* option, const std::string& missing) {
  check(missing.empty(), "pop::load: ", option, ": ", missing);
}

}  // namespace

LoadedModel::LoadedModel(const ModelSpec& spec, const Plan& plan, std::vector<Tensor> weights,
                         std::vector<Tensor> scales, const std::optional<std::vector<Tensor>>& projections,
                         Products products, bool prepack)
    : slots_(spec.weight_slots()), weights_(std::move(weights)), scales_(std::move(scales)) {
  check(products == Products::plain || !prepack, "pop::load: prepack: expected False with ", to_string(products),
        "=True, got True");
  check(plan.num_layers == spec.num_layers, "pop::load: plan: expected num_layers ", spec.num_layers,
        " like the model, got ", plan.num_layers);
  check_head_dim(spec.head_dim, "pop::load: spec");
  check(weights_.size() == slots_.size(), "pop::load: weights: expected ", slots_.size(), " tensors, got ",
        weights_.size());
  check(scales_.empty() || scales_.size() == slots_.size(), "pop::load: scales: expected one tensor for each of ",
        slots_.size(), " weights, got ", scales_.size());
  for (size_t i = 0; i < slots_.size(); ++i) index_[slots_[i].name] = i;
  model_.spec = spec;
  model_.plan = plan;
  check_weights();
  const std::string missing = device_missing(weights_.front());
  check(missing.empty(), "pop::load: weights: ", missing);
  resident_weights_ = named_weights();
  model_.embed_tokens = {weight("embed_tokens")->const_data_ptr(), weight("embed_tokens")->stride(0)};
  model_.norm = weight("norm")->const_data_ptr();
  model_.layers.resize(spec.num_layers);
  for (int64_t layer = 0; layer < spec.num_layers; ++layer) set_layer(layer);
  if (products != Products::plain) {
    check_option(to_string(products), products_missing(products, spec, weights_.front()));
  }
  if (prepack) check_option("prepack", prepack_missing(spec, weights_.front()));
  for (size_t i = 0; i < slots_.size(); ++i) {
    check(!is_scaled(i) || (products != Products::fp8 && !prepack), "pop::load: ", prepack ? "prepack" : "fp8",
          ": expected weights in the model's dtype, got int8 in ", slots_[i].name);
  }
  for (const LayerRange& layers : plan.projected_runs()) fold(layers);
  if (projections.has_value()) set_projections(*projections);
  if (products != Products::plain) quantize_layers(products);
  if (prepack) prepack_layers();
  stamp_weights();
}

void LoadedModel::check_weights() const {
  for (size_t i = 0; i < slots_.size(); ++i) {
    const std::string name = "pop::load: weight " + slots_[i].name;
    if (is_scaled(i)) {
      check_scaled(i);
    } else {
      check_dtype(weights_[i], slots_[i].dtype, name);
    }
    check_shape(weights_[i], slots_[i].shape, name);
    check_same_device(weights_[i], weights_.front(), name);
    check_last_dim_contiguous(weights_[i], name);
    check(weights_[i].is_cpu() || weights_[i].is_cuda(), name,
          ": expected memory on a CPU or a CUDA device, got another device, or a meta or fake tensor");
  }
}

// An int8 matrix: of a dense layer, on a CPU.
void LoadedModel::check_scaled(size_t index) const {
  const std::string name = "pop::load: weight " + slots_[index].name,
                    of_scale = "pop::load: scale of " + slots_[index].name;
  check_resolved(weights_[index], name);
  check(weights_[index].scalar_type() == ScalarType::Char, name, ": expected dtype int8 with a scale, got ",
        dtype_name(weights_[index]));
  check(is_matrix_of_layer(slots_[index].name), name, ": expected no scale, got one");
  check(!model_.spec.has_experts(), name, ": expected no scale in a model with experts, got one");
  check(weights_[index].is_cpu(), name, ": expected int8 on a CPU, got it on another device");
  check_same_device(scales_[index], weights_[index], of_scale);
  check_int8_scale(scales_[index], weights_[index], of_scale);
}

// Of the given weights alone: what loading adds lies in memory that nobody else has.
ResidentTensors LoadedModel::named_weights() const {
  std::vector<NamedTensor> named;
  for (size_t i = 0; i < slots_.size(); ++i) named.push_back({weights_[i], "weight " + slots_[i].name});
  return ResidentTensors(std::move(named));
}

const Tensor* LoadedModel::weight(const std::string& name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &weights_[found->second];
}

const Tensor* LoadedModel::scale(const std::string& name) const {
  const auto found = index_.find(name);
  return found == index_.end() || !is_scaled(found->second) ? nullptr : &scales_[found->second];
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
    const Tensor* scales = scale(prefix + name);
    if (scales == nullptr) return {tensor->const_data_ptr(), tensor->stride(0)};
    return {.data = tensor->const_data_ptr(),
            .stride = tensor->stride(0),
            .scale = static_cast<const float*>(scales->const_data_ptr()),
            .group = scales->dim() == 1 ? 0 : tensor->size(1) / scales->size(1),
            .products = Products::int8_weight};
  };
  const auto stack = [&](const char* name) -> LinearStack {
    const Tensor* tensor = weight(prefix + name);
    if (tensor == nullptr) return {};
    return {tensor->const_data_ptr(), tensor->stride(0), tensor->stride(1)};
  };
  const auto expert_bias = [&](const char* name) -> ExpertBias {
    const Tensor* tensor = weight(prefix + name);
    if (tensor == nullptr) return {};
    return {tensor->const_data_ptr(), tensor->stride(0)};
  };
  const Tensor &q = *weight(prefix + "q_proj"), &k = *weight(prefix + "k_proj"), &v = *weight(prefix + "v_proj");
  model_.layers[layer] = {.input_norm = vector("input_norm"),
                          .post_norm = vector("post_norm"),
                          .attention_out_norm = vector("attention_out_norm"),
                          .mlp_out_norm = vector("mlp_out_norm"),
                          .q_proj = linear("q_proj"),
                          .k_proj = linear("k_proj"),
                          .v_proj = linear("v_proj"),
                          .o_proj = linear("o_proj"),
                          .qkv_adjacent = follows(q, k) && follows(k, v),
                          .q_bias = vector("q_bias"),
                          .k_bias = vector("k_bias"),
                          .v_bias = vector("v_bias"),
                          .o_bias = vector("o_bias"),
                          .q_norm = vector("q_norm"),
                          .k_norm = vector("k_norm"),
                          .sinks = vector("sinks"),
                          .gate_proj = linear("gate_proj"),
                          .up_proj = linear("up_proj"),
                          .down_proj = linear("down_proj"),
                          .gate_bias = vector("gate_bias"),
                          .up_bias = vector("up_bias"),
                          .down_bias = vector("down_bias"),
                          .router = linear("router"),
                          .router_bias = vector("router_bias"),
                          .router_logit_bias = vector("router_logit_bias"),
                          .experts_gate_up = stack("experts_gate_up"),
                          .experts_down = stack("experts_down"),
                          .experts_gate_up_bias = expert_bias("experts_gate_up_bias"),
                          .experts_down_bias = expert_bias("experts_down_bias"),
                          .shared_gate_proj = linear("shared_gate_proj"),
                          .shared_up_proj = linear("shared_up_proj"),
                          .shared_down_proj = linear("shared_down_proj"),
                          .shared_gate = linear("shared_gate")};
}

bool LoadedModel::is_projected(int64_t layer) const {
  return std::ranges::any_of(
      model_.runs, [&](const RunWeights& run) { return layer >= run.layers.begin && layer < run.layers.end; });
}

}  // namespace pop
