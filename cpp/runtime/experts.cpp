#include "runtime/experts.h"

#include <algorithm>
#include <vector>

#include "runtime/arena.h"
#include "runtime/product.h"

namespace pop {

namespace {

// A pair is a row and one of its experts. Pairs are sorted by expert, so that those of one expert are adjacent rows.
struct ExpertsWorkspace {
  ExpertsWorkspace(const ExpertsShape& shape, int64_t rows, void* base) {
    Arena arena(base);
    const int64_t pairs = rows * shape.experts_per_row, element = element_size(shape.dtype);
    logits = arena.take(rows * shape.experts * element_size(shape.router_dtype));
    shared_gate = shape.shared_gate ? arena.take(rows * element) : nullptr;
    expert = arena.take_array<int32_t>(pairs);
    weight = arena.take_array<float>(pairs);
    place = arena.take_array<int32_t>(pairs);
    row = arena.take_array<int64_t>(pairs);
    begin = arena.take_array<int64_t>(shape.experts + 1);
    // Before the experts' input, it holds that of a router that computes in float32.
    const int64_t router_element = shape.router_dtype == shape.dtype ? 0 : element_size(shape.router_dtype);
    x = arena.take(std::max(pairs * element, rows * router_element) * shape.hidden_size);
    gate_up = arena.take(pairs * 2 * shape.inner_size * element);
    // In place, the result would overwrite channels in turns that other threads have yet to read.
    activated = shape.interleaved ? arena.take(pairs * shape.inner_size * element) : gate_up;
    activated_stride = shape.interleaved ? shape.inner_size : 2 * shape.inner_size;
    bytes = arena.used();
  }

  void* logits;       // [rows, experts]
  void* shared_gate;  // [rows], or null
  int32_t* expert;    // [rows, experts_per_row]
  float* weight;      // [rows, experts_per_row]
  int32_t* place;     // [rows, experts_per_row]
  int64_t* row;       // [pairs]
  int64_t* begin;     // [experts + 1]
  void* x;            // [pairs, hidden_size]: the input of the experts, then their output
  void* gate_up;      // [pairs, 2 * inner_size]
  void* activated;    // [pairs, inner_size], `activated_stride` apart; in place of gate unless `interleaved`
  int64_t activated_stride;
  size_t bytes;
};

class Experts {
 public:
  Experts(const ExpertsCall& call, Backend& backend)
      : call_(call),
        shape_(call.shape),
        backend_(backend),
        work_(call.shape, call.rows, call.workspace),
        gate_up_(grouped({work_.x, shape_.hidden_size}, shape_.hidden_size, call.gate_up, work_.gate_up,
                         2 * shape_.inner_size)),
        down_(grouped({work_.activated, work_.activated_stride}, shape_.inner_size, call.down, work_.x,
                      shape_.hidden_size)),
        on_device_(call.gate_up_bias.data == nullptr && backend.groups_products(gate_up_) &&
                   backend.groups_products(down_)),
        begin_(on_device_ ? 0 : call.shape.experts + 1) {}

  void run() {
    route();
    gather();
    products(gate_up_);
    act();
    products(down_);
    backend_.combine_rows({.dtype = shape_.dtype,
                           .rows = call_.rows,
                           .width = shape_.hidden_size,
                           .experts_per_row = shape_.experts_per_row,
                           .x = work_.x,
                           .place = work_.place,
                           .weight = work_.weight,
                           .bias = call_.down_bias.data,
                           .bias_stride = call_.down_bias.stride,
                           .expert = work_.expert,
                           .out = call_.out,
                           .out_stride = call_.out_stride,
                           .shared = shape_.shared ? call_.out : nullptr,
                           .shared_gate = work_.shared_gate});
  }

 private:
  int64_t pairs() const { return call_.rows * shape_.experts_per_row; }

  void* at(void* buffer, int64_t index) const {
    return static_cast<char*>(buffer) + index * element_size(shape_.dtype);
  }
  const void* at(const void* buffer, int64_t index) const {
    return static_cast<const char*>(buffer) + index * element_size(shape_.dtype);
  }

  // Calls body(expert, first pair, number of pairs) for each expert that has pairs.
  template <class Body>
  void for_each_expert(const Body& body) const {
    for (int64_t expert = 0; expert < shape_.experts; ++expert) {
      const int64_t pairs = begin_[expert + 1] - begin_[expert];
      if (pairs > 0) body(expert, begin_[expert], pairs);
    }
  }

  void route() {
    const int64_t hidden = shape_.hidden_size;
    ProductRows x{call_.x, call_.x_stride};
    if (shape_.shared_gate) {
      const GemmParams gate = product(shape_.dtype, call_.rows, 1, hidden, x, call_.shared_gate, work_.shared_gate, 1);
      backend_.gemm(&gate, 1);
    }
    if (shape_.router_dtype != shape_.dtype) {
      backend_.to_float32({.dtype = shape_.dtype,
                           .rows = call_.rows,
                           .width = hidden,
                           .x = call_.x,
                           .x_stride = call_.x_stride,
                           .out = static_cast<float*>(work_.x)});
      x = {work_.x, hidden};
    }
    const GemmParams logits =
        product(shape_.router_dtype, call_.rows, shape_.experts, hidden, x, call_.router, work_.logits, shape_.experts);
    backend_.gemm(&logits, 1);
    backend_.route({.dtype = shape_.router_dtype,
                    .rows = call_.rows,
                    .experts = shape_.experts,
                    .experts_per_row = shape_.experts_per_row,
                    .scores = shape_.scores,
                    .normalise = shape_.normalise,
                    .norm_eps = shape_.norm_eps,
                    .scale = shape_.scale,
                    .bias = call_.router_bias,
                    .logits = work_.logits,
                    .logit_bias = call_.router_logit_bias,
                    .expert = work_.expert,
                    .weight = work_.weight});
    backend_.group_rows({.rows = call_.rows,
                         .experts = shape_.experts,
                         .experts_per_row = shape_.experts_per_row,
                         .expert = work_.expert,
                         .place = work_.place,
                         .row = work_.row,
                         .begin = work_.begin,
                         .host_begin = on_device_ ? nullptr : begin_.data()});
  }

