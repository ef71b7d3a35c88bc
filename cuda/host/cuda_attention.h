// Prefill attention on a CUDA device by other libraries: FlashAttention 3 or 2 if installed, else torch's kernels. Each
// is an operator of another library, called only under a schema that this code was written for (torch/foreign_ops.h).
#pragma once

#include "backend/params.h"

namespace pop {

// Computes segments [0, p.num_segments). They must be of one shape (equal `rows`, `first_position`, `cache_start` and
// `visible_end`) and cover consecutive sequences and rows. Returns false without any effect if no library supports the
// call: float32, a slot table, a soft cap without FlashAttention, or no library.
bool library_attention(const AttentionParams& p, int device, int compute_capability);

// Prompts without a past use aten::scaled_dot_product_attention (cuDNN's kernel on Hopper and Blackwell) for the
// largest multiple of `value` rows, and torch's flash kernel for the remaining rows. 0: the flash kernel alone. cuDNN
// builds a plan for every new shape; multiples keep the number of shapes small. Returns the value before.
int64_t set_sdpa_rows(int64_t value);

// The operator that library_attention would call; "" for none.
const char* library_attention_provider(const AttentionParams& p, int compute_capability);

}  // namespace pop
