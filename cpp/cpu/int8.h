// Products of 8-bit integers on a CPU: cuts the work into pieces for torch's threads.
#pragma once

#include "backend/params.h"

namespace pop::cpu {

// See Backend.
int64_t int8_weight_bytes(int64_t n, int64_t k);
void quantize_weight(const QuantizeWeightParams& params);

// A product of Products::int8.
void int8_gemm(const GemmParams& params);

}  // namespace pop::cpu
