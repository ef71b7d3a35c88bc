// A plan: the layers that prefill omits for context rows, and the number of boundary rows that run at full depth.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pop {

// Layers [begin, end).
struct LayerRange {
  int64_t begin;
  int64_t end;
  int64_t size() const { return end - begin; }
};

struct Plan {
  int64_t num_layers = 0;
  std::vector<int64_t> omit;  // sorted, no duplicates
  int64_t boundary = 1;       // rows at the end of each prompt that run at full depth
  int64_t min_tokens = 0;     // used by `enable` alone: shorter prompts run at full depth

  // Throws std::invalid_argument naming the field, what was expected and what came:
  // num_layers >= 1, layers in range and not repeated, at least one layer retained,
  // boundary >= 1, min_tokens >= 0. Sorts `omit`.
  void validate();

  // Maximal sequences of consecutive omitted layers; the layers of a run share one hidden state.
  std::vector<LayerRange> runs() const;

  // The runs of omit + {num_layers - 1}, which are those that the runtime executes: no layer reads the context rows
  // after the last layer, so they need only K and V there, whether it is omitted or not.
  std::vector<LayerRange> projected_runs() const;

  std::string to_json() const;
  static Plan from_json(const std::string& text);  // ignores keys it does not know
};

}  // namespace pop
