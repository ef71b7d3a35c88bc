// A loaded model for the prefill loop: shapes, plan and pointers to the weights. No torch; torch/loaded_model.h owns
// the memory.
#pragma once

#include <vector>

#include "backend/params.h"
#include "core/model_spec.h"
#include "core/plan.h"

namespace pop {

// A matrix [out_features, in_features] with contiguous rows `stride` elements apart.
struct Linear {
  const void* data = nullptr;
  int64_t stride = 0;
  // [out_features] if data has 8-bit elements: a row is data * scale. Null if data has the model's dtype.
  const float* scale = nullptr;
  int64_t group = 0;  // elements of a row that share a scale, [out_features, in_features / group]; 0: all of them
  const PackedWeight* packed = nullptr;  // a prepacked copy, or null
  Products products = Products::plain;
};

// Matrices [count, out_features, in_features], or [count, in_features, out_features] with
// ModelSpec::experts_transposed, `matrix_stride` elements apart.
struct LinearStack {
  const void* data = nullptr;
  int64_t matrix_stride = 0, stride = 0;
};

// A vector [out_features] for each of [count] experts, `stride` elements apart.
struct ExpertBias {
  const void* data = nullptr;
  int64_t stride = 0;
};

// Vectors are contiguous. Biases and norms that the spec does not have are null.
struct LayerWeights {
  const void* input_norm = nullptr;
  const void* post_norm = nullptr;  // of the MLP's input
  const void *attention_out_norm = nullptr, *mlp_out_norm = nullptr;
  Linear q_proj, k_proj, v_proj, o_proj;
  bool qkv_adjacent = false;  // q_proj, k_proj and v_proj follow each other in one matrix, such as Phi-3's
  const void *q_bias = nullptr, *k_bias = nullptr, *v_bias = nullptr, *o_bias = nullptr;
  const void *q_norm = nullptr, *k_norm = nullptr;
  const void* sinks = nullptr;
  Linear gate_proj, up_proj, down_proj;
  const void *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;
  // A sparse layer has a router, experts and maybe a shared expert instead of gate_proj, up_proj and down_proj.
  Linear router;
  const void *router_bias = nullptr, *router_logit_bias = nullptr;
  LinearStack experts_gate_up, experts_down;
  ExpertBias experts_gate_up_bias, experts_down_bias;
  Linear shared_gate_proj, shared_up_proj, shared_down_proj;
  Linear shared_gate;  // [1, hidden_size]
};

// The weights of the independent KV projection of one run: K and V of all its layers in one matrix, each row multiplied
// by its layer's input norm if there is one.
struct RunWeights {
  LayerRange layers;
  const void* stack = nullptr;  // [layers * 2 * kv_dim, hidden_size]: K of the first layer, its V, K of the second, ...
  std::vector<const void*> k_bias, v_bias, k_norm;  // [layers]
};

struct Model {
  ModelSpec spec;
  Plan plan;
  Linear embed_tokens;
  const void* norm = nullptr;  // the final norm
  std::vector<LayerWeights> layers;
  std::vector<RunWeights> runs;         // one per run of plan.projected_runs()
  Products products = Products::plain;  // of the layers outside of the runs
  bool prepacked = false;               // the layers outside of the runs have prepacked copies of their matrices
};

}  // namespace pop
