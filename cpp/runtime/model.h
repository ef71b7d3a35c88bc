// A loaded model as the loop sees it: shapes, plan, and where each weight lies. Torch-free;
// who owns the memory is the caller's business (torch/registry.h).
#pragma once

#include <vector>

#include "backend.h"
#include "core/model_spec.h"
#include "core/plan.h"

namespace pop {

// A matrix [out_features, in_features] with contiguous rows `stride` elements apart.
struct Linear {
  const void* data = nullptr;
  int64_t stride = 0;
  // Of e4m3 data, [out_features]: a row is data * scale. Null: data is of the model's dtype.
  const float* scale = nullptr;
  const PackedWeight* packed = nullptr;  // the same again, or null
};

// Matrices [count, out_features, in_features], `matrix_stride` elements apart.
struct LinearStack {
  const void* data = nullptr;
  int64_t matrix_stride = 0, stride = 0;
};

// Vectors are contiguous; a bias or norm that the spec does not have is null.
struct LayerWeights {
  const void* input_norm = nullptr;
  const void* post_norm = nullptr;  // of the MLP's input
  const void *attention_out_norm = nullptr, *mlp_out_norm = nullptr;
  Linear q_proj, k_proj, v_proj, o_proj;
  const void *q_bias = nullptr, *k_bias = nullptr, *v_bias = nullptr, *o_bias = nullptr;
  const void *q_norm = nullptr, *k_norm = nullptr;
  Linear gate_proj, up_proj, down_proj;
  const void *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;
  Linear router;  // of a sparse layer, which has these three in the place of the MLP's
  LinearStack experts_gate_up, experts_down;
};

// What the independent KV projection of one run reads: all its layers' K and V weights in one
// matrix, each row multiplied by its layer's input norm, if it has one.
struct RunWeights {
  LayerRange layers;
  const void* stack = nullptr;  // [layers * 2 * kv_dim, hidden_size]: K of the first layer, its V, K of the second, ...
  std::vector<const void*> k_bias, v_bias, k_norm;  // [layers]
};

struct Model {
  ModelSpec spec;
  Plan plan;
  Linear embed_tokens;
  const void* norm = nullptr;
  std::vector<LayerWeights> layers;
  std::vector<RunWeights> runs;  // of plan.projected_runs()
  bool fp8 = false;              // the other layers' products read e4m3 weights
  bool prepacked = false;        // ... or, of many rows, prepacked ones
};

}  // namespace pop
