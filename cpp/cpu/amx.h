// Tiles of Intel AMX: eight registers of a core, of 16 rows of 64 bytes each.
//
// Intrinsics take the number of a tile as a literal. g++ hides from the optimiser that they read memory, so stores that
// they are to see come before amx_fence(). Pointers that are sums are in parentheses: some headers cast the argument
// without any.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pop::cpu::POP_ISA {
namespace {

constexpr int kAmxRows = 16;   // of a tile, and the 32-bit elements in each
constexpr int kAmxBytes = 64;  // in each row

inline void amx_fence() { __asm__ volatile("" ::: "memory"); }

// The operand of LDTILECFG: all tiles have their full size. Memory beyond the last column or group has to be readable.
struct AmxConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {kAmxBytes, kAmxBytes, kAmxBytes, kAmxBytes, kAmxBytes, kAmxBytes, kAmxBytes, kAmxBytes};
  uint8_t rows[16] = {kAmxRows, kAmxRows, kAmxRows, kAmxRows, kAmxRows, kAmxRows, kAmxRows, kAmxRows};
};
static_assert(sizeof(AmxConfiguration) == 64);
alignas(64) constexpr AmxConfiguration kAmxConfiguration;

// Tiles for as long as it lives. A released tile is not saved when the system switches threads.
struct AmxTiles {
  AmxTiles() { _tile_loadconfig(&kAmxConfiguration); }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
};

}  // namespace
}  // namespace pop::cpu::POP_ISA
