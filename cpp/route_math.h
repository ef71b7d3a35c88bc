// How a token chooses its experts, shared by the CPU and the CUDA kernels: the largest router logits, which are the
// largest probabilities as well, and softmax over all of them.
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

// What comes before, and what after, every choice.
POP_HD Choice before_all() { return {__builtin_inff(), -1}; }
POP_HD Choice after_all() { return {-__builtin_inff(), INT32_MAX}; }

// Larger logits come first, lower experts among equal ones. False for a NaN: it is never chosen.
POP_HD bool comes_before(Choice a, Choice b) {
  return a.logit > b.logit || (a.logit == b.logit && a.expert < b.expert);
}

// The earlier of `best` and `candidate`, if that comes after `previous`: passes over all experts, each given what the
// last one found, choose one expert after another.
POP_HD Choice better(Choice previous, Choice best, Choice candidate) {
  return comes_before(previous, candidate) && comes_before(candidate, best) ? candidate : best;
}

// An expert that is one, where NaN left too few to choose from.
POP_HD int32_t expert_of(Choice chosen, int64_t pass) {
  return chosen.expert == INT32_MAX ? static_cast<int32_t>(pass) : chosen.expert;
}

// The part of `logit` in a softmax before it is divided by the sum of all parts.
POP_HD float softmax_part(float logit, float largest) { return exp_lanes(logit - largest); }

// What the parts of the chosen experts are multiplied by: they become probabilities, or shares of `chosen`, the sum of
// their own. A NaN in any logit is one in `all`, and in every weight then.
POP_HD float route_scale(float all, float chosen, bool normalise) {
  return 1.0f / (normalise && all == all ? chosen : all);
}

}  // namespace pop
