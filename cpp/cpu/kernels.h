// The CPU kernels: single-threaded functions over a range of rows or one task. They are compiled once per instruction
// set (namespace POP_ISA) and chosen at run time. cpu_backend.cpp distributes them over threads.
//
// A file that is compiled per instruction set includes no torch header and instantiates no template of the standard
// library: the linker keeps one copy of an inline function, and that could be the one with AVX-512 instructions.
#pragma once

#include "backend/params.h"

namespace pop::cpu {

// The work of one call of `attention`: query rows [row, row + rows) of segment `segment`, counted from the segment's
// first row, for the query heads that share `kv_head`.
struct AttentionTask {
  int64_t segment;
  int64_t kv_head;
  int64_t row;
  int64_t rows;
};

struct Kernels {
  const char* name;  // "amx", "avx512_bf16", "avx2", "baseline"

  // Rows [begin, end) of the params' rows.
  void (*embed)(const EmbedParams&, int64_t begin, int64_t end);
  void (*add_features)(const AddFeaturesParams&, int64_t begin, int64_t end);
  void (*rms_norm)(const RmsNormParams&, int64_t begin, int64_t end);
  void (*gated_act)(const GatedActParams&, int64_t begin, int64_t end);
  void (*rope_cache_write)(const RopeCacheWriteParams&, int64_t begin, int64_t end);
  void (*quantize_rows)(const QuantizeRowsParams&, int64_t begin, int64_t end);
  void (*to_float32)(const ToFloat32Params&, int64_t begin, int64_t end);
  void (*route)(const RouteParams&, int64_t begin, int64_t end);
  void (*combine_rows)(const CombineRowsParams&, int64_t begin, int64_t end);
  // Columns [begin, end) of out, for a GEMM with few rows, which is bound by the bytes of w.
  void (*skinny_gemm)(const GemmParams&, int64_t begin, int64_t end);

  // The most query rows of one attention task, and the bytes of scratch of a call (64-byte aligned).
  int64_t (*attention_task_rows)(const AttentionParams&);
  size_t (*attention_scratch)(const AttentionParams&);
  void (*attention)(const AttentionParams&, const AttentionTask&, void* scratch);
};

// One table per compiled instruction set.
namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}

// The best table that this processor can run. The environment variable POP_CPU_ISA=baseline|avx2|avx_vnni|avx512_vnni|
// avx512_bf16|amx selects the best one that needs no higher set than that.
const Kernels& kernels();

// True if this process may use AMX, whatever POP_CPU_ISA says: libraries use it too.
bool has_amx();

}  // namespace pop::cpu
