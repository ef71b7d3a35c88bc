#include <map>
#include <set>

#include "checks.h"
#include "cuda/kv_project_tile.h"

namespace {

using namespace pop::cuda::kv_tile;

void expect(bool ok, const char* what) {
  if (!ok) throw std::runtime_error(what);
}

// Every tile comes once. The blocks of a unit have adjacent row tiles and the same tile of W. Within a band of rows,
// the uses of a tile of W are consecutive.
void tile_order() {
  for (int row_tiles : {1, 2, 3, 4, 15, 16, 17, 31, 32, 33, 70}) {
    for (int column_tiles : {1, 2, 5, 80}) {
      for (int cluster : {1, 2}) {
        const TileOrder order = {row_tiles, column_tiles, cluster};
        std::map<std::pair<int, int>, int> seen;
        int sweeps = 0, last_column = -1, last_band = -1;
        for (int unit = 0; unit < unit_count(order); ++unit) {
          for (int rank = 0; rank < cluster; ++rank) {
            const Tile tile = tile_of(order, unit, rank);
            ++seen[{tile.row, tile.column}];
            expect(tile.column >= 0 && tile.column < column_tiles, "a tile outside W");
            expect(tile.row >= 0 && tile.row < row_units(order) * cluster, "a tile outside x");
            expect(tile.row % cluster == rank, "rows of a cluster are not neighbours");
            const int band = tile.row / kBandTiles;
            sweeps += tile.column != last_column || band != last_band;
            last_column = tile.column;
            last_band = band;
          }
        }
        for (int row = 0; row < row_tiles; ++row) {
          for (int column = 0; column < column_tiles; ++column) expect(seen[{row, column}] == 1, "a tile not once");
        }
        expect(sweeps == pop::ceil_div(row_tiles, kBandTiles) * column_tiles, "W is read more than once a band");
      }
    }
  }
}

// Every step of every tile comes once. Halves are the last turn of their cluster, both blocks of a cluster have one
// tile in it, and the steps of the blocks differ by one at most. The last round gets shorter, and only where it can.
void turns() {
  for (int row_tiles : {1, 2, 3, 4, 17, 32, 33}) {
    for (int column_tiles : {1, 2, 7, 80}) {
      for (int steps : {1, 2, 5, 64}) {
        for (int clusters : {1, 2, 3, 66}) {
          const TileOrder order = {row_tiles, column_tiles, cluster_for(row_tiles)};
          const int whole = whole_units(order, steps, clusters), count = turn_count(order, whole);
          std::map<std::pair<int, int>, int> seen;
          for (int i = 0; i < count; ++i) {
            Turn turn[2] = {turn_of(order, whole, steps, i, 0), turn_of(order, whole, steps, i, order.cluster - 1)};
            for (int rank = 0; rank < order.cluster; ++rank)
              seen[{turn[rank].tile.row, turn[rank].tile.column}] += turn[rank].end - turn[rank].begin;
            expect(turn[0].is_half == (i >= whole) && turn[0].begin == 0 && turn[1].end == steps, "not all steps");
            if (!turn[0].is_half) continue;
            expect(i + clusters >= count, "a cluster goes on after a half");
            expect(turn[0].tile.row == turn[1].tile.row && turn[0].tile.column == turn[1].tile.column, "two tiles");
            expect(turn[0].end == turn[1].begin && turn[1].begin < steps, "a step twice, or none");
            expect(turn[0].end - (turn[1].end - turn[1].begin) <= 1, "halves of unequal length");
          }
          for (int row = 0; row < row_units(order) * order.cluster; ++row) {
            for (int column = 0; column < column_tiles; ++column)
              expect(seen[{row, column}] == steps, "a tile not once");
          }
          const int idle = clusters - unit_count(order) % clusters;
          const bool helps =
              order.cluster == 2 && steps > 1 && unit_count(order) % clusters != 0 && 2 * idle >= clusters;
          expect((count > whole) == helps, "halves where they do not help, or none where they do");
        }
      }
    }
  }
  const TileOrder order = {4, 80, 2};  // 512 rows, ten layers of Llama-3.1-8B, 132 multiprocessors
  expect(whole_units(order, 64, 66) == 132 && turn_count(order, 132) == 132 + 56, "two rounds and a half");
}

// Every element of 64 x 256 has exactly one thread and register. Both channels of a RoPE pair are in one thread, and 16
// bytes of a row are in one quad.
void accumulators() {
  std::map<std::pair<int, int>, std::pair<int, int>> owner;  // (row, column): (thread, register)
  for (int thread = 0; thread < kGroupThreads; ++thread) {
    std::set<int> registers;
    for (int group = 0; group < kColumns / 8; ++group) {
      for (int half = 0; half < 2; ++half) {
        for (int odd = 0; odd < 2; ++odd) {
          const int index = accumulator_index(group, half, odd);
          const int row = accumulator_row(thread, half), column = accumulator_column(thread, group, odd);
          expect(index >= 0 && index < kAccumulators && registers.insert(index).second, "a register twice");
          expect(row >= 0 && row < kGroupRows && column >= 0 && column < kColumns, "outside the tile");
          expect(owner.insert({{row, column}, {thread, index}}).second, "an element twice");
        }
      }
    }
  }
  expect(owner.size() == size_t{kGroupRows} * kColumns, "an element without a thread");
  for (int head_dim : {64, 128, 256}) {
    for (int row = 0; row < kGroupRows; ++row) {
      for (int column = 0; column < kColumns; ++column) {
        const int channel = column % head_dim;
        if (channel >= head_dim / 2) continue;
        expect(owner[{row, column}].first == owner[{row, column + head_dim / 2}].first, "a RoPE pair in two threads");
        expect(owner[{row, column}].first / 4 == owner[{row, column / 8 * 8}].first / 4, "16 bytes in two quads");
      }
    }
  }
}

// The heads of a stacked projection, in order.
void heads() {
  for (int kv_heads : {1, 3, 8}) {
    int index = 0;
    for (int layer = 0; layer < 4; ++layer) {
      for (bool is_value : {false, true}) {
        for (int head = 0; head < kv_heads; ++head, ++index) {
          const StackedHead at = stacked_head(index, kv_heads);
          expect(at.layer == layer && at.is_value == is_value && at.head == head, "a head at the wrong place");
        }
      }
    }
  }
}

// Every chunk has its own place, which follows from the bits of its address. The eight lanes of one phase of a 16-byte
// load (two quads that read chunk 2 q + i of two rows) use eight different banks.
void shared_memory() {
  std::set<int> places;
  for (int row = 0; row < kRows; ++row) {
    for (int chunk = 0; chunk < 8; ++chunk) {
      const int plain = row * kLineBytes + chunk * 16;
      expect(swizzled_chunk(row, chunk) == (plain ^ (plain >> 7 & 7) << 4), "not the 128-byte swizzle");
      places.insert(swizzled_chunk(row, chunk));
    }
  }
  expect(places.size() == size_t{kRows} * 8 && *places.rbegin() == kXBytes - 16, "chunks overlap");
  for (int first = 0; first < kGroupThreads; first += 8) {
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 2; ++i) {
        std::set<int> banks;
        for (int t = first; t < first + 8; ++t)
          banks.insert(swizzled_chunk(accumulator_row(t, half), 2 * (t % 4) + i) % 128);
        expect(banks.size() == 8, "lanes meet in a bank");
      }
    }
  }
  expect(tile_descriptor(0x2c400) == 0x4000004000012c40u, "descriptor");
}

