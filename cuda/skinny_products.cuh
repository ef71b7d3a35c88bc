// What skinny_gemm.cu and skinny_mma.cu share: the products of a launch, how blocks and warps are divided among them,
// and the launch itself.
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"

namespace pop::cuda {

struct SkinnyProduct {
  const void* a;  // [m, k]
  const void* w;  // [n, k]
  void* out;      // [m, n]
  int64_t a_stride, w_stride, out_stride;
  int64_t n;
  int m, k;
  int row_tiles;
  int split;                   // warps of a block that share columns: a power of two
  int first_block, end_block;  // block first_block + i: tile of rows i % row_tiles, group of columns i / row_tiles
};

inline constexpr int kSkinnyProducts = 3;

struct SkinnyProductList {
  SkinnyProduct at[kSkinnyProducts];
};

// The product of a block.
__device__ __forceinline__ const SkinnyProduct& product_of(const SkinnyProductList& list, int block) {
  int which = 0;
  while (block >= list.at[which].end_block) ++which;
  return list.at[which];
}

// How a kernel cuts its products.
struct SkinnyCut {
  int rows;              // of a tile
  int columns;           // of a warp
  int warps;             // of a block
  int64_t warps_per_sm;  // fewer: warps share columns
  int64_t short_part;    // the fewest elements along k that a warp should have
};

// Depends on n, k and the device alone, so that the bits of a row do not depend on the other rows.
inline int split_of(const SkinnyCut& cut, int64_t n, int64_t k) {
  const int64_t wanted = cut.warps_per_sm * device_facts().sm_count;
  int split = 1;
  while (split < cut.warps && ceil_div(n, cut.columns) * split < wanted && k >= 2 * split * cut.short_part) split *= 2;
  return split;
}

// Launches one kernel for up to kSkinnyProducts products; `name` is for the error text.
template <class Kernel>
void launch_skinny(const char* name, Kernel kernel, const SkinnyCut& cut, const GemmParams* products, int64_t count,
                   Stream stream) {
  SkinnyProductList list{};
  int64_t blocks = 0;
  for (int64_t i = 0; i < kSkinnyProducts; ++i) {
    const GemmParams& p = products[std::min(i, count - 1)];
    const int64_t row_tiles = ceil_div(p.m, cut.rows);
    const int split = split_of(cut, p.n, p.k);
    const int64_t first_block = blocks;
    if (i < count) blocks += row_tiles * ceil_div(p.n, cut.warps / split * cut.columns);
    list.at[i] = {.a = p.a,
                  .w = p.w,
                  .out = p.out,
                  .a_stride = p.a_stride,
                  .w_stride = p.w_stride,
                  .out_stride = p.out_stride,
                  .n = p.n,
                  .m = static_cast<int>(p.m),
                  .k = static_cast<int>(p.k),
                  .row_tiles = static_cast<int>(row_tiles),
                  .split = split,
                  .first_block = static_cast<int>(first_block),
                  .end_block = static_cast<int>(blocks)};
  }
  if (blocks == 0) return;
  launch_early(name, kernel, dim3(static_cast<unsigned>(blocks)), dim3(cut.warps * kWarp), 0, stream, list);
}

// The largest number of rows of the products of a launch.
inline int64_t most_rows(const char* name, const GemmParams* products, int64_t count) {
  if (count > kSkinnyProducts) throw std::runtime_error(std::string("pop: ") + name + ": expected at most 3 products");
  int64_t rows = 0;
  for (int64_t i = 0; i < count; ++i) rows = std::max(rows, products[i].m);
  return rows;
}

}  // namespace pop::cuda
