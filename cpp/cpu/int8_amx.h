// Tiles of Intel AMX for the int8 kernel (cpu/int8_gemm.cpp): matrices of 16 rows of 64 bytes, eight to a processor.
// TDPBSSD adds to sums [16 columns][16 rows of a] the products of a weight [16 columns][64 bytes along k] with a panel
// [16 groups of 4 along k][16 rows of a][4 bytes]. All of them are signed, so nothing is offset.
//
// Intrinsics take the number of a tile as a literal. g++ hides from the optimiser that they read memory, so stores that
// they are to see come before amx_fence().
#pragma once

#include <immintrin.h>

#include "cpu/vec.h"

namespace pop::cpu::POP_ISA {
namespace {

constexpr int kAmxRows = 16;    // of a tile, and the sums in each
constexpr int kAmxBytes = 64;   // in each row
constexpr int kAmxGroups = 16;  // of 4 along k, in each row of a weight

inline void amx_fence() { __asm__ volatile("" ::: "memory"); }

// The operand of LDTILECFG: all tiles have their full size. Memory beyond the last column or group has to be readable.
struct AmxConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {kAmxBytes, kAmxBytes, kAmxBytes, kAmxBytes, kAmxBytes, kAmxBytes, kAmxBytes, kAmxBytes};
  uint8_t rows[16] = {kAmxRows, kAmxRows, kAmxRows, kAmxRows, kAmxRows, kAmxRows, kAmxRows, kAmxRows};
};
static_assert(sizeof(AmxConfiguration) == 64);
alignas(64) constexpr AmxConfiguration kAmxConfiguration;

// Tiles for as long as it lives. Released ones cost a switch of threads nothing.
struct AmxTiles {
  AmxTiles() { _tile_loadconfig(&kAmxConfiguration); }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
};

// sums [Columns * 16][Rows * 16]: themselves, or zero if `fresh`, + the products of `groups` groups, a multiple of
// kAmxGroups. Strides are in bytes: from a group of a, a column of w and a column of sums to the next one.
//
// A product starts every 16 cycles and takes longer to arrive, so four sums are added to in turn. Their four loads from
// L1 take 8 cycles each, at two rows a cycle: half of the time of the products.
template <int Columns, int Rows>
void amx_tile(const uint32_t* a, int64_t a_stride, const uint32_t* w, int64_t w_stride, int64_t groups, bool fresh,
              int32_t* sums, int64_t stride) {
  static_assert((Columns == 1 || Columns == 2) && (Rows == 1 || Rows == 2));
  const uint32_t* more_w = w + kAmxRows * w_stride / 4;
  int32_t* more_sums = sums + kAmxRows * stride / 4;
  amx_fence();
  // Sums of the first 16 columns are in tiles 0 and 1, of the second in 2 and 3; w in 4 and 5, a in 6 and 7.
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, stride);
    if constexpr (Rows == 2) _tile_loadd(1, sums + kAmxRows, stride);
    if constexpr (Columns == 2) _tile_loadd(2, more_sums, stride);
    if constexpr (Columns == 2 && Rows == 2) _tile_loadd(3, more_sums + kAmxRows, stride);
  }
  for (int64_t g = 0; g < groups; g += kAmxGroups) {
    const uint32_t* of_a = a + g * a_stride / 4;
    _tile_loadd(4, w + g, w_stride);
    _tile_loadd(6, of_a, a_stride);
    _tile_dpbssd(0, 4, 6);
    if constexpr (Rows == 2) {
      _tile_loadd(7, of_a + kAmxRows, a_stride);
      _tile_dpbssd(1, 4, 7);
    }
    if constexpr (Columns == 2) {
      _tile_loadd(5, more_w + g, w_stride);
      _tile_dpbssd(2, 5, 6);
    }
    if constexpr (Columns == 2 && Rows == 2) _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, sums, stride);
  if constexpr (Rows == 2) _tile_stored(1, sums + kAmxRows, stride);
  if constexpr (Columns == 2) _tile_stored(2, more_sums, stride);
  if constexpr (Columns == 2 && Rows == 2) _tile_stored(3, more_sums + kAmxRows, stride);
  amx_fence();
}

}  // namespace
}  // namespace pop::cpu::POP_ISA
