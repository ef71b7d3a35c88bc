// The sparse MLP (mixture of experts): a router sends each row through a few of many experts, each a gated MLP.
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
  bool normalise;  // RouteParams::normalise
};

ExpertsShape experts_shape(const ModelSpec& spec);

struct ExpertsCall {
  ExpertsShape shape;
  int64_t rows;
  const void* x;  // [rows, hidden_size]
  int64_t x_stride;
  Linear router;        // [experts, hidden_size]
  LinearStack gate_up;  // [experts, 2 * inner_size, hidden_size]: gate above up
  LinearStack down;     // [experts, hidden_size, inner_size]
  void* out;            // [rows, hidden_size]
  int64_t out_stride;
  void* workspace;  // experts_workspace(shape, rows) bytes
};

size_t experts_workspace(const ExpertsShape& shape, int64_t rows);

// out = sum over a row's experts of weight * down(act(gate(x)) * up(x))
void run_experts(const ExpertsCall& call, Backend& backend);

}  // namespace pop
