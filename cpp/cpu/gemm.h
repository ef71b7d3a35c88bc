// The CPU backend's matrix product.
#pragma once

#include <cstdint>

#include "backend/params.h"

namespace pop::cpu {

void gemm(const GemmParams& params);

// Products whose results do not overlap.
void gemm(const GemmParams* products, int64_t count);

// See Backend::mlp_rows.
int64_t mlp_rows(DType dtype, Products products);

// 1: a float32 product of many rows goes to aten in blocks of columns, one per thread; 0: as a whole. For calls of
// this thread. Returns the value before.
int64_t set_gemm_blocks(int64_t value);

}  // namespace pop::cpu
