// Residual add and RMSNorm:
//   x += delta_scale * (delta + delta_bias);  rstd = 1 / sqrt(mean(x^2) + eps);  out = x * rstd * (weight + offset)
// With delta_norm, delta + delta_bias goes through an RMSNorm of its own before it is scaled and added.
// The sum is rounded to the dtype and stored before its norm is taken, as the stock model does.
//
// Floor: a row of x read, a row of out written; with delta one more row each way. A block takes one row and keeps it in
// registers between the sum and the scaling. The cut of a row depends on its width alone, so the bits of a row do not
// depend on the rest of the call.
#include <algorithm>

#include "cuda/elements.cuh"
#include "cuda/launch.cuh"

namespace pop::cuda {

namespace {

constexpr int kMaxThreads = 512;

// The row of a block in each operand; null if the operand is null.
template <class T>
struct Row {
  T* x;
  const T* delta;
  const T* bias;
  const T* norm;
  const T* weight;
  T* out;

  __device__ __forceinline__ explicit Row(const RmsNormParams& p)
      : x(static_cast<T*>(p.x) + blockIdx.x * p.x_stride),
        delta(p.delta == nullptr ? nullptr : static_cast<const T*>(p.delta) + blockIdx.x * p.delta_stride),
        bias(static_cast<const T*>(p.delta_bias)),
        norm(static_cast<const T*>(p.delta_norm)),
        weight(p.out == nullptr ? nullptr : static_cast<const T*>(p.weight)),
        out(p.out == nullptr ? nullptr : static_cast<T*>(p.out) + blockIdx.x * p.out_stride) {}
};

template <int count>
__device__ __forceinline__ float squares(const float (&x)[count]) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < count; ++e) sum += x[e] * x[e];
  return sum;
}

// delta += bias[i...], if bias is not null.
template <class T, int count>
__device__ __forceinline__ void add_bias(float (&delta)[count], const T* bias, int64_t i) {
  if (bias == nullptr) return;
  float values[count];
  load(bias + i, values);
#pragma unroll
  for (int e = 0; e < count; ++e) delta[e] += values[e];
}

// delta *= rstd (norm[i...] + offset)
template <class T, int count>
__device__ __forceinline__ void normalise(float (&delta)[count], float rstd, const T* norm, float offset, int64_t i) {
  float values[count];
  load(norm + i, values);
#pragma unroll
  for (int e = 0; e < count; ++e) delta[e] *= rstd * (values[e] + offset);
}

// A row of up to `packs` packs of 16 bytes per thread. Every load, of the weight too, is issued before the first result
// is used.
template <class T, int packs>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_kernel(const RmsNormParams p) {
  __shared__ float partial[kWarp], partial_delta[kWarp];
  wait_for_kernels_in_front();
  let_kernel_behind_start();
  const Row<T> row(p);
  const int width = static_cast<int>(p.width);
  const int first = threadIdx.x * kPack<T>, step = blockDim.x * kPack<T>;
  Pack x[packs] = {}, delta[packs] = {}, weight[packs] = {};
#pragma unroll
  for (int j = 0; j < packs; ++j) {
    const int i = first + j * step;
    if (i >= width) continue;
    x[j] = load_pack(row.x + i);
    if (row.delta != nullptr) delta[j] = load_pack(row.delta + i);
    if (row.weight != nullptr) weight[j] = load_pack(row.weight + i);
  }
  float delta_rstd = 0.0f;
  if (row.norm != nullptr) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < packs; ++j) {
      const int i = first + j * step;
      if (i >= width) continue;
      float addend[kPack<T>];
      unpack<T>(delta[j], addend);
      add_bias(addend, row.bias, i);
      sum += squares(addend);
    }
    delta_rstd = rms_scale(block_sum(sum, partial_delta), p.width, p.eps);
  }
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < packs; ++j) {
    const int i = first + j * step;
    float value[kPack<T>];
    unpack<T>(x[j], value);
    if (row.delta != nullptr && i < width) {
      float addend[kPack<T>];
      unpack<T>(delta[j], addend);
      add_bias(addend, row.bias, i);
      if (row.norm != nullptr) normalise(addend, delta_rstd, row.norm, p.weight_offset, i);
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e) value[e] += p.delta_scale * addend[e];
      x[j] = packed<T>(value);
      store_pack(row.x + i, x[j]);
      unpack<T>(x[j], value);
    }
    sum += squares(value);
  }
  const float rstd = rms_scale(block_sum(sum, partial), p.width, p.eps);
  if (threadIdx.x == 0 && p.rstd != nullptr) p.rstd[blockIdx.x] = rstd;
  if (row.out == nullptr) return;
