// Prefill attention on a CUDA device by other libraries: FlashAttention 3 or 2 if installed, else torch's kernels. Each
// is an operator of another library, called only under a schema that this code was written for (torch/foreign_ops.h).
#pragma once

#include "backend/params.h"

namespace pop {

// Computes segments [0, p.num_segments). They must be of one shape (equal `rows`, `first_position`, `cache_start` and
// `visible_end`) and cover consecutive sequences and rows. Returns false without any effect if no library supports the
// call: float32, a slot table, a soft cap without FlashAttention, or no library.
// `sdpa_rows` is the option of that name.
bool library_attention(const AttentionParams& p, int device, int compute_capability, int64_t sdpa_rows);

}  // namespace pop
