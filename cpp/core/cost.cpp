// Counts the work of runtime/prefill.cpp, step by step.
//
// A product of [m, k] and [n, k] is 2 m n k FLOPs. The FLOPs of norms, RoPE, activations and the embedding are left
// out: they are below 0.1 % at any practical size.
#include "core/cost.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace pop {

namespace {

// The sum over positions [begin, end) of the number of positions that each sees: min(position + 1, window).
double visible_pairs(int64_t begin, int64_t end, int64_t window) {
  const int64_t full =
      window == 0 ? end : std::clamp(window, begin, end);  // positions before this one see all previous ones
  const auto triangle = [](int64_t n) { return 0.5 * static_cast<double>(n) * static_cast<double>(n + 1); };
  return triangle(full) - triangle(begin) + static_cast<double>(end - full) * static_cast<double>(window);
}

Cost operator+(Cost a, Cost b) { return {a.flops + b.flops, a.bytes + b.bytes}; }

class Counter {
 public:
  Counter(const ModelSpec& spec, const std::vector<SequenceShape>& batch) : spec_(spec), batch_(batch) {
    spec.validate();
    for (const SequenceShape& s : batch) {
      at_least("tokens", s.tokens, 1);
      at_least("past", s.past, 0);
      at_least("logits_to_keep", s.logits_to_keep, 1);
      at_least("boundary", s.boundary, s.logits_to_keep);
      at_least("tokens", s.tokens, s.boundary);
      tokens_ += s.tokens;
      boundary_ += s.boundary;
      wanted_ += s.logits_to_keep;
    }
  }

  // Rows over all sequences: all of them, the boundary rows, the wanted rows. Each kind is the last rows of a sequence.
  int64_t tokens() const { return tokens_; }
  int64_t boundary() const { return boundary_; }
  int64_t wanted() const { return wanted_; }

  // Adds one layer: K and V of `kv_rows` rows, everything else for the last `rows(s)` rows of each sequence. The cost
  // counts for `stage`, or, if that is null, for the stages of a retained layer.
  template <class Rows>
  void layer(int64_t index, int64_t kv_rows, Rows rows, const char* stage) {
    int64_t q_rows = 0;
    for (const SequenceShape& s : batch_) q_rows += rows(s);
    const int64_t hidden = spec_.hidden_size;
    const int64_t q_dim = spec_.q_dim(), kv_dim = spec_.kv_dim();
    const auto to = [stage](const char* own) { return stage != nullptr ? stage : own; };

    add(to("qkv"), gemm(kv_rows, 2 * kv_dim, hidden) + gemm(q_rows, q_dim, hidden));
    add(to("attention"), attention(spec_.window[index], rows));
    add(to("o_proj"), gemm(q_rows, hidden, q_dim));
    add(to("mlp"), spec_.sparse[index] != 0 ? experts(q_rows) : mlp(q_rows, spec_.intermediate_size));
  }

  // The independent KV projection of a run: one product for all its layers.
  void kv_project(int64_t layers, int64_t rows) {
    const int64_t width = layers * 2 * spec_.kv_dim();
    add("kv_project", gemm(rows, width, spec_.hidden_size));
  }

  void lm_head() { add("lm_head", gemm(wanted_, spec_.vocab_size, spec_.hidden_size)); }

  std::vector<StageCost> stages() && { return std::move(stages_); }

 private:
  static void at_least(const char* field, int64_t value, int64_t least) {
    if (value >= least) return;
    throw std::invalid_argument(std::string(field) + ": expected an integer >= " + std::to_string(least) + ", got " +
                                std::to_string(value));
  }

  Cost elements(int64_t count) const { return {0, static_cast<double>(count * element_size(spec_.dtype))}; }

  Cost gemm(int64_t m, int64_t n, int64_t k) const {
    if (m == 0) return {};
    return Cost{2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k), 0} +
           elements(m * k + n * k + m * n);
  }

  Cost mlp(int64_t rows, int64_t inner) const {
    return gemm(rows, 2 * inner, spec_.hidden_size) + gemm(rows, spec_.hidden_size, inner);
  }

