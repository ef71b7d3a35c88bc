// The tiles of the int8 kernel (cpu/int8_gemm.cpp) on AMX. TDPBSSD adds to sums [16 columns][16 rows of a] the products
// of a weight [16 columns][64 bytes along k] with a panel [16 groups of 4 along k][16 rows of a][4 bytes]. All of them
// are signed, so nothing is offset.
#pragma once

#include "cpu/amx.h"

namespace pop::cpu::POP_ISA {
namespace {

constexpr int kAmxGroups = 16;  // of 4 along k, in each row of a weight

// Packed columns of a weight: tiles of 16 columns, two of them for each kAmxGroups groups, so that a product reads
// memory in one direction. Returns the place of `column`, whose groups follow in rows that are kAmxStep apart.
constexpr int64_t kAmxStep = 2 * kAmxRows * kAmxGroups;
inline int64_t amx_column(int64_t column, int64_t groups) {
  return column / (2 * kAmxRows) * (2 * kAmxRows) * groups + column % (2 * kAmxRows) * kAmxGroups;
}

// sums [Columns * 16][kAmxSums]: themselves, or zero if `fresh`, + the products of `groups` groups, a multiple of
// kAmxGroups, of a [groups][kAmxSums] and of packed columns.
//
// A product starts every 16 cycles and takes longer to arrive, so four sums are added to in turn. Their four operands,
// 4 KiB, come from L2, which is the limit.
constexpr int64_t kAmxSums = 2 * kAmxRows;
template <int Columns, int Rows>
void amx_tile(const uint32_t* a, const uint32_t* w, int64_t groups, bool fresh, int32_t* sums) {
  static_assert((Columns == 1 || Columns == 2) && (Rows == 1 || Rows == 2));
  constexpr int64_t kStride = kAmxSums * 4;
  int32_t* more_sums = sums + kAmxRows * kAmxSums;
  amx_fence();
  // Sums of the first 16 columns are in tiles 0 and 1, of the second in 2 and 3; w in 4 and 5, a in 6 and 7.
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kStride);
    if constexpr (Rows == 2) _tile_loadd(1, (sums + kAmxRows), kStride);
    if constexpr (Columns == 2) _tile_loadd(2, more_sums, kStride);
    if constexpr (Columns == 2 && Rows == 2) _tile_loadd(3, (more_sums + kAmxRows), kStride);
  }
  for (int64_t g = 0; g < groups; g += kAmxGroups, a += kAmxGroups * kAmxSums, w += kAmxStep) {
    _tile_loadd(4, w, kAmxBytes);
    _tile_loadd(6, a, kStride);
    _tile_dpbssd(0, 4, 6);
    if constexpr (Rows == 2) {
      _tile_loadd(7, (a + kAmxRows), kStride);
      _tile_dpbssd(1, 4, 7);
    }
    if constexpr (Columns == 2) {
      _tile_loadd(5, (w + kAmxRows * kAmxGroups), kAmxBytes);
      _tile_dpbssd(2, 5, 6);
    }
    if constexpr (Columns == 2 && Rows == 2) _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, sums, kStride);
  if constexpr (Rows == 2) _tile_stored(1, (sums + kAmxRows), kStride);
  if constexpr (Columns == 2) _tile_stored(2, more_sums, kStride);
  if constexpr (Columns == 2 && Rows == 2) _tile_stored(3, (more_sums + kAmxRows), kStride);
  amx_fence();
}

}  // namespace
}  // namespace pop::cpu::POP_ISA
