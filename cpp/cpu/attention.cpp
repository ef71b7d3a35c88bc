// Causal attention of query rows over the KV cache, for prefill and for the boundary recompute.
//
// Work: 4 * head_dim FLOPs per (query row, head, visible key), half of them q.k, half p.v; a T-token
// prompt has T * (T + 1) / 2 visible pairs a head. Floor: with AVX512_BF16 a vdpbf16ps does 64 FLOPs,
// so 16 scores take head_dim of them, beside about 15 instructions of softmax: 80 % (head_dim 64) to
// 90 % (128) of the GEMM rate. A few rows over a long cache are bound by the bytes of K and V instead,
// 4 * head_dim bytes a key and KV head in 16 bits.
//
// Tile path (attention_tile.h). The lanes of a vector are (query row, head) pairs: the query heads of
// a KV head share its tiles, and a lane keeps its own maximum and sum, so that the softmax has no
// horizontal step. Both products have the form c[r, lane] += a(r, u) * b[u, lane] with a broadcast:
//   scores[key, lane]  = sum over d    of K[key, d] * Q[d, lane]        K as it lies in the cache
//   O[channel, lane]  += sum over keys of V[key, channel] * P[key, lane]
// Q is turned once a task; K and V are copied a tile of 64 keys at a time, for all lanes of the task.
// With vdpbf16ps the step of u is a pair of bfloat16: neighbours along d in Q and K, two keys in V
// and P, which the packing of V and the rounding of P interleave. Elsewhere operands are float32.
// Tiles that no lane sees are skipped, also inside a task by groups of 8 keys, and only tiles at an
// edge of the mask compare positions. Sums are rescaled only where a maximum grew a lot.
//
// Stream path (attention_stream.h): at most 8 lanes, bfloat16 with AVX512_BF16. Dot products along d
// and sums along channels read K and V where they are, without packing.
//
// A row's bits depend on its own q, its keys and the number of its segment's rows (which picks the
// path), never on other rows, sequences or the cut into tasks: hidden keys add exact zeros.
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
      return TileTask<BFloat16, Bf16Units>(params, task, scratch).run();
    case DType::f16:
      return TileTask<Float16, FloatUnits>(params, task, scratch).run();
  }
}

}  // namespace pop::cpu::POP_ISA
