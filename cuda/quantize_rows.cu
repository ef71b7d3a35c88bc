// Rounds rows to 8-bit floats (e4m3) with one scale per row, as input of products with 8-bit weights.
//
// Floor: a row of x read, half of its bytes written. A block takes one row and reads it a second time, from the cache,
// to round it: rows of an MLP's intermediate size do not fit in registers.
#include <algorithm>

#if defined(__CUDACC__)
#include <cuda_fp8.h>
#endif

#include "cuda/elements.cuh"
#include "cuda/launch.cuh"

namespace pop::cuda {

namespace {

constexpr int kMaxThreads = 512;

// Four elements as four bytes.
__device__ __forceinline__ uint32_t e4m3_word(const float* value, float factor) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  const auto pair = [&](int i) -> uint32_t {
    return __nv_cvt_float2_to_fp8x2(make_float2(value[i] * factor, value[i + 1] * factor), __NV_SATFINITE, __NV_E4M3);
  };
  return pair(0) | pair(2) << 16;
#else
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) word |= e4m3_bits(value[i] * factor) << (8 * i);
  return word;
#endif
}

// `count` adjacent elements per thread and step.
template <class T, int count>
__global__ void __launch_bounds__(kMaxThreads) quantize_rows_kernel(const QuantizeRowsParams p) {
  __shared__ float partial[kWarp];
  wait_for_kernels_in_front();
  let_kernel_behind_start();
  const T* x = static_cast<const T*>(p.x) + blockIdx.x * p.x_stride;
  uint8_t* out = p.out + blockIdx.x * p.out_stride;
  const int64_t first = threadIdx.x * count, step = static_cast<int64_t>(blockDim.x) * count;
  float largest = 0.0f;
  for (int64_t i = first; i < p.width; i += step) {
    float value[count];
    load(x + i, value);
#pragma unroll
    for (int e = 0; e < count; ++e) largest = fmaxf(largest, fabsf(value[e]));
  }
  largest = block_max(largest, partial);
  if (threadIdx.x == 0) p.scale[blockIdx.x] = e4m3_scale(largest);
  const float factor = e4m3_factor(largest);
  for (int64_t i = first; i < p.width; i += step) {
    float value[count];
    load(x + i, value);
    if constexpr (count % 4 == 0) {
      Elements<uint32_t, count / 4> words;
#pragma unroll
      for (int w = 0; w < count / 4; ++w) words.at[w] = e4m3_word(value + 4 * w, factor);
      *reinterpret_cast<decltype(words)*>(out + i) = words;
    } else {
#pragma unroll
      for (int e = 0; e < count; ++e) out[i + e] = static_cast<uint8_t>(e4m3_bits(value[e] * factor));
    }
  }
}

template <class T, int count>
void launch_quantize_rows_of(const QuantizeRowsParams& p, Stream stream) {
  const int64_t pieces = ceil_div(p.width, count);
  const auto threads = static_cast<unsigned>(std::min<int64_t>(ceil_div(pieces, kWarp) * kWarp, kMaxThreads));
  launch_early("quantize_rows", quantize_rows_kernel<T, count>, dim3(static_cast<unsigned>(p.rows)), dim3(threads), 0,
               stream, p);
}

}  // namespace

void launch_quantize_rows(const QuantizeRowsParams& p, Stream stream) {
  if (p.rows == 0 || p.width == 0) return;
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t size = sizeof(T);
    const bool in_packs =
        p.width % kPack<T> == 0 && is_aligned(p.x, p.x_stride, size) && is_aligned(p.out, p.out_stride, 1, kPack<T>);
    if (in_packs) return launch_quantize_rows_of<T, kPack<T>>(p, stream);
    launch_quantize_rows_of<T, 1>(p, stream);
  });
}

}  // namespace pop::cuda
