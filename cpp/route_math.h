// The choice of a token's experts, shared by the CPU and the CUDA kernels: the experts with the largest router logits,
// and their softmax probabilities over all experts.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "row_math.h"

namespace pop {

// An expert and its router logit.
struct Choice {
  float logit;
  int32_t expert;
};

// Sentinels that order before, and after, every choice.
POP_HD Choice before_all() { return {__builtin_inff(), -1}; }
POP_HD Choice after_all() { return {-__builtin_inff(), INT32_MAX}; }

// Larger logits come first, lower experts first among equal logits. False for a NaN, which is never chosen.
POP_HD bool comes_before(Choice a, Choice b) {
  return a.logit > b.logit || (a.logit == b.logit && a.expert < b.expert);
}

// The earlier of `best` and `candidate` that comes after `previous`. A pass over all experts with the result of the
// last pass as `previous` chooses the next expert.
POP_HD Choice better(Choice previous, Choice best, Choice candidate) {
  return comes_before(previous, candidate) && comes_before(candidate, best) ? candidate : best;
}

// The chosen expert; a valid index even if NaN logits left too few experts to choose from.
POP_HD int32_t expert_of(Choice chosen, int64_t pass) {
  return chosen.expert == INT32_MAX ? static_cast<int32_t>(pass) : chosen.expert;
}

// The softmax numerator of `logit`.
POP_HD float softmax_part(float logit, float largest) { return exp_lanes(logit - largest); }

// The factor that turns the numerators of the chosen experts into weights: probabilities, with `all` the sum of all
// numerators, or, with `normalise`, shares of `chosen`, the sum of the chosen ones. A NaN in any logit makes `all` a
// NaN, and then every weight.
POP_HD float route_scale(float all, float chosen, bool normalise) {
  return 1.0f / (normalise && all == all ? chosen : all);
}

}  // namespace pop
