// out = a . w^T for 2 to 64 rows of 16-bit elements on the tensor cores; one launch takes up to three matrices w that
// share `a`. The same job as skinny_gemm.cu, whose arithmetic limits it to about 8 rows.
//
// Floor: the bytes of w, read once from HBM; a Llama-3.1-8B layer (436 MB in bf16) takes 101 us at the 4.3 TB/s of an
// H200, whatever the number of rows. Expected limit: the L2, through which w and `a` pass. Each block reads all of `a`
// from it. With 132 SMs a block has 32 columns of q, k, v, o and down, and 128 of gate and up (split_of), so a layer
// reads 8.1 MB for each row: 65 MB at 8 rows, 130 at 16, 260 at 32, 520 at 64. An L2 of 6 TB/s, an assumption, takes
// 84, 94, 116 and 159 us for that and w: less than the floor up to 16 rows, 1.1 times the floor at 32, 1.6 times at 64.
// If the warps of a block do not find each other's rows in the L1, gate and up read as much as with 32 columns: 109 us
// at 16 rows, 145 at 32, 218 (2.2 times) at 64. At 64 rows the products take about half of what mma.sync reaches on
// Hopper.
//
// w is the first operand of the product, so its rows fill the height of 16 and the rows of `a` the width of 8. A warp
// computes 32 columns and all rows. Which element of a row is called k does not matter as long as both operands agree:
// lane 4 g + q reads 16 bytes from 8 q on of rows g of w and of `a`, and its words serve two products of depth 16. So
// nothing passes through shared memory. A step is 64 elements along k: w of the next step, 4 KB per warp, loads during
// the products of this one. A multiprocessor has 8 warps, and 16 up to 16 rows: 32 and 64 KB in flight, where 4.3
// TB/s times 800 ns of latency need 26 KB.
//
// The warps of a block share columns if there are too few to fill the GPU: they take the steps in turn and add their
// sums in shared memory, in their order. This choice depends on n, k and the device alone, so the bits of a row do not
// depend on the other rows.
#include <algorithm>

#include "cuda/elements.cuh"
#include "cuda/skinny_products.cuh"
#if defined(POP_CUDA_SHIM)
#include "mma_emulated.h"
#else
#include "cuda/mma.cuh"
#endif

namespace pop::cuda {

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kHeight = 16, kWidth = 8;       // of a product: columns of out, rows of out
constexpr int kHeights = 2;                   // per warp
constexpr int kColumns = kHeights * kHeight;  // per warp
constexpr int kPieces = 2;                    // 16 bytes of each row that a lane loads per step
constexpr int kPieceDepth = 32;               // elements along k that the four lanes of a row load at once
constexpr int kStep = kPieces * kPieceDepth;
constexpr int64_t kWarpsPerSm = 6;     // fewer: warps share columns
constexpr int64_t kShortPart = 256;    // the fewest elements along k that a warp should have
constexpr int kWidthsAtOnce = 4;       // whose sums are added at a time: 32 KB of shared memory
constexpr int kValues = kHeights * 4;  // sums of a lane per width

// Blocks per SM: 2 leave 128 registers per thread.
constexpr int blocks_an_sm(int widths) { return widths >= 4 ? 1 : 2; }

// ---- Kernel --------------------------------------------------------------------------------

// What a lane has of a step of w: rows g, g + 8, g + 16 and g + 24 of the warp's 32.
template <class T>
struct Weights {
  Operand<T, kPack<T>> row[2 * kHeights][kPieces];
};

// Sums of a lane: [height][4] of each width, over the steps of its warp.
template <class T, int kWidths>
__device__ __forceinline__ void multiply(const SkinnyProduct& p, int64_t column, int part, int lane,
                                         float (&sums)[kWidths][kHeights][4]) {
  const int g = lane / 4, q = lane % 4;
  const T* w[2 * kHeights];
#pragma unroll
  for (int i = 0; i < 2 * kHeights; ++i) {
    // Columns beyond the last one repeat it.
    w[i] = static_cast<const T*>(p.w) + (column + 8 * i + g < p.n ? column + 8 * i + g : p.n - 1) * p.w_stride;
  }
  Weights<T> ahead;
  // Elements beyond k are zeros, like those of `a`.
  const auto load_ahead = [&](int k) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int at = k + piece * kPieceDepth + q * kPack<T>;
#pragma unroll
      for (int i = 0; i < 2 * kHeights; ++i) {
        ahead.row[i][piece] = {};
        if (at < p.k) ahead.row[i][piece].load_once(w[i] + at);
      }
    }
  };
  const int step = p.split * kStep;
  int k = part * kStep;
  // No kernel writes w, so its loads need no wait.
  // check_sass: skinny_mma_kernel loads 8 weights early
  if (k < p.k) load_ahead(k);
  wait_for_kernels_in_front();
  let_kernel_behind_start();
  const T* a = static_cast<const T*>(p.a) + g * p.a_stride;
