// The independent KV projection of a run as a sequence of smaller steps, for backends that have no single kernel for
// it: RMSNorm scale, one product for the layers of the run, and a write step that each backend brings.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "backend/backend.h"

namespace pop {

// How a backend cuts a projection.
struct KvProjectChunks {
  int64_t rows;                                 // at a time; they bound the workspace
  std::function<int64_t(int64_t rows)> layers;  // of one product, for a chunk of so many rows
};

// Writes rows kv [part.rows, part.layers * 2 * kv_dim], as the product left them, to the caches of `part`: row scale
// part.rstd if not null, bias, k_norm (unless norm_over_heads, which is done), RoPE.
using KvWrite = std::function<void(const KvProjectParams& part, const void* kv)>;

// Bytes of KvProjectParams::workspace for chunks of at most `rows` rows.
size_t kv_project_bytes(DType dtype, int64_t rows, int64_t hidden_size, int64_t layers, int64_t kv_dim);

void kv_project_in_chunks(Backend& backend, const KvProjectParams& params, const KvProjectChunks& chunks,
                          const KvWrite& write);

}  // namespace pop
