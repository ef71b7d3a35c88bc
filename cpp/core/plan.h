// Which layers prefill omits, and for how many last rows it does not.
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
  int64_t boundary = 1;       // last rows of each prompt that run at full depth
  int64_t min_tokens = 0;     // only `enable` reads it: shorter prompts run at full depth

  // Throws std::invalid_argument naming the field, what was expected and what came:
  // num_layers >= 1, layers in range and not repeated, at least one layer retained,
  // boundary >= 1, min_tokens >= 0. Sorts `omit`.
  void validate();

  // Maximal sequences of consecutive omitted layers; the layers of a run share one hidden state.
  std::vector<LayerRange> runs() const;

  // Runs of omit + {num_layers - 1}: nobody reads the last layer's context rows, so there
  // they need K/V only, whether that layer is omitted or not. It is what the runtime executes.
  std::vector<LayerRange> projected_runs() const;

  std::string to_json() const;
  static Plan from_json(const std::string& text);  // ignores keys it does not know
};

}  // namespace pop
