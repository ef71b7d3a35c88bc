// out = a . w^T for the few rows of a boundary step; one launch takes up to three matrices w that share `a`.
//
// Floor: the bytes of w, read once from HBM; a Llama-3.1-8B layer (436 MB in bf16) takes 101 us at the
// 4.3 TB/s of an H200. 32 elements of w cost 60 instructions for addresses and conversions, and 45 more for each row of
// `a`: 13 per element at 8 rows, which is 90 % of what 132 SMs issue at 1.9 GHz while 16-bit weights arrive at that
// rate. The crossover is therefore at about 8 rows. At 16 rows this kernel reaches 2.4 TB/s at best, and a library GEMM
// on the tensor cores is expected to be faster. (Before sm_100 there is no packed fp32 FMA, and products of 16-bit
// pairs would not accumulate in fp32.)
//
// A warp computes kColumns columns of a tile of rows. Its lanes walk along k, 16 bytes of each column per step, and
// load one step ahead: 64 bytes in flight per thread. n = 4096 gives 1024 blocks of 128 threads; an SM holds 8 of them
// for one row (64 KB in flight), 5 for up to 4 rows (40 KB) and 4 for up to 8 (32 KB), where 4.3 TB/s times 800 ns of
// latency need 26 KB. w bypasses the L1 cache, where `a` stays for all warps of the SM. Tiles of rows with the same
// columns are adjacent in the grid: they run together, and read w from HBM once, else from the L2.
//
// If there are too few columns to fill the GPU, up to kWarps warps of a block share them: they take the steps in turn
// and add their sums in shared memory. This choice depends on n, k and the device alone, and every element is summed in
// one order whatever the tile: the bits of a row do not depend on the other rows.
#include <algorithm>

#include "cuda/elements.cuh"
#include "cuda/skinny_products.cuh"

namespace pop::cuda {

namespace {

constexpr int kColumns = 4;  // per warp
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int64_t kManyWarps = 23;   // per SM: no need to share columns
constexpr int64_t kShortPart = 512;  // the fewest elements along k that a warp should have

// Blocks per SM: 4 leave 128 registers per thread. For 8.6 and 8.9, nvcc needs more than 64 for one row of float16.
constexpr int blocks_an_sm(int rows) {
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890)
  if (rows == 1) return 7;
#endif
  return rows == 1 ? 8 : rows == 4 ? 5 : 4;
}

// ---- Kernel --------------------------------------------------------------------------------

// Sums of one lane: rows and columns of the tile, over the steps of this lane.
template <class T, int kRows, int kCount>
__device__ __forceinline__ void multiply(const SkinnyProduct& p, int row, int64_t column, int k, int step,
                                         float (&sums)[kRows * kColumns]) {
  const T* a = static_cast<const T*>(p.a) + row * p.a_stride + k;
  const int rows = p.m - row, end = p.k;
  const int64_t a_stride = p.a_stride;
  const T* w[kColumns];  // the next step
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    // Columns beyond the last one repeat it.
    w[c] = static_cast<const T*>(p.w) + (column + c < p.n ? column + c : p.n - 1) * p.w_stride + k;
  }
  Operand<T, kCount> ahead[kColumns];
  const auto load_ahead = [&] {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      ahead[c].load_once(w[c]);
      w[c] += step;
    }
  };
  // No kernel writes w, so its loads need no wait.
  // check_sass: skinny_gemm_kernel loads 4 weights early
  if (k < end) load_ahead();
  wait_for_kernels_in_front();
  let_kernel_behind_start();
#pragma unroll 1
  for (; k < end; k += step, a += step) {
    float w_here[kColumns][kCount];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) w_here[c][i] = ahead[c].value(i);
    }
    if (k + step < end) load_ahead();
    const T* a_here = a;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (kRows > 1 && r >= rows) break;
      Operand<T, kCount> a_row;
      a_row.load(a_here);
      a_here += a_stride;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float a_value = a_row.value(i);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          sums[r * kColumns + c] = fmaf(a_value, w_here[c][i], sums[r * kColumns + c]);
        }
      }
    }
  }
}

