// Folding: the K and V weights of a run, multiplied by the input norms, in one matrix; and fitted projections over it.
#include "torch/aten.h"
#include "torch/checks.h"
#include "torch/loaded_model.h"

namespace pop {

namespace {

// norm + offset in float32: the vector that an RMSNorm multiplies with.
Tensor gamma_of(const Tensor& norm, double offset) {
  const Tensor gamma = torch::stable::to(aten::detach(norm), ScalarType::Float);
  if (offset == 0) return gamma;
  Tensor minus = torch::stable::empty_like(gamma);
  torch::stable::fill_(minus, -offset);
  return torch::stable::subtract(gamma, minus);
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

// An int8 weight as float32, or another one as it is.
Tensor LoadedModel::in_float32(const std::string& name) const {
  const Tensor given = aten::detach(*weight(name));
  const Tensor* scales = scale(name);
  if (scales == nullptr) return torch::stable::to(given, ScalarType::Float);
  const int64_t rows = given.size(0), groups = scales->numel() / rows;
  const Tensor grouped = torch::stable::reshape(torch::stable::to(given, ScalarType::Float), {rows, groups, -1});
  const Tensor scaled = aten::mul(grouped, torch::stable::reshape(*scales, {rows, groups, 1}));
  return torch::stable::reshape(scaled, {rows, -1});
}

void LoadedModel::fold(LayerRange layers) {
  std::vector<Tensor> k, v, gamma;
  RunWeights run{.layers = layers, .stack = nullptr, .k_bias = {}, .v_bias = {}, .k_norm = {}};
  bool integers = false;
  for (int64_t layer = layers.begin; layer < layers.end; ++layer) {
    const LayerWeights& weights = model_.layers[layer];
    integers = integers || weights.k_proj.scale != nullptr || weights.v_proj.scale != nullptr;
  }
  for (int64_t layer = layers.begin; layer < layers.end; ++layer) {
    const std::string prefix = join("layers.", layer, ".");
    // All of a run in float32 if there are integers, so that their fold is rounded once.
    const auto get = [&](const char* name) { return integers ? in_float32(prefix + name) : *weight(prefix + name); };
    k.push_back(get("k_proj"));
    v.push_back(get("v_proj"));
    if (model_.spec.input_norms) gamma.push_back(get("input_norm"));
    run.k_bias.push_back(model_.layers[layer].k_bias);
    run.v_bias.push_back(model_.layers[layer].v_bias);
    run.k_norm.push_back(model_.layers[layer].k_norm);
  }
  const Tensor stack =
      torch::stable::to(fold_kv(k, v, gamma, model_.spec.norm_weight_offset), aten::scalar_type(model_.spec.dtype));
  run.stack = stack.const_data_ptr();
  extra_bytes_ += stack.numel() * element_size(model_.spec.dtype);
  stacks_.push_back(stack);
  model_.runs.push_back(std::move(run));
}

// Copies the fitted projections over the folded rows of their layers. The weights of those layers are still checked for
// changes, because a fit is valid only for the weights that it was made for.
void LoadedModel::set_projections(const std::vector<Tensor>& projections) {
  const std::vector<int64_t>& omit = model_.plan.omit;
  const int64_t rows = 2 * model_.spec.kv_dim();
  check(projections.size() == omit.size(), "pop::load: projections: expected ", omit.size(),
        " matrices (one an omitted layer), got ", projections.size());
  for (size_t i = 0; i < omit.size(); ++i) {
    const std::string name = join("pop::load: projections[", i, "]");
    check_resolved(projections[i], name);
    check_dtype(projections[i], model_.spec.dtype, name);
    check_shape(projections[i], {rows, model_.spec.hidden_size}, name);
    check_same_device(projections[i], weights_.front(), name);
    for (size_t run = 0; run < model_.runs.size(); ++run) {
      const LayerRange& layers = model_.runs[run].layers;
      if (omit[i] < layers.begin || omit[i] >= layers.end) continue;
      Tensor layer_rows = torch::stable::narrow(stacks_[run], 0, (omit[i] - layers.begin) * rows, rows);
      torch::stable::copy_(layer_rows, aten::detach(projections[i]));
    }
  }
}

}  // namespace pop
