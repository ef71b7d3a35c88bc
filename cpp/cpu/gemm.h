// The CPU backend's matrix product: whose it is, by processor, dtype and shape.
#pragma once

#include <cstdint>

#include "backend.h"

namespace pop::cpu {

void gemm(const GemmParams& params);

// See Backend::mlp_rows.
int64_t mlp_rows(DType dtype);

// 1: a float32 product of many rows goes to aten in blocks of columns, one a thread; 0: as a whole.
// Returns what it was.
int64_t set_gemm_blocks(int64_t value);

}  // namespace pop::cpu
