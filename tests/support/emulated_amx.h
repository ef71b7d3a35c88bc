// For tests only: the intrinsics of AMX-TILE, AMX-INT8 and AMX-BF16 that cpp/cpu uses, in plain C++. Like the
// processor, they end the process on a tile that is not configured and on operands whose shapes do not match. A tile's
// number is a constant here, too.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace emulated_amx {
namespace {  // each object file has its own: the linker must not mix those of instruction sets

struct Tile {
  int rows, row_bytes;  // zero: not configured
  alignas(64) uint8_t bytes[16][64];
};

struct Configuration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

inline thread_local Tile tiles[8];

inline void check(bool valid) {
  if (!valid) std::abort();
}

inline void release() {
  for (Tile& tile : tiles) tile = {};
}

inline void load_configuration(const void* from) {
  Configuration given;
  static_assert(sizeof(given) == 64);
  __builtin_memcpy(&given, from, sizeof(given));
  check(given.palette == 1 && given.start_row == 0);
  for (const uint8_t byte : given.reserved) check(byte == 0);
  release();
  for (int i = 0; i < 16; ++i) {
    check(i < 8 ? given.rows[i] <= 16 && given.row_bytes[i] <= 64 : given.rows[i] == 0 && given.row_bytes[i] == 0);
    check((given.rows[i] == 0) == (given.row_bytes[i] == 0));
    if (i < 8) tiles[i].rows = given.rows[i], tiles[i].row_bytes = given.row_bytes[i];
  }
}

template <int Number>
Tile& configured() {
  static_assert(0 <= Number && Number < 8);
  check(tiles[Number].rows != 0);
  return tiles[Number];
}

template <int Number>
void zero() {
  __builtin_memset(configured<Number>().bytes, 0, sizeof(Tile::bytes));
}

template <int Number>
void load(const void* from, long stride) {
  Tile& tile = configured<Number>();
  zero<Number>();
  for (int row = 0; row < tile.rows; ++row) {
    __builtin_memcpy(tile.bytes[row], static_cast<const char*>(from) + row * stride, tile.row_bytes);
  }
}

template <int Number>
void store(void* to, long stride) {
  const Tile& tile = configured<Number>();
  for (int row = 0; row < tile.rows; ++row) {
    __builtin_memcpy(static_cast<char*>(to) + row * stride, tile.bytes[row], tile.row_bytes);
  }
}

inline void check_shapes(const Tile& sum, const Tile& a, const Tile& b) {
  check(sum.row_bytes % 4 == 0 && a.row_bytes % 4 == 0);
  check(sum.rows == a.rows && sum.row_bytes == b.row_bytes && a.row_bytes / 4 == b.rows);
}

// sum[row][lane] += a[row][4 group + i] * b[group][4 lane + i], all bytes signed, modulo 2^32.
template <int Sum, int A, int B>
void add_products() {
  static_assert(Sum != A && Sum != B && A != B);
  Tile& sum = configured<Sum>();
  const Tile &a = configured<A>(), &b = configured<B>();
  check_shapes(sum, a, b);
  for (int row = 0; row < sum.rows; ++row) {
    uint32_t sums[16];
    __builtin_memcpy(sums, sum.bytes[row], sizeof(sums));
    for (int group = 0; group < b.rows; ++group) {
      for (int i = 0; i < sum.row_bytes; ++i) {
        const auto x = static_cast<int8_t>(a.bytes[row][4 * group + i % 4]), y = static_cast<int8_t>(b.bytes[group][i]);
        sums[i / 4] += static_cast<uint32_t>(x * y);
      }
    }
    __builtin_memcpy(sum.bytes[row], sums, sizeof(sums));
  }
}

// sum[row][lane] += a[row][2 pair + i] * b[pair][2 lane + i], all bfloat16, in float32: the first elements of all
// pairs, the second ones, and then both together. Unlike the processor this rounds each product, and keeps denormals.
template <int Sum, int A, int B>
void add_bf16_products() {
  static_assert(Sum != A && Sum != B && A != B);
  Tile& sum = configured<Sum>();
  const Tile &a = configured<A>(), &b = configured<B>();
  check_shapes(sum, a, b);
  const auto element = [](const uint8_t* row, int index) {
    uint16_t bits;
    __builtin_memcpy(&bits, row + 2 * index, sizeof(bits));
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    __builtin_memcpy(&value, &wide, sizeof(value));
    return value;
  };
  for (int row = 0; row < sum.rows; ++row) {
    float sums[16];
    __builtin_memcpy(sums, sum.bytes[row], sizeof(sums));
    for (int lane = 0; lane < sum.row_bytes / 4; ++lane) {
      float parts[2] = {};
      for (int pair = 0; pair < b.rows; ++pair) {
        for (int i = 0; i < 2; ++i) {
          parts[i] += element(a.bytes[row], 2 * pair + i) * element(b.bytes[pair], 2 * lane + i);
        }
      }
      sums[lane] += parts[0] + parts[1];
    }
    __builtin_memcpy(sum.bytes[row], sums, sizeof(sums));
  }
}

}  // namespace
}  // namespace emulated_amx

#define _tile_loadconfig emulated_amx::load_configuration
#define _tile_release emulated_amx::release
#define _tile_zero(tile) emulated_amx::zero<tile>()
#define _tile_loadd(tile, from, stride) emulated_amx::load<tile>(from, stride)
#define _tile_stored(tile, to, stride) emulated_amx::store<tile>(to, stride)
#define _tile_dpbssd(sum, a, b) emulated_amx::add_products<sum, a, b>()
#define _tile_dpbf16ps(sum, a, b) emulated_amx::add_bf16_products<sum, a, b>()
