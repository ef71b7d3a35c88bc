// Products of the tile path of attention.cpp in tiles of AMX. TDPBF16PS adds to sums [16 rows][16 lanes] the products
// of a [16 rows][16 pairs] with b [16 pairs][16 lanes]. So both operands have the layout of the tile path, but for V,
// whose rows are channels here: [head_dim, kKeys / 2] pairs of keys.
#pragma once

#include "attention_task.h"

#if defined(POP_AMX)
#include "amx.h"
#endif

namespace pop::cpu::POP_ISA {
namespace {

#if defined(POP_AMX)

struct AmxUnits : PairUnits {
  static constexpr bool kTiles = true;
  static constexpr int kUnits = 16, kRows = 16;  // of an operand

  // Other head_dims would need tiles of other sizes.
  static bool suits(int64_t head_dim) { return head_dim % (kDepth * kUnits) == 0; }
};

// c[r, lane] (+)= sum over u of a[r, u] * b[u, lane], for multiples of 16 rows and units. Sums are in tiles 0 to 2, a
// in 7 and b in 4 to 6. Three sums in turn hide the latency of a product.
template <int kVecs, bool kAdd>
void multiply_tiles(int64_t rows, int64_t units, const float* a, int64_t a_stride, const float* b, float* c) {
  static_assert(kVecs >= 1 && kVecs <= 3);
  constexpr int64_t kStride = TileConfig::kWidth * 4;
  amx_fence();
  for (int64_t r = 0; r < rows; r += kAmxRows) {
    float* sums = c + r * TileConfig::kWidth;
    if constexpr (kAdd) {
      _tile_loadd(0, sums, kStride);
      if constexpr (kVecs > 1) _tile_loadd(1, (sums + kLanes), kStride);
      if constexpr (kVecs > 2) _tile_loadd(2, (sums + 2 * kLanes), kStride);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
    }
    for (int64_t u = 0; u < units; u += AmxUnits::kUnits) {
      const float* lanes = b + u * TileConfig::kWidth;
      _tile_loadd(7, (a + r * a_stride + u), a_stride * 4);
      _tile_loadd(4, lanes, kStride);
      _tile_dpbf16ps(0, 7, 4);
      if constexpr (kVecs > 1) {
        _tile_loadd(5, (lanes + kLanes), kStride);
        _tile_dpbf16ps(1, 7, 5);
      }
      if constexpr (kVecs > 2) {
        _tile_loadd(6, (lanes + 2 * kLanes), kStride);
        _tile_dpbf16ps(2, 7, 6);
      }
    }
    _tile_stored(0, sums, kStride);
    if constexpr (kVecs > 1) _tile_stored(1, (sums + kLanes), kStride);
    if constexpr (kVecs > 2) _tile_stored(2, (sums + 2 * kLanes), kStride);
  }
  amx_fence();
}

#else

struct AmxTiles {};

#endif

// Nothing, where products need no tiles.
struct NoTiles {};

}  // namespace
}  // namespace pop::cpu::POP_ISA
