// The kernel table of one instruction set.
#include "cpu/attention.h"
#include "cpu/kernels.h"
#include "cpu/row_kernels.h"

#define POP_STRINGIFY_(text) #text
#define POP_STRINGIFY(text) POP_STRINGIFY_(text)

namespace pop::cpu::POP_ISA {

extern const Kernels kernels = {
    .name = POP_STRINGIFY(POP_ISA),
    .embed = embed,
    .add_features = add_features,
    .rms_norm = rms_norm,
    .gated_act = gated_act,
    .rope_cache_write = rope_cache_write,
    .quantize_rows = quantize_rows,
    .to_float32 = to_float32,
    .route = route,
    .combine_rows = combine_rows,
    .skinny_gemm = skinny_gemm,
    .attention_task_rows = attention_task_rows,
    .attention_scratch = attention_scratch,
    .attention = attention,
};

}  // namespace pop::cpu::POP_ISA
