// The rows of an operator call and their slots in the cache, from its length tensors.
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
  int64_t capacity;                         // slots of a cache: no sequence has more positions
};

// Reads and checks the length tensors, and owns the arrays that `address` points into.
class Geometry {
 public:
  // `op` is the start of every error text. If `boundary` and `logits_to_keep` are null, every row is wanted and rows
  // keep their order. `blocks`: TokenBlocks as [blocks, 3] int32 on the host, or none.
  Geometry(const std::string& op, const Lengths& lengths, int64_t rows, const Tensor* boundary,
           const Tensor* logits_to_keep, const std::optional<Tensor>& blocks = std::nullopt);
  Geometry(const Geometry&) = delete;
  Geometry& operator=(const Geometry&) = delete;

  const BatchLayout& layout() const { return layout_; }
  const std::vector<SequenceCall>& sequences() const { return sequences_; }
  CacheAddress address() const;

  // Checks that every position of the call has a slot in a cache [batch, kv_heads, capacity, head_dim] named `cache`.
  void check_fits(const std::string& op, const std::string& cache, int64_t batch, int64_t capacity) const;

  // The smallest range of slots that contains the new rows of a sequence.
  std::pair<int64_t, int64_t> written_slots(int64_t sequence) const;

 private:
  std::vector<SequenceCall> sequences_;
  BatchLayout layout_;
  std::vector<int64_t> start_;
  std::vector<int32_t> slot_table_;
  int64_t slot_table_stride_ = 0;
};

}  // namespace pop
