// The sparse MLP (mixture of experts): a router sends each row through a few of many experts, each a gated MLP. A
// shared expert, which every row goes through, is a dense MLP (mlp.cpp); its output is added here.
#pragma once

#include <cstddef>

#include "backend/backend.h"
#include "runtime/model.h"

namespace pop {

struct ExpertsShape {
  DType dtype;
  Activation activation;
  int64_t hidden_size, inner_size;  // of one expert
  int64_t experts, experts_per_row;
  DType router_dtype;  // of the router's weights, biases and logits: `dtype` or float32
  RouterScores scores;
  bool normalise;  // RouteParams::normalise
  float norm_eps, scale;
  bool shared, shared_gate;      // there is a shared expert, with a gate
  bool transposed, interleaved;  // ModelSpec::experts_transposed and experts_interleaved
  float swiglu_alpha, swiglu_limit;
};

ExpertsShape experts_shape(const ModelSpec& spec);

struct ExpertsCall {
  ExpertsShape shape;
  int64_t rows;
  const void* x;  // [rows, hidden_size]
  int64_t x_stride;
  Linear router;                  // [experts, hidden_size]
  const void* router_bias;        // [experts] or null
  const void* router_logit_bias;  // [experts] or null
  LinearStack gate_up;      // [experts, 2 * inner_size, hidden_size]: gate above up, or taking turns if `interleaved`
  ExpertBias gate_up_bias;  // [experts, 2 * inner_size] or null
  LinearStack down;         // [experts, hidden_size, inner_size]
  ExpertBias down_bias;     // [experts, hidden_size] or null
  Linear shared_gate;       // [1, hidden_size], or null
  void* out;                // [rows, hidden_size]; holds the output of the shared expert, if there is one
  int64_t out_stride;
  void* workspace;  // experts_workspace(shape, rows) bytes
};

size_t experts_workspace(const ExpertsShape& shape, int64_t rows);

// out = sum over a row's experts of weight * down(act(gate(x)) * up(x)), each of the three with its bias, plus
// out * sigmoid(shared_gate . x) of a shared expert
void run_experts(const ExpertsCall& call, Backend& backend);

}  // namespace pop
