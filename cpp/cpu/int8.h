// Products of 8-bit integers on a CPU: cuts the work into pieces for torch's threads.
#pragma once

#include "backend/params.h"

namespace pop::cpu {

// A product of Products::int8.
void int8_gemm(const GemmParams& params);

// See Backend::gated_gemm.
void int8_gated_gemm(const GatedGemmParams& params);

}  // namespace pop::cpu
