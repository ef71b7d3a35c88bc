// What the length tensors of an operator say about its rows and their places in the cache.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "runtime/batch.h"

namespace pop {

using torch::stable::Tensor;

struct Lengths {
  const Tensor& cu_seqlens;                 // [batch + 1] int32, host
  const Tensor& past_lens;                  // [batch] int32, host
  const Tensor& cache_start;                // [batch] int32, host
  const std::optional<Tensor>& slot_table;  // [batch, >= past + tokens] int32, host, or none
};

// Owns the arrays that `address` points into.
class Geometry {
 public:
  // `op` opens every error text. With `boundary` and `logits_to_keep` null every row is wanted
  // and rows keep their order. `blocks`: [blocks, 3] int32, host, of TokenBlock, or none.
  Geometry(const std::string& op, const Lengths& lengths, int64_t rows, const Tensor* boundary,
           const Tensor* logits_to_keep, const std::optional<Tensor>& blocks = std::nullopt);
  Geometry(const Geometry&) = delete;
  Geometry& operator=(const Geometry&) = delete;

  const BatchLayout& layout() const { return layout_; }
  const std::vector<SequenceCall>& sequences() const { return sequences_; }
  CacheAddress address() const;

  // Every position of the call has a slot inside `cache` [batch, kv_heads, capacity, head_dim].
  void check_fits(const std::string& op, const std::string& cache, int64_t batch, int64_t capacity) const;

  // The smallest range of slots that the new rows of a sequence are written to.
  std::pair<int64_t, int64_t> written_slots(int64_t sequence) const;

 private:
  std::vector<SequenceCall> sequences_;
  BatchLayout layout_;
  std::vector<int64_t> start_;
  std::vector<int32_t> slot_table_;
  int64_t slot_table_stride_ = 0;
};

}  // namespace pop
