// The matrices that `fp8`, `int8` and `prepack` copy.
#pragma once

#include <algorithm>
#include <string>

#include "core/text.h"
#include "torch/loaded_model.h"

namespace pop {

struct NamedLinear {
  const char* name;
  Linear LayerWeights::* linear;
};
inline constexpr NamedLinear kLinears[] = {{"q_proj", &LayerWeights::q_proj},       {"k_proj", &LayerWeights::k_proj},
                                           {"v_proj", &LayerWeights::v_proj},       {"o_proj", &LayerWeights::o_proj},
                                           {"gate_proj", &LayerWeights::gate_proj}, {"up_proj", &LayerWeights::up_proj},
                                           {"down_proj", &LayerWeights::down_proj}};

// k and v, which the cache keeps for decode, stay in the model's dtype with int8: docs/fp8.md shows what it costs to
// round them.
inline bool is_copied(const NamedLinear& linear, Products products) {
  return products != Products::int8 ||
         (linear.linear != &LayerWeights::k_proj && linear.linear != &LayerWeights::v_proj);
}

inline bool is_copied_matrix(const std::string& slot, Products products) {
  return std::ranges::any_of(kLinears, [&](const NamedLinear& linear) {
    return is_copied(linear, products) && slot.ends_with(join(".", linear.name));
  });
}

inline bool is_matrix_of_layer(const std::string& slot) {
  return std::ranges::any_of(kLinears,
                             [&](const NamedLinear& linear) { return slot.ends_with(join(".", linear.name)); });
}

// Only matrices of dense layers are copied. The reason to refuse another model; empty for a dense one.
inline std::string dense_missing(const ModelSpec& spec) {
  return spec.has_experts() ? join("expected a model without experts, got one of ", spec.num_experts) : "";
}

// Calls copy(weight, linear) for each matrix of the layers outside of the runs, which context rows pass through. Layers
// of a run are left out: boundary rows read their matrices as they are.
template <class Copy>
void LoadedModel::for_each_copied_matrix(Products products, const Copy& copy) {
  for (int64_t layer = 0; layer < model_.spec.num_layers; ++layer) {
    if (is_projected(layer)) continue;
    for (const NamedLinear& named : kLinears) {
      if (!is_copied(named, products)) continue;
      copy(*weight(join("layers.", layer, ".", named.name)), model_.layers[layer].*named.linear);
    }
  }
}

}  // namespace pop