  // The router, experts_per_token experts per row, and the shared expert. Counts the weights of as many experts as the
  // rows can use at most. Many rows use that many; how many a few rows share depends on the router, so it cannot be
  // counted here.
  Cost experts(int64_t rows) const {
    if (rows == 0) return {};
    const int64_t pairs = rows * spec_.experts_per_token, touched = std::min(spec_.num_experts, pairs);
    const int64_t weights = 3 * spec_.moe_intermediate_size * spec_.hidden_size,
                  shared = spec_.shared_intermediate_size;
    const Cost routed = gemm(rows, spec_.num_experts, spec_.hidden_size) + mlp(pairs, spec_.moe_intermediate_size) +
                        elements((touched - 1) * weights);
    if (shared == 0) return routed;
    return routed + mlp(rows, shared) + (spec_.shared_gate ? gemm(rows, 1, spec_.hidden_size) : Cost{});
  }

  // Scores and weighted sums over visible pairs. Bytes: q, the output, and once every K and V that a row sees.
  template <class Rows>
  Cost attention(int64_t window, Rows rows) const {
    Cost cost;
    for (const SequenceShape& s : batch_) {
      const int64_t end = s.past + s.tokens, begin = end - rows(s);
      if (begin == end) continue;
      const int64_t first_seen = window == 0 ? 0 : std::max<int64_t>(0, begin - window + 1);
      cost = cost + Cost{4.0 * static_cast<double>(spec_.q_dim()) * visible_pairs(begin, end, window), 0} +
             elements(2 * (end - begin) * spec_.q_dim() + 2 * (end - first_seen) * spec_.kv_dim());
    }
    return cost;
  }

  void add(const std::string& stage, Cost cost) {
    const auto found = std::find_if(stages_.begin(), stages_.end(), [&](const auto& s) { return s.stage == stage; });
    if (found != stages_.end()) {
      found->cost = found->cost + cost;
    } else {
      stages_.push_back({stage, cost});
    }
  }

  const ModelSpec& spec_;
  const std::vector<SequenceShape>& batch_;
  int64_t tokens_ = 0, boundary_ = 0, wanted_ = 0;
  std::vector<StageCost> stages_;
};

int64_t all_rows(const SequenceShape& s) { return s.tokens; }
int64_t boundary_rows(const SequenceShape& s) { return s.boundary; }
int64_t wanted_rows(const SequenceShape& s) { return s.logits_to_keep; }

}  // namespace

std::vector<StageCost> stock_cost(const ModelSpec& spec, const std::vector<SequenceShape>& batch) {
  Counter count(spec, batch);
  for (int64_t layer = 0; layer < spec.num_layers; ++layer) count.layer(layer, count.tokens(), all_rows, nullptr);
  count.lm_head();
  return std::move(count).stages();
}

std::vector<StageCost> plan_cost(const ModelSpec& spec, const Plan& plan, const std::vector<SequenceShape>& batch) {
  if (plan.num_layers != spec.num_layers) {
    throw std::invalid_argument("plan: expected num_layers=" + std::to_string(spec.num_layers) +
                                " like the model, got " + std::to_string(plan.num_layers));
  }
  Counter count(spec, batch);
  int64_t layer = 0;
  for (const LayerRange& run : plan.projected_runs()) {
    for (; layer < run.begin; ++layer) count.layer(layer, count.tokens(), all_rows, nullptr);
    count.kv_project(run.size(), count.tokens() - count.boundary());
    for (; layer < run.end; ++layer) {
      const bool omitted = std::binary_search(plan.omit.begin(), plan.omit.end(), layer);
      const bool last = layer == spec.num_layers - 1;
      count.layer(layer, count.boundary(), last ? wanted_rows : boundary_rows, omitted ? "boundary" : nullptr);
    }
  }
  count.lm_head();
  return std::move(count).stages();
}

Cost total(const std::vector<StageCost>& stages) {
  Cost sum;
  for (const StageCost& stage : stages) {
    sum.flops += stage.cost.flops;
    sum.bytes += stage.cost.bytes;
  }
  return sum;
}

}  // namespace pop