#pragma unroll 1
  for (; k < p.k; k += step) {
    const Weights<T> here = ahead;
    if (k + step < p.k) load_ahead(k + step);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int at = k + piece * kPieceDepth + q * kPack<T>;
      Operand<T, kPack<T>> rows[kWidths];
#pragma unroll
      for (int width = 0; width < kWidths; ++width) {
        rows[width] = {};
        if ((at < p.k) & (width * kWidth + g < p.m)) rows[width].load(a + width * kWidth * p.a_stride + at);
      }
#pragma unroll
      for (int width = 0; width < kWidths; ++width) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // of the words: 16 elements along k
          const uint32_t b[2] = {rows[width].words.at[2 * half], rows[width].words.at[2 * half + 1]};
#pragma unroll
          for (int h = 0; h < kHeights; ++h) {
            const auto& low = here.row[2 * h][piece].words.at;
            const auto& high = here.row[2 * h + 1][piece].words.at;
            const uint32_t w_words[4] = {low[2 * half], high[2 * half], low[2 * half + 1], high[2 * half + 1]};
            multiply_16x8x16<T>(sums[width][h], w_words, b);
          }
        }
      }
    }
  }
}

// kWidths * kWidth rows.
template <class T, int kWidths>
__global__ void __launch_bounds__(kThreads, blocks_an_sm(kWidths))
    skinny_mma_kernel(const __grid_constant__ SkinnyProductList list) {
  const int block = static_cast<int>(blockIdx.x);
  const SkinnyProduct& p = product_of(list, block);

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int part = warp % p.split, teams = kWarps / p.split;
  const int64_t first_column = static_cast<int64_t>(block - p.first_block) * teams * kColumns;

  float sums[kWidths][kHeights][4] = {};
  multiply<T, kWidths>(p, first_column + warp / p.split * kColumns, part, lane, sums);

  constexpr int kAtOnce = kWidths < kWidthsAtOnce ? kWidths : kWidthsAtOnce;
  __shared__ float partial[kWarps][kAtOnce * kValues][kWarp];
#pragma unroll
  for (int first = 0; first < kWidths; first += kAtOnce) {
    if (first > 0) __syncthreads();  // the sums before have been read
#pragma unroll
    for (int i = 0; i < kAtOnce * kValues; ++i) {
      partial[warp][i][lane] = sums[first + i / kValues][i / 4 % kHeights][i % 4];
    }
    __syncthreads();
    const int columns = teams * kColumns;
    for (int i = threadIdx.x; i < kAtOnce * kWidth * columns; i += kThreads) {
      const int r = i / columns, c = i % columns, within = c % kColumns;
      // Where the lane that has it keeps it: multiply_16x8x16's c.
      const int value = r / kWidth * kValues + within / kHeight * 4 + within % kHeight / 8 * 2 + r % 2;
      const int from = within % 8 * 4 + r % kWidth / 2;
      float total = 0.0f;
      for (int w = 0; w < p.split; ++w) total += partial[c / kColumns * p.split + w][value][from];
      const int row = first * kWidth + r;
      if (row < p.m && first_column + c < p.n) {
        static_cast<T*>(p.out)[row * p.out_stride + first_column + c] = from_float<T>(total);
      }
    }
  }
}

// ---- Launcher ------------------------------------------------------------------------------

template <class T, int kWidths>
void launch_widths(const GemmParams* products, int64_t count, Stream stream) {
  constexpr SkinnyCut kCut = {.rows = kWidths * kWidth,
                              .columns = kColumns,
                              .warps = kWarps,
                              .warps_per_sm = kWarpsPerSm,
                              .short_part = kShortPart};
  launch_skinny("skinny_mma", skinny_mma_kernel<T, kWidths>, kCut, products, count, stream);
}

template <class T>
void launch_rows(const GemmParams* products, int64_t count, int64_t rows, Stream stream) {
  if (rows <= 8) return launch_widths<T, 1>(products, count, stream);
  if (rows <= 16) return launch_widths<T, 2>(products, count, stream);
  if (rows <= 32) return launch_widths<T, 4>(products, count, stream);
  launch_widths<T, 8>(products, count, stream);
}

}  // namespace

bool skinny_mma_fits(const GemmParams& p) {
  constexpr int64_t kElement = 2;
  return p.dtype != DType::f32 && p.m <= kSkinnyRows && p.k % (16 / kElement) == 0 &&
         is_aligned(p.a, p.a_stride, kElement) && is_aligned(p.w, p.w_stride, kElement);
}

void launch_skinny_mma(const GemmParams* products, int64_t count, Stream stream) {
  if (count == 0) return;
  const int64_t rows = most_rows("skinny_mma", products, count);
  if (!std::all_of(products, products + count, skinny_mma_fits)) {
    throw std::runtime_error("pop: skinny_mma: expected aligned products of up to 64 rows in 16 bits");
  }
  if (products[0].dtype == DType::bf16) return launch_rows<BFloat16>(products, count, rows, stream);
  launch_rows<Float16>(products, count, rows, stream);
}

}  // namespace pop::cuda
