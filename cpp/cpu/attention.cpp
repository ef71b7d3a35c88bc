#include "attention.h"

#include "attention_tile.h"

namespace pop::cpu::POP_ISA {
namespace {

#if defined(__AVX512BF16__)
using Bf16Units = PairUnits;
#else
using Bf16Units = FloatUnits;
#endif

}  // namespace

int64_t attention_task_rows(const AttentionParams& params) {
  const int64_t rows = TileConfig::kTaskLanes * params.kv_heads / params.heads;
  return rows > 0 ? rows : 1;
}

size_t attention_scratch(const AttentionParams& params) {
  const int64_t lanes = attention_task_rows(params) * (params.heads / params.kv_heads);
  const int depth = params.dtype == DType::bf16 ? Bf16Units::kDepth : FloatUnits::kDepth;
  return TileScratch(nullptr, lanes, params.head_dim, depth).bytes;
}

void attention(const AttentionParams& params, const AttentionTask& task, void* scratch) {
  switch (params.dtype) {
    case DType::f32:
      return TileTask<float, FloatUnits>(params, task, scratch).run();
    case DType::bf16:
      return TileTask<BFloat16, Bf16Units>(params, task, scratch).run();
    case DType::f16:
      return TileTask<Float16, FloatUnits>(params, task, scratch).run();
  }
}

}  // namespace pop::cpu::POP_ISA