#pragma unroll
  for (int j = 0; j < packs; ++j) {
    const int i = first + j * step;
    if (i >= width) continue;
    float value[kPack<T>], gamma[kPack<T>];
    unpack<T>(x[j], value);
    unpack<T>(weight[j], gamma);
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) {
      value[e] = row.weight == nullptr ? value[e] * rstd : value[e] * rstd * (gamma[e] + p.weight_offset);
    }
    store_pack(row.out + i, packed<T>(value));
  }
}

// A row of any width, `count` elements at a time. x is read again for the scaling, by the thread that stored it.
template <class T, int count>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_loop_kernel(const RmsNormParams p) {
  __shared__ float partial[kWarp], partial_delta[kWarp];
  wait_for_kernels_in_front();
  let_kernel_behind_start();
  const Row<T> row(p);
  const int64_t first = threadIdx.x * count, step = static_cast<int64_t>(blockDim.x) * count;
  float delta_rstd = 0.0f;
  if (row.norm != nullptr) {
    float sum = 0.0f;
    for (int64_t i = first; i < p.width; i += step) {
      float addend[count];
      load(row.delta + i, addend);
      add_bias(addend, row.bias, i);
      sum += squares(addend);
    }
    delta_rstd = rms_scale(block_sum(sum, partial_delta), p.width, p.eps);
  }
  float sum = 0.0f;
  for (int64_t i = first; i < p.width; i += step) {
    float value[count];
    load(row.x + i, value);
    if (row.delta != nullptr) {
      float addend[count];
      load(row.delta + i, addend);
      add_bias(addend, row.bias, i);
      if (row.norm != nullptr) normalise(addend, delta_rstd, row.norm, p.weight_offset, i);
#pragma unroll
      for (int e = 0; e < count; ++e) value[e] += p.delta_scale * addend[e];
      store(row.x + i, value);
      load(row.x + i, value);  // as rounded
    }
    sum += squares(value);
  }
  const float rstd = rms_scale(block_sum(sum, partial), p.width, p.eps);
  if (threadIdx.x == 0 && p.rstd != nullptr) p.rstd[blockIdx.x] = rstd;
  if (row.out == nullptr) return;
  for (int64_t i = first; i < p.width; i += step) {
    float value[count], gamma[count];
    load(row.x + i, value);
    if (row.weight != nullptr) load(row.weight + i, gamma);
#pragma unroll
    for (int e = 0; e < count; ++e) {
      value[e] = row.weight == nullptr ? value[e] * rstd : value[e] * rstd * (gamma[e] + p.weight_offset);
    }
    store(row.out + i, value);
  }
}

// The number of threads for a row of `pieces`, up to `a_thread` pieces each.
unsigned threads_for(int64_t pieces, int64_t a_thread) {
  return static_cast<unsigned>(std::min<int64_t>(ceil_div(ceil_div(pieces, a_thread), kWarp) * kWarp, kMaxThreads));
}

bool in_packs(const RmsNormParams& p, int64_t element) {
  const auto rows_aligned = [&](const void* base, int64_t stride) {
    return base == nullptr || is_aligned(base, stride, element);
  };
  return p.width * element % 16 == 0 && rows_aligned(p.x, p.x_stride) && rows_aligned(p.delta, p.delta_stride) &&
         rows_aligned(p.out, p.out_stride) && rows_aligned(p.delta_bias, 0) && rows_aligned(p.delta_norm, 0) &&
         rows_aligned(p.weight, 0);
}

template <class T>
void launch_rms_norm_of(const RmsNormParams& p, Stream stream) {
  const dim3 grid(static_cast<unsigned>(p.rows));
  const auto run = [&](auto kernel, int64_t pieces, int64_t a_thread) {
    launch_early("rms_norm", kernel, grid, dim3(threads_for(pieces, a_thread)), 0, stream, p);
  };
  if (!in_packs(p, sizeof(T))) return run(rms_norm_loop_kernel<T, 1>, p.width, 1);
  const int64_t packs = p.width / kPack<T>;
  if (packs <= 256) return run(rms_norm_kernel<T, 1>, packs, 1);
  if (packs <= 512) return run(rms_norm_kernel<T, 2>, packs, 2);
  if (packs <= 4 * kMaxThreads) return run(rms_norm_kernel<T, 4>, packs, 4);
  run(rms_norm_loop_kernel<T, kPack<T>>, packs, 1);
}

}  // namespace

void launch_rms_norm(const RmsNormParams& p, Stream stream) {
  if (p.rows == 0 || p.width == 0) return;
  with_element(p.dtype, [&](auto element) { launch_rms_norm_of<decltype(element)>(p, stream); });
}

}  // namespace pop::cuda
