// The index arithmetic of kv_project_sm90.cu, for host and device: the order of tiles, the heads of columns, the places
// of elements in shared memory and in the accumulators, and the phases of the ring.
// tests/gpu/cuda_shim/check_kv_project_tile.cpp tests it.
#pragma once

#include <cstdint>

#include "core/math.h"
#include "host_device.h"

namespace pop::cuda::kv_tile {

// A block computes kRows x kColumns of the product, kDepth elements of hidden_size per step.
inline constexpr int kRows = 128;
inline constexpr int kColumns = 256;
inline constexpr int kDepth = 64;  // 128 bytes: a row of the 128-byte swizzle
inline constexpr int kStages = 4;

// W is loaded in boxes of kBoxRows rows, so that the two blocks of a cluster can load one each.
inline constexpr int kBoxRows = 128;
inline constexpr int kBoxes = kColumns / kBoxRows;

inline constexpr int kGroupThreads = 128;                // a warpgroup
inline constexpr int kConsumers = 2;                     // warpgroups that multiply
inline constexpr int kGroupRows = kRows / kConsumers;    // one wgmma is 64 rows high
inline constexpr int kAccumulators = kColumns / 2;       // a thread: 64 * 256 / 128
inline constexpr int kElement = 2;                       // bytes of a bf16
inline constexpr int kLineBytes = kDepth * kElement;     // one row of a tile in shared memory
inline constexpr int kXBytes = kRows * kLineBytes;       // x of a stage
inline constexpr int kBoxBytes = kBoxRows * kLineBytes;  // half of W of a stage
inline constexpr int kStageBytes = kXBytes + kBoxes * kBoxBytes;

// ---- Tile order ----------------------------------------------------------------------------

// Rows vary fastest, so that a tile of W is read from HBM once, for the blocks that run at the same time, while x stays
// in the L2. The L2 holds only part of a long x, so rows are cut into bands of kBandTiles tiles (2048 rows, 17 MB at
// hidden size 4096), and W is read once per band.
inline constexpr int kBandTiles = 16;

// A unit is `cluster` blocks (1 or 2) on adjacent row tiles and the same tile of W.
struct TileOrder {
  int row_tiles, column_tiles, cluster;
};

struct Tile {
  int row, column;  // in tiles; `row` is row_tiles if the unit is not full
};

POP_HD int row_units(const TileOrder& order) { return ceil_div(order.row_tiles, order.cluster); }

POP_HD int unit_count(const TileOrder& order) { return row_units(order) * order.column_tiles; }

POP_HD Tile tile_of(const TileOrder& order, int unit, int rank) {
  const int band_units = kBandTiles / order.cluster;
  const int band = unit / (band_units * order.column_tiles);
  const int within = unit - band * band_units * order.column_tiles;
  const int left = row_units(order) - band * band_units;
  const int height = left < band_units ? left : band_units;
  return {(band * band_units + within % height) * order.cluster + rank, within / height};
}

// Two blocks in a cluster read each tile of W from the L2 half as often. If row_tiles is odd, this costs an empty tile:
// less than 6 % from this many tiles on.
inline constexpr int kTilesForOddCluster = 17;

POP_HD int cluster_for(int row_tiles) { return row_tiles % 2 == 0 || row_tiles >= kTilesForOddCluster ? 2 : 1; }

// ---- The last round ------------------------------------------------------------------------

// Clusters take units in turn, so the last round may leave most of them idle. Where half of them suffice for it, each
// of its tiles can go to a cluster of its own, whose two blocks multiply half of hidden_size each: the round takes half
// as long. 512 rows of ten Llama-3.1-8B layers are 160 units; of 66 clusters, 28 work in the third round.

// What a cluster does in one turn: steps [begin, end) of kDepth elements of hidden_size, of one tile per block.
struct Turn {
  Tile tile;
  int begin, end;
  bool is_half;  // both blocks have the same tile, and their sums are to be added
};

// The number of units whose tiles are computed whole; the tiles of the others are halved.
POP_HD int whole_units(const TileOrder& order, int steps, int clusters) {
  const int units = unit_count(order), last_round = units % clusters;
  return order.cluster == 2 && steps >= 2 && 2 * last_round <= clusters ? units - last_round : units;
}

POP_HD int turn_count(const TileOrder& order, int whole) { return whole + 2 * (unit_count(order) - whole); }

POP_HD Turn turn_of(const TileOrder& order, int whole, int steps, int turn, int rank) {
  if (turn < whole) return {tile_of(order, turn, rank), 0, steps, false};
  const int half = turn - whole, middle = (steps + 1) / 2;
  const Tile tile = tile_of(order, whole + half / 2, half % 2);
  return {tile, rank == 0 ? 0 : middle, rank == 0 ? middle : steps, true};
}

// ---- Columns -------------------------------------------------------------------------------

// A head of the stacked projection [K of layer 0, V of layer 0, K of layer 1, ...].
struct StackedHead {
  int layer;
  bool is_value;
  int head;
};

POP_HD StackedHead stacked_head(int index, int kv_heads) {
  const int layer = index / (2 * kv_heads);
  const int within = index - layer * 2 * kv_heads;
  const bool is_value = within >= kv_heads;
  return {layer, is_value, is_value ? within - kv_heads : within};
}

// ---- Accumulators --------------------------------------------------------------------------

// wgmma gives thread t of a warpgroup the rows accumulator_row(t, 0) and accumulator_row(t, 1) of its 64, and of each
// group of 8 columns the two from 2 * (t % 4) on. The four threads with the same rows are a quad.
POP_HD int accumulator_row(int thread, int half) { return thread / 32 * 16 + thread % 32 / 4 + 8 * half; }

POP_HD constexpr int accumulator_index(int column_group, int half, int odd) {
  return 4 * column_group + 2 * half + odd;
}

POP_HD int accumulator_column(int thread, int column_group, int odd) {
  return 8 * column_group + 2 * (thread % 4) + odd;
}

// ---- Shared memory -------------------------------------------------------------------------

// The offset in bytes of 16-byte chunk `chunk` (of 8) of row `row`, in a tile that TMA wrote with a 128-byte swizzle:
// bits 4-6 of the address are XORed with bits 7-9. The tile begins at a multiple of 1024.
POP_HD int swizzled_chunk(int row, int chunk) { return row * kLineBytes + ((chunk ^ (row % 8)) * 16); }

// wgmma's description of such a tile, K-major (PTX ISA, "Matrix Descriptor Format"): bits 0-13
// address, 16-29 leading offset (unused with a swizzle), 32-45 distance of groups of 8 rows, all
// in units of 16 bytes; 62-63 = 1: 128-byte swizzle. The next 16 elements of each row: + 32 bytes.
POP_HD uint64_t tile_descriptor(uint32_t shared_address) {
  constexpr uint64_t kEightRows = 8 * kLineBytes / 16;
  return (shared_address >> 4 & 0x3fffu) | uint64_t{1} << 16 | kEightRows << 32 | uint64_t{1} << 62;
}

// ---- The ring of stages --------------------------------------------------------------------

// Step i of a block (counted over all of its tiles) uses stage i % kStages for the (i / kStages)th time. Its full
// barrier then completes phase `parity`. A producer waits for the previous phase of the empty barrier, parity ^ 1,
// which is complete on a new barrier.
struct RingStep {
  int stage;
  uint32_t parity;
};

POP_HD RingStep ring_step(uint32_t step) { return {static_cast<int>(step % kStages), step / kStages % 2}; }

}  // namespace pop::cuda::kv_tile
