// Causal attention of query rows over the KV cache, for prefill and for the boundary recompute.
//
// Work: 4 * head_dim FLOPs per (query row, head, visible key), half of them for q.k, half for p.v. A prompt of T tokens
// has T * (T + 1) / 2 visible pairs per head. Floor: with AVX512_BF16 a vdpbf16ps does 64 FLOPs, so 16 scores take
// head_dim of them, plus about 15 instructions of softmax: 80 % (head_dim 64) to 90 % (128) of the GEMM rate. A few
// rows over a long cache are bound by the bytes of K and V instead, 4 * head_dim bytes per key and KV head in 16 bits.
//
// Tile path (attention_tile.h). The lanes of a vector are (query row, head) pairs. The query heads of a KV head share
// its tiles, and each lane keeps its own maximum and sum, so the softmax has no horizontal step. Both products have the
// form c[r, lane] += a(r, u) * b[u, lane] with a broadcast:
//   scores[key, lane]  = sum over d    of K[key, d] * Q[d, lane]        K in the layout of the cache
//   O[channel, lane]  += sum over keys of V[key, channel] * P[key, lane]
// Q is transposed once per task; K and V are copied a tile of keys at a time (TileConfig::kKeys), for all lanes of the
// task. With vdpbf16ps a step of u is a pair of bfloat16: adjacent elements along d in Q and K, two keys in V and P,
// which are interleaved when V is packed and P is rounded. Otherwise operands are float32. Tiles that no lane sees are
// skipped, within a task also groups of 8 keys (with AMX 16 for scores and 32 for values), and only tiles at an edge of
// the mask compare positions. Sums are rescaled only if a maximum grew by more than kSlack. A lane with a sink starts
// as if it had seen a key of that score, whose value is zero.
//
// With AMX both products are those of its tiles (attention_amx.h), for bfloat16 and a head_dim that is a multiple of
// 32: 16 x 16 scores of head_dim 64 take 64 cycles of products and about 120 of softmax, which is then the longer part.
//
// Stream path (attention_stream.h): at most 8 lanes, bfloat16 with AVX512_BF16. Dot products along d and sums along
// channels read K and V from the cache, without packing.
//
// The bits of a row depend on its own q, its keys and the number of rows of its segment (which selects the path), never
// on other rows, sequences or the cut into tasks: hidden keys add exact zeros, if their values are finite.
#include "attention.h"

#include "attention_stream.h"
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
#if defined(__AVX512BF16__)
  if (StreamTask::suits(params, params.segments[task.segment])) return StreamTask(params, task).run();
#endif
  switch (params.dtype) {
    case DType::f32:
      return TileTask<float, FloatUnits>(params, task, scratch).run();
    case DType::bf16:
#if defined(POP_AMX)
      if (AmxUnits::suits(params.head_dim)) return TileTask<BFloat16, AmxUnits>(params, task, scratch).run();
#endif
      return TileTask<BFloat16, Bf16Units>(params, task, scratch).run();
    case DType::f16:
      return TileTask<Float16, FloatUnits>(params, task, scratch).run();
  }
}

}  // namespace pop::cpu::POP_ISA
