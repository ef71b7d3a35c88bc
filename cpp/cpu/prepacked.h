// Weights in a layout of oneDNN's own, and what multiplies with them; docs/cpu.md has what that gains and costs.
#pragma once

#include <memory>
#include <string>

#include "backend.h"

namespace pop::cpu {

// Why weights of `dtype` cannot be prepacked in this process; empty if they can.
std::string prepack_missing(DType dtype);

std::unique_ptr<PackedWeight> prepack(const PrepackParams& params);

// A product whose weight is prepacked. oneDNN's result is copied to its place, some rows at a time.
void packed_gemm(const GemmParams& params);

}  // namespace pop::cpu
