// out[m, n] = a[m, k] . w[n, k]^T for the few rows of a boundary step.
//
// Floor: the bytes of w, read once. A block of four warps takes four columns (rows of w); its warps share k, so
// that a product of 4096 columns puts 4096 warps on the machine, 31 an SM on 132 SMs with 2 KiB of w each in
// flight: 62 KiB an SM, where about 40 hide the latency of an H200's memory. Rows of a come from L1, for four
// columns at a time. Past eight rows w is read again, from L2, and the FMA units become the limit: m FMAs an
// element of w against 72 that memory feeds an SM's 128 a clock at eight rows.
//
// An element's sum takes k in the same order whatever m is: a row's result does not depend on its neighbours.
#include <algorithm>

#include "cuda/elements.cuh"
#include "cuda/launch.cuh"

namespace pop::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kColumns = 4;  // of a block
constexpr int kMaxProducts = 3;

struct Product {
  const void* w;
  void* out;
  int64_t w_stride, out_stride, n;
  int64_t end_block;  // the first block past its columns
};

struct Params {
  Product products[kMaxProducts];
  const void* a;
  int64_t a_stride, m, k;
};

// Sums of kRows rows by kColumns columns over this thread's share of k, kWidth elements at a time.
template <class T, int kRows, int kWidth>
__device__ __forceinline__ void accumulate(const T* a, int64_t a_stride, const T* const (&w)[kColumns], int64_t k,
                                           int rows, float (&sums)[kColumns][kRows]) {
#pragma unroll 2
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * kWidth; i < k; i += kThreads * kWidth) {
    float weights[kColumns][kWidth];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) load<kWidth>(w[c] + i, weights[c]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      float values[kWidth];
      load<kWidth>(a + r * a_stride + i, values);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) sums[c][r] += values[e] * weights[c][e];
      }
    }
  }
}

template <class T, int kRows, int kWidth>
__global__ void __launch_bounds__(kThreads) skinny_gemm_kernel(const Params p) {
  __shared__ float partial[kWarps][kColumns * kRows];
  int which = 0;
  while (static_cast<int64_t>(blockIdx.x) >= p.products[which].end_block) ++which;
  const Product& product = p.products[which];
  const int64_t first_block = which == 0 ? 0 : p.products[which - 1].end_block;
  const int64_t column = (blockIdx.x - first_block) * kColumns;
  const T* w[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    // Past the last column the last one is read again, and not stored.
    const int64_t row = column + c < product.n ? column + c : product.n - 1;
    w[c] = static_cast<const T*>(product.w) + row * product.w_stride;
  }

  for (int64_t row = 0; row < p.m; row += kRows) {
    const int rows = p.m - row < kRows ? static_cast<int>(p.m - row) : kRows;
    float sums[kColumns][kRows] = {};
    accumulate<T, kRows, kWidth>(static_cast<const T*>(p.a) + row * p.a_stride, p.a_stride, w, p.k, rows, sums);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float sum = warp_sum(sums[c][r]);
        if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp][c * kRows + r] = sum;
      }
    }
    __syncthreads();
    const int c = static_cast<int>(threadIdx.x) / kRows, r = static_cast<int>(threadIdx.x) % kRows;
    if (c < kColumns && r < rows && column + c < product.n) {
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp][c * kRows + r];
      static_cast<T*>(product.out)[(row + r) * product.out_stride + column + c] = from_float<T>(sum);
    }
    __syncthreads();  // before the next rows' sums are put there
  }
}

template <class T, int kWidth>
void launch_for_rows(const Params& p, int64_t blocks, Stream stream) {
  const auto run = [&](auto kernel) {
    launch("skinny_gemm", kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, p);
  };
  if (p.m == 1) {
    run(skinny_gemm_kernel<T, 1, kWidth>);
  } else if (p.m == 2) {
    run(skinny_gemm_kernel<T, 2, kWidth>);
  } else if (p.m <= 4) {
    run(skinny_gemm_kernel<T, 4, kWidth>);
  } else {
    run(skinny_gemm_kernel<T, 8, kWidth>);
  }
}

}  // namespace

void launch_skinny_gemm(const GemmParams* products, int64_t count, Stream stream) {
  if (count == 0 || products[0].m == 0) return;
  const GemmParams& first = products[0];
  Params p{};
  p.a = first.a;
  p.a_stride = first.a_stride;
  p.m = first.m;
  p.k = first.k;
  const int64_t element = element_size(first.dtype);
  bool packed = first.k * element % 16 == 0 && is_aligned(first.a, first.a_stride, element);
  int64_t blocks = 0;
  for (int64_t i = 0; i < kMaxProducts; ++i) {
    if (i < count) {
      blocks += ceil_div(products[i].n, kColumns);
      packed = packed && is_aligned(products[i].w, products[i].w_stride, element);
      p.products[i] = {products[i].w, products[i].out, products[i].w_stride, products[i].out_stride, products[i].n, 0};
    }
    p.products[i].end_block = blocks;
  }
  if (blocks == 0) return;
  with_element(first.dtype, [&](auto element_type) {
    using T = decltype(element_type);
    if (packed) {
      launch_for_rows<T, kPack<T>>(p, blocks, stream);
    } else {
      launch_for_rows<T, 1>(p, blocks, stream);
    }
  });
}

}  // namespace pop::cuda
