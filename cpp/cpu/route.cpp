// Mixture of experts: the input of a router in float32, the choice and weights of each row's experts, and the weighted
// sum of their outputs.
#include "route_math.h"

#include "cpu/row_kernels.h"
#include "cpu/vec.h"

namespace pop::cpu::POP_ISA {
namespace {

template <class T>
void to_float32_row(const ToFloat32Params& p, int64_t row) {
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  float* out = p.out + row * p.width;
  for (int64_t i = 0; i < p.width; i += kLanes) store_upto(out + i, load_upto(x + i, p.width - i), p.width - i);
}

template <class T>
void route_row(const RouteParams& p, const T* logits, int32_t* expert, float* weight) {
  const T *bias = static_cast<const T*>(p.bias), *logit_bias = static_cast<const T*>(p.logit_bias);
  const auto logit = [&](int64_t e) {
    return float_of(logits[e]) + (logit_bias == nullptr ? 0.0f : float_of(logit_bias[e]));
  };
  Choice chosen = before_all();
  float largest = 0.0f, chosen_sum = 0.0f, all = 0.0f;
  for (int64_t pass = 0; pass < p.experts_per_row; ++pass) {
    Choice best = after_all();
    for (int64_t e = 0; e < p.experts; ++e) {
      const float key = route_key(p.scores, logit(e), bias == nullptr ? 0.0f : float_of(bias[e]));
      best = better(chosen, best, {key, static_cast<int32_t>(e)});
    }
    chosen = best;
    if (pass == 0) largest = chosen.key;
    expert[pass] = expert_of(chosen, pass);
    weight[pass] = score_part(p.scores, logit(expert[pass]), largest);
    chosen_sum += weight[pass];
  }
  for (int64_t e = 0; e < p.experts; ++e) all += score_part(p.scores, logit(e), largest);
  const float scale = route_scale(p.scores, all, chosen_sum, p.normalise, p.norm_eps, p.scale);
  for (int64_t pass = 0; pass < p.experts_per_row; ++pass) weight[pass] *= scale;
}

template <class T>
void combine_row(const CombineRowsParams& p, int64_t row) {
  const T *x = static_cast<const T*>(p.x), *bias = static_cast<const T*>(p.bias);
  const int32_t* place = p.place + row * p.experts_per_row;
  const int32_t* expert = p.expert + row * p.experts_per_row;
  const float* weight = p.weight + row * p.experts_per_row;
  T* out = static_cast<T*>(p.out) + row * p.out_stride;
  const T* shared = p.shared == nullptr ? nullptr : static_cast<const T*>(p.shared) + row * p.out_stride;
  const T* gate = static_cast<const T*>(p.shared_gate);
  const float factor = gate == nullptr ? 1.0f : sigmoid(float_of(gate[row]));
  for (int64_t i = 0; i < p.width; i += kLanes) {
    Vec sum{};
    if (shared != nullptr) sum = load_upto(shared + i, p.width - i) * factor;
    for (int64_t j = 0; j < p.experts_per_row; ++j) {
      Vec value = load_upto(x + place[j] * p.width + i, p.width - i);
      if (bias != nullptr) value += load_upto(bias + expert[j] * p.bias_stride + i, p.width - i);
      sum += value * weight[j];
    }
    store_upto(out + i, sum, p.width - i);
  }
}

}  // namespace

void to_float32(const ToFloat32Params& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) {
    for (int64_t row = begin; row < end; ++row) to_float32_row<decltype(element)>(p, row);
  });
}

void route(const RouteParams& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const T* logits = static_cast<const T*>(p.logits);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t pairs = row * p.experts_per_row;
      route_row(p, logits + row * p.experts, p.expert + pairs, p.weight + pairs);
    }
  });
}

void combine_rows(const CombineRowsParams& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) {
    for (int64_t row = begin; row < end; ++row) combine_row<decltype(element)>(p, row);
  });
}

}  // namespace pop::cpu::POP_ISA
