// Tiles of the int8 kernel (cpu/int8_gemm.cpp): the sums of some columns of w and one panel of rows of a, in registers.
#pragma once

#include "cpu/int8_lanes.h"

#if defined(POP_AMX)
#include "cpu/int8_amx.h"
#endif

namespace pop::cpu::POP_ISA {
namespace {

#if defined(POP_AMX)
constexpr bool kAmx = true;
#else
constexpr bool kAmx = false;
#endif

constexpr int kVectors = 2, kPanel = kVectors * kLanes;
#if defined(POP_AMX)
constexpr int kTileColumns = 2 * kAmxRows;  // 4 tiles of sums, 2 of a and 2 of w
#elif defined(__AVX512F__)
constexpr int kTileColumns = 12;  // 24 sums, 2 operands of a and 1 of w in 32 registers
#elif defined(__AVX2__)
constexpr int kTileColumns = 6;  // 12, 2 and 1 in 16
#else
constexpr int kTileColumns = 2;  // the plain form needs registers for halves
#endif

constexpr bool kOffset = kVnni && !kAmx;  // packed rows are offset by 128
// Tiles of AMX read a multiple of so many groups and columns.
constexpr int kGroupMultiple = kAmx ? 16 : 1, kColumnMultiple = kAmx ? kTileColumns : 1;

// Of a block of k of one panel: half of L1. AMX reads panels from L2 as fast as L1 lets it read w beside them, and
// moving sums between blocks would cost it more.
constexpr int64_t kPanelBytes = kAmx ? 64 << 10 : 16 << 10;
constexpr int64_t kGroups = kPanelBytes / (kPanel * 4);
constexpr int64_t kElements = kGroups * kGroup;
// Columns of w in scratch lie apart by a little more than a block, so that they do not compete for sets of the cache.
constexpr int64_t kColumnGroups = kGroups + 16;
constexpr int64_t kMostScales = kElements / 32;  // of a block of k

// A block of k of a product with a scale for each group of elements along k, whose sums are float32.
struct GroupedBlock {
  const uint32_t* a;     // of the panel
  const uint32_t* w;     // [columns][kColumnGroups]
  int64_t groups;        // of dot()
  int64_t scale_groups;  // groups of dot() with one scale
  const int32_t* start;  // [columns][kMostScales]
  const float* scale;    // of the block, [columns][scale_stride]
  int64_t scale_stride;
  bool fresh;
};

template <int Columns, int Vectors>
void grouped_tile(const GroupedBlock& b, int64_t column, float* sums) {
  Vec totals[Columns][Vectors];
  for (int c = 0; c < Columns; ++c) {
    for (int v = 0; v < Vectors; ++v) totals[c][v] = b.fresh ? Vec{} : load(sums + c * kPanel + v * kLanes);
  }
  const uint32_t* w = b.w + column * kColumnGroups;
  for (int64_t g = 0, scale = 0; g < b.groups; ++scale) {
    VecU32 exact[Columns][Vectors];
    for (int c = 0; c < Columns; ++c) {
      const VecU32 start = splat_u32(static_cast<uint32_t>(b.start[(column + c) * kMostScales + scale]));
      for (int v = 0; v < Vectors; ++v) exact[c][v] = start;
    }
    const int64_t end = g + b.scale_groups < b.groups ? g + b.scale_groups : b.groups;
    for (; g < end; ++g) {
      VecU32 a_operands[Vectors];
      for (int v = 0; v < Vectors; ++v) {
        a_operands[v] = load_u32(b.a + g * kPanel + v * kLanes);
        if constexpr (kVnni && !kOffset) a_operands[v] ^= splat_u32(0x80808080u);  // dot() offsets rows, AMX does not
      }
      for (int c = 0; c < Columns; ++c) {
        const VecU32 w_operand = splat_u32(w[c * kColumnGroups + g]);
        for (int v = 0; v < Vectors; ++v) exact[c][v] = dot(exact[c][v], a_operands[v], w_operand);
      }
    }
    for (int c = 0; c < Columns; ++c) {
      const Vec factor = splat(b.scale[(column + c) * b.scale_stride + scale]);
      for (int v = 0; v < Vectors; ++v) {
        totals[c][v] += __builtin_convertvector(lane_cast<VecI32>(exact[c][v]), Vec) * factor;
      }
    }
  }
  for (int c = 0; c < Columns; ++c) {
    for (int v = 0; v < Vectors; ++v) store(sums + c * kPanel + v * kLanes, totals[c][v]);
  }
}

template <int Vectors>
void grouped_panel(const GroupedBlock& b, int64_t columns, float* sums) {
#if defined(__AVX512F__)
  constexpr int kTile = 6;  // 12 sums, 12 of a group, 2 operands of a and 1 of w in 32 registers
#else
  constexpr int kTile = kLanes == 8 ? 3 : 1;  // 6, 6, 2 and 1 in 16
#endif
  int64_t column = 0;
  for (; column + kTile <= columns; column += kTile) {
    grouped_tile<kTile, Vectors>(b, column, sums + column * kPanel);
  }
  for (; column < columns; ++column) grouped_tile<1, Vectors>(b, column, sums + column * kPanel);
}

#if defined(POP_AMX)

// Where packed columns lie, and how far their vectors of kLanes groups, and neighbouring columns of a tile, are apart.
int64_t column_place(int64_t column, int64_t groups) { return amx_column(column, groups); }
constexpr int64_t kVectorStep = kAmxStep, kColumnStep = kAmxGroups;

static_assert(kGroupMultiple == kAmxGroups && kColumnMultiple == 2 * kAmxRows && kPanel == kAmxSums);

// The tiles of one panel. Sums start from zero.
template <int Vectors>
void panel_of_columns(int64_t columns, const uint32_t* a, const uint32_t* w, int64_t groups, const int32_t* /*start*/,
                      bool fresh, int32_t* sums) {
  for (int64_t column = 0; column < columns; column += kTileColumns) {
    const auto tile = columns - column > kAmxRows ? amx_tile<2, Vectors> : amx_tile<1, Vectors>;
    tile(a, w + amx_column(column, groups), groups, fresh, sums + column * kPanel);
  }
}

#else

int64_t column_place(int64_t column, int64_t /*groups*/) { return column * kColumnGroups; }
constexpr int64_t kVectorStep = kLanes, kColumnStep = kColumnGroups;

// sums [Columns][kPanel] of Vectors * kLanes rows: themselves, or zero if `fresh`, + start + the products of `groups`
// groups.
template <int Columns, int Vectors>
void tile(const uint32_t* a, const uint32_t* w, int64_t groups, const int32_t* start, bool fresh, int32_t* sums) {
  VecU32 totals[Columns][Vectors];
  for (int c = 0; c < Columns; ++c) {
    for (int v = 0; v < Vectors; ++v) {
      totals[c][v] = splat_u32(static_cast<uint32_t>(start[c]));
      if (!fresh) totals[c][v] += load_u32(sums + c * kPanel + v * kLanes);
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    VecU32 a_operands[Vectors];
    for (int v = 0; v < Vectors; ++v) a_operands[v] = load_u32(a + g * kPanel + v * kLanes);
    for (int c = 0; c < Columns; ++c) {
      const VecU32 w_operand = splat_u32(w[c * kColumnGroups + g]);
      for (int v = 0; v < Vectors; ++v) totals[c][v] = dot(totals[c][v], a_operands[v], w_operand);
    }
  }
  for (int c = 0; c < Columns; ++c) {
    for (int v = 0; v < Vectors; ++v) store_u32(sums + c * kPanel + v * kLanes, totals[c][v]);
  }
}

template <int Vectors, int Columns = kTileColumns>
POP_INLINE void tile_of(int64_t columns, const uint32_t* a, const uint32_t* w, int64_t groups, const int32_t* start,
                        bool fresh, int32_t* sums) {
  if constexpr (Columns > 1) {
    if (columns < Columns) return tile_of<Vectors, Columns - 1>(columns, a, w, groups, start, fresh, sums);
  }
  tile<Columns, Vectors>(a, w, groups, start, fresh, sums);
}

// The tiles of one panel, of nearly equal width.
template <int Vectors>
void panel_of_columns(int64_t columns, const uint32_t* a, const uint32_t* w, int64_t groups, const int32_t* start,
                      bool fresh, int32_t* sums) {
  const int64_t tiles = ceil_div(columns, kTileColumns);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t column = columns * t / tiles, end = columns * (t + 1) / tiles;
    tile_of<Vectors>(end - column, a, w + column * kColumnGroups, groups, start + column, fresh,
                     sums + column * kPanel);
  }
}

#endif

}  // namespace
}  // namespace pop::cpu::POP_ISA
