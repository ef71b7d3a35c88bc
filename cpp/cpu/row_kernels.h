// The kernels that process rows independently, in the namespace of one instruction set.
#pragma once

#include "backend/params.h"

namespace pop::cpu::POP_ISA {

void embed(const EmbedParams&, int64_t begin, int64_t end);
void add_features(const AddFeaturesParams&, int64_t begin, int64_t end);
void rms_norm(const RmsNormParams&, int64_t begin, int64_t end);
void gated_act(const GatedActParams&, int64_t begin, int64_t end);
void rope_cache_write(const RopeCacheWriteParams&, int64_t begin, int64_t end);
void quantize_rows(const QuantizeRowsParams&, int64_t begin, int64_t end);
void to_float32(const ToFloat32Params&, int64_t begin, int64_t end);
void route(const RouteParams&, int64_t begin, int64_t end);
void combine_rows(const CombineRowsParams&, int64_t begin, int64_t end);
void skinny_gemm(const GemmParams&, int64_t begin, int64_t end);

}  // namespace pop::cpu::POP_ISA