// Producer and consumer agree on every phase of the two barriers of a stage.
void ring() {
  int full[kStages] = {}, empty[kStages] = {};  // completed phases
  for (uint32_t step = 0; step < 10 * kStages + 3; ++step) {
    const RingStep at = ring_step(step);
    expect(at.stage == static_cast<int>(step % kStages), "stages take turns");
    // A wait for parity p returns if the number of completed phases has the other parity.
    expect(empty[at.stage] % 2 != static_cast<int>(at.parity ^ 1), "the producer waits for a free stage");
    expect(full[at.stage] % 2 == static_cast<int>(at.parity), "a consumer does not wait for the load");
    ++full[at.stage];
    expect(full[at.stage] % 2 != static_cast<int>(at.parity), "a consumer waits for a loaded stage");
    expect(empty[at.stage] % 2 == static_cast<int>(at.parity), "the producer would overwrite a stage in use");
    ++empty[at.stage];
  }
}

// An empty tile is never more than 6 % of the work.
void clusters() {
  for (int row_tiles = 1; row_tiles < 100; ++row_tiles) {
    const int cluster = cluster_for(row_tiles);
    const int units = row_units({row_tiles, 1, cluster});
    expect(units * cluster * 100 <= row_tiles * 106, "too many empty tiles");
  }
}

const checks::Check check_order("kv_project_tile order", tile_order);
const checks::Check check_turns("kv_project_tile turns", turns);
const checks::Check check_accumulators("kv_project_tile accumulators", accumulators);
const checks::Check check_heads("kv_project_tile heads", heads);
const checks::Check check_shared("kv_project_tile shared memory", shared_memory);
const checks::Check check_ring("kv_project_tile ring", ring);
const checks::Check check_clusters("kv_project_tile clusters", clusters);

}  // namespace
