// Prefill attention on a CUDA device by the libraries that do it best: FlashAttention 3 or 2 where their
// packages are installed, torch's kernels otherwise. Each is an operator of another library,
// called only under a schema it was written against (torch/foreign_ops.h).
#pragma once

#include "backend.h"

namespace pop {

// Computes segments [0, p.num_segments) of one shape, that is, of equal `rows`, `first_position` and
// `cache_start`, for consecutive sequences and rows. Returns false, having done nothing, where no
// library serves the call: float32, a slot table, or no library at all.
bool library_attention(const AttentionParams& p, int device, int compute_capability);

// Prompts without a past take aten::scaled_dot_product_attention, cuDNN's kernel on Hopper and Blackwell, for as many
// rows as are a multiple of `value`, and torch's flash kernel for those that are left; 0: the flash kernel alone.
// Returns what held before. cuDNN builds a plan for every new shape: multiples keep them few.
int64_t set_sdpa_rows(int64_t value);

// Name of the library that would serve it; "" for none.
const char* library_attention_provider(const AttentionParams& p, int compute_capability);

}  // namespace pop
