// The choice of a token's experts and their weights, shared by the CPU and the CUDA kernels (RouteParams in
// backend/params.h).
#pragma once

#include <cstdint>

#include "core/model_spec.h"
#include "host_device.h"
#include "row_math.h"

namespace pop {

// An expert and what it is chosen by.
struct Choice {
  float key;
  int32_t expert;
};

// Sentinels that order before, and after, every choice.
POP_HD Choice before_all() { return {__builtin_inff(), -1}; }
POP_HD Choice after_all() { return {-__builtin_inff(), INT32_MAX}; }

// Larger keys come first, lower experts first among equal keys. False for a NaN, which is never chosen.
POP_HD bool comes_before(Choice a, Choice b) { return a.key > b.key || (a.key == b.key && a.expert < b.expert); }

// The earlier of `best` and `candidate` that comes after `previous`. A pass over all experts with the result of the
// last pass as `previous` chooses the next expert.
POP_HD Choice better(Choice previous, Choice best, Choice candidate) {
  return comes_before(previous, candidate) && comes_before(candidate, best) ? candidate : best;
}

// The chosen expert; a valid index even if NaN keys left too few experts to choose from.
POP_HD int32_t expert_of(Choice chosen, int64_t pass) {
  return chosen.expert == INT32_MAX ? static_cast<int32_t>(pass) : chosen.expert;
}

// What an expert of that logit is chosen by; `bias` is that of the expert, or zero.
POP_HD float route_key(RouterScores scores, float logit, float bias) {
  return scores == RouterScores::softmax ? logit : sigmoid(logit) + bias;
}

// The score of `logit`, of a softmax its numerator; `largest` is the first key that was chosen.
POP_HD float score_part(RouterScores scores, float logit, float largest) {
  return scores == RouterScores::softmax ? exp_lanes(logit - largest) : sigmoid(logit);
}

// The factor that turns the parts of the chosen experts into weights. `all` and `chosen` are the sums of all parts, and
// of the chosen ones. A NaN in any logit makes `all` a NaN, and then every weight.
POP_HD float route_scale(RouterScores scores, float all, float chosen, bool normalise, float norm_eps, float scale) {
  const float whole = scores == RouterScores::softmax ? all : 1.0f;
  return scale / (all != all ? all : normalise ? chosen + norm_eps : whole);
}

}  // namespace pop