// Sums of kValues values over the lanes of a warp: lane l returns that of value l / (32 / kValues). Each round passes
// half of the remaining values to the other half of the lanes: a few more than kValues - 1 shuffles, where separate
// sums take 5 * kValues. The order of the additions is the same for any kValues.
template <int kValues>
__device__ __forceinline__ float sum_over_lanes(float (&values)[kValues]) {
  const unsigned lane = threadIdx.x % kWarp;
#pragma unroll
  for (int width = kWarp / 2, left = kValues; width > 0; width /= 2) {
    const bool upper = (lane & static_cast<unsigned>(width)) != 0;
    left /= 2;
#pragma unroll
    for (int i = 0; i < kValues / 2; ++i) {
      if (i >= left) break;
      const float keep = upper ? values[i + left] : values[i];
      const float give = upper ? values[i] : values[i + left];
      values[i] = keep + __shfl_xor_sync(kAllLanes, give, width);
    }
    if (left == 0) values[0] += __shfl_xor_sync(kAllLanes, values[0], width);
  }
  return values[0];
}

// kCount elements per access: kPack<T>, or 1 for operands that are not aligned.
template <class T, int kRows, int kCount>
__global__ void __launch_bounds__(kThreads, blocks_an_sm(kRows))
    skinny_gemm_kernel(const __grid_constant__ SkinnyProductList list) {
  constexpr int kValues = kRows * kColumns;
  const int block = static_cast<int>(blockIdx.x);
  const SkinnyProduct& p = product_of(list, block);

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int part = warp % p.split, teams = kWarps / p.split;
  const int row = (block - p.first_block) % p.row_tiles * kRows;
  const int64_t first_column = static_cast<int64_t>((block - p.first_block) / p.row_tiles) * teams * kColumns;

  float sums[kValues] = {};
  const int64_t column = first_column + warp / p.split * kColumns;
  multiply<T, kRows, kCount>(p, row, column, (part * kWarp + lane) * kCount, p.split * kWarp * kCount, sums);

  __shared__ float partial[kWarps][kValues];
  const float sum = sum_over_lanes(sums);
  if (lane % (kWarp / kValues) == 0) partial[warp][lane / (kWarp / kValues)] = sum;
  __syncthreads();
  for (int i = threadIdx.x; i < teams * kValues; i += kThreads) {
    const int team = i / kValues, r = i % kValues / kColumns, c = i % kColumns;
    float total = 0.0f;
    for (int w = 0; w < p.split; ++w) total += partial[team * p.split + w][i % kValues];
    const int64_t to = first_column + team * kColumns + c;
    if (row + r < p.m && to < p.n) {
      static_cast<T*>(p.out)[(row + r) * p.out_stride + to] = from_float<T>(total);
    }
  }
}

// ---- Launcher ------------------------------------------------------------------------------

template <class T, int kRows>
void launch_tiles(const GemmParams* products, int64_t count, bool is_wide, Stream stream) {
  constexpr SkinnyCut kCut = {
      .rows = kRows, .columns = kColumns, .warps = kWarps, .warps_per_sm = kManyWarps, .short_part = kShortPart};
  const auto kernel = is_wide ? skinny_gemm_kernel<T, kRows, kPack<T>> : skinny_gemm_kernel<T, kRows, 1>;
  launch_skinny("skinny_gemm", kernel, kCut, products, count, stream);
}

}  // namespace

void launch_skinny_gemm(const GemmParams* products, int64_t count, Stream stream) {
  if (count == 0) return;
  const int64_t rows = most_rows("skinny_gemm", products, count);
  with_element(products[0].dtype, [&](auto element) {
    using T = decltype(element);
    const bool is_wide = std::all_of(products, products + count, [](const GemmParams& p) {
      return p.k % kPack<T> == 0 && is_aligned(p.a, p.a_stride, sizeof(T)) && is_aligned(p.w, p.w_stride, sizeof(T));
    });
    if (rows <= 1) {
      launch_tiles<T, 1>(products, count, is_wide, stream);
    } else if (rows <= 4) {
      launch_tiles<T, 4>(products, count, is_wide, stream);
    } else {
      launch_tiles<T, 8>(products, count, is_wide, stream);
    }
  });
}

}  // namespace pop::cuda
