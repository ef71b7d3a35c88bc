// FLOPs and bytes of a prefill. The bench divides by them and derives its ceilings from them.
#pragma once

#include <string>
#include <vector>

#include "core/model_spec.h"
#include "core/plan.h"

namespace pop {

// The work of one stage. A multiply-add counts as two FLOPs. Bytes are weights read once, plus activations and K/V read
// and written once.
struct Cost {
  double flops = 0;
  double bytes = 0;
};

struct StageCost {
  std::string stage;  // "qkv", "attention", "o_proj", "mlp", "kv_project", "boundary", "lm_head"
  Cost cost;
};

// The lengths of one sequence of a batch.
struct SequenceShape {
  int64_t tokens;          // new rows T
  int64_t past;            // positions already in the cache P
  int64_t boundary;        // rows at full depth, 1 <= boundary <= tokens
  int64_t logits_to_keep;  // rows whose logits are wanted, 1 <= logits_to_keep <= boundary
};

// The cost of Hugging Face's full prefill: every layer for every row, logits for `logits_to_keep` rows.
std::vector<StageCost> stock_cost(const ModelSpec& spec, const std::vector<SequenceShape>& batch);

// The cost of the native runtime for `plan` (omit = {}: native full prefill). "boundary" is the boundary recompute in
// omitted layers; the rows of retained layers are in the other stages.
std::vector<StageCost> plan_cost(const ModelSpec& spec, const Plan& plan, const std::vector<SequenceShape>& batch);

Cost total(const std::vector<StageCost>& stages);

}  // namespace pop