  void gather() {
    backend_.embed({.dtype = shape_.dtype,
                    .rows = pairs(),
                    .width = shape_.hidden_size,
                    .vocab_size = 0,
                    .ids = nullptr,
                    .row_source = work_.row,
                    .table = call_.x,
                    .table_stride = call_.x_stride,
                    .out = work_.x});
  }

  // The pairs of each expert, rows of `a`, times its own matrix [n, k], or [k, n] if transposed.
  GroupedGemmParams grouped(const ProductRows& a, int64_t k, const LinearStack& w, void* out, int64_t n) const {
    return {.dtype = shape_.dtype,
            .rows = pairs(),
            .groups = shape_.experts,
            .n = n,
            .k = k,
            .a = a.data,
            .a_stride = a.stride,
            .w = w.data,
            .w_matrix_stride = w.matrix_stride,
            .w_stride = w.stride,
            .w_transposed = shape_.transposed,
            .begin = work_.begin,
            .out = out,
            .out_stride = n};
  }

  void products(const GroupedGemmParams& p) {
    if (on_device_) return backend_.grouped_gemm(p);
    std::vector<GemmParams> products;
    for_each_expert([&](int64_t expert, int64_t first, int64_t rows) {
      const Linear matrix{at(p.w, expert * p.w_matrix_stride), p.w_stride};
      products.push_back(product(p.dtype, rows, p.n, p.k, from_row({p.a, p.a_stride}, first, p.dtype), matrix,
                                 at(p.out, first * p.out_stride), p.out_stride));
      products.back().w_transposed = p.w_transposed;
    });
    backend_.gemm(products.data(), static_cast<int64_t>(products.size()));
  }

  // The pairs of all experts at once or, with biases, of each expert.
  void act() {
    if (call_.gate_up_bias.data == nullptr) return act(0, pairs(), nullptr);
    for_each_expert([&](int64_t expert, int64_t first, int64_t rows) {
      act(first, rows, at(call_.gate_up_bias.data, expert * call_.gate_up_bias.stride));
    });
  }

  void act(int64_t first, int64_t rows, const void* bias) {
    const int64_t stride = 2 * shape_.inner_size, up = shape_.interleaved ? 1 : shape_.inner_size;
    backend_.gated_act({.dtype = shape_.dtype,
                        .activation = shape_.activation,
                        .rows = rows,
                        .width = shape_.inner_size,
                        .gate = at(work_.gate_up, first * stride),
                        .gate_stride = stride,
                        .up = at(work_.gate_up, first * stride + up),
                        .up_stride = stride,
                        .gate_bias = bias,
                        .up_bias = bias == nullptr ? nullptr : at(bias, up),
                        .step = shape_.interleaved ? 2 : 1,
                        .out = at(work_.activated, first * work_.activated_stride),
                        .out_stride = work_.activated_stride,
                        .swiglu_alpha = shape_.swiglu_alpha,
                        .swiglu_limit = shape_.swiglu_limit});
  }

  const ExpertsCall& call_;
  const ExpertsShape& shape_;
  Backend& backend_;
  ExpertsWorkspace work_;
  GroupedGemmParams gate_up_, down_;
  bool on_device_;              // the host does not learn how many pairs each expert has
  std::vector<int64_t> begin_;  // [experts + 1] first pair of each expert; empty if on_device_
};

}  // namespace

ExpertsShape experts_shape(const ModelSpec& spec) {
  return {.dtype = spec.dtype,
          .activation = spec.activation,
          .hidden_size = spec.hidden_size,
          .inner_size = spec.moe_intermediate_size,
          .experts = spec.num_experts,
          .experts_per_row = spec.experts_per_token,
          .router_dtype = spec.router_dtype(),
          .scores = spec.router_scores,
          .normalise = spec.norm_topk,
          .norm_eps = static_cast<float>(spec.norm_topk_eps),
          .scale = static_cast<float>(spec.routed_scale),
          .shared = spec.shared_intermediate_size > 0,
          .shared_gate = spec.shared_gate,
          .transposed = spec.experts_transposed,
          .interleaved = spec.experts_interleaved,
          .swiglu_alpha = static_cast<float>(spec.swiglu_alpha),
          .swiglu_limit = static_cast<float>(spec.swiglu_limit)};
}

size_t experts_workspace(const ExpertsShape& shape, int64_t rows) {
  return ExpertsWorkspace(shape, rows, nullptr).bytes;
}

void run_experts(const ExpertsCall& call, Backend& backend) {
  if (call.rows > 0) Experts(call, backend).run();
}

}  // namespace pop
