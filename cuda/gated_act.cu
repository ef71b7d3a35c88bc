// The activation of the gated MLP: out = act(gate + gate_bias) * (up + up_bias), rounded once.
//
// Floor: gate and up read, out written: three times rows * width elements. The biases stay in L2.
#include <algorithm>

#include "cuda/elements.cuh"
#include "cuda/launch.cuh"

namespace pop::cuda {

namespace {

constexpr int kMaxThreads = 256;

template <Activation activation>
__device__ __forceinline__ float activate(const GatedActParams& p, float gate, float up) {
  if constexpr (activation == Activation::silu) return silu(gate) * up;
  if constexpr (activation == Activation::gelu_tanh) return gelu_tanh(gate) * up;
  if constexpr (activation == Activation::gelu) return gelu(gate) * up;
  if constexpr (activation == Activation::clamped_swiglu) {
    return clamped_swiglu(gate, up, p.swiglu_alpha, p.swiglu_limit);
  }
}

template <class T, int count>
__device__ __forceinline__ void add_bias(float (&value)[count], const void* bias, int64_t at) {
  if (bias == nullptr) return;
  float offset[count];
  load(static_cast<const T*>(bias) + at, offset);
#pragma unroll
  for (int e = 0; e < count; ++e) value[e] += offset[e];
}

// `count` adjacent elements per thread, 1 where channels are p.step apart; `blocks_a_row` consecutive blocks cover a
// row.
template <class T, int count, Activation activation>
__global__ void __launch_bounds__(kMaxThreads) gated_act_kernel(const GatedActParams p, unsigned blocks_a_row) {
  wait_for_kernels_in_front();
  let_kernel_behind_start();
  const int64_t row = blockIdx.x / blocks_a_row;
  const int64_t i = (static_cast<int64_t>(blockIdx.x % blocks_a_row) * blockDim.x + threadIdx.x) * count;
  if (i >= p.width) return;
  const int64_t at = i * p.step;
  float gate[count], up[count];
  load(static_cast<const T*>(p.gate) + row * p.gate_stride + at, gate);
  load(static_cast<const T*>(p.up) + row * p.up_stride + at, up);
  add_bias<T>(gate, p.gate_bias, at);
  add_bias<T>(up, p.up_bias, at);
#pragma unroll
  for (int e = 0; e < count; ++e) gate[e] = activate<activation>(p, gate[e], up[e]);
  store(static_cast<T*>(p.out) + row * p.out_stride + i, gate);
}

template <class T, int count>
void launch_gated_act_of(const GatedActParams& p, Stream stream) {
  const int64_t pieces = p.width / count;
  const int64_t blocks_a_row = ceil_div(pieces, kMaxThreads);
  const int64_t threads = ceil_div(ceil_div(pieces, blocks_a_row), kWarp) * kWarp;
  const auto run = [&](auto kernel) {
    launch_early("gated_act", kernel, dim3(static_cast<unsigned>(p.rows * blocks_a_row)),
                 dim3(static_cast<unsigned>(threads)), 0, stream, p, static_cast<unsigned>(blocks_a_row));
  };
  switch (p.activation) {
    case Activation::silu:
      return run(gated_act_kernel<T, count, Activation::silu>);
    case Activation::gelu_tanh:
      return run(gated_act_kernel<T, count, Activation::gelu_tanh>);
    case Activation::gelu:
      return run(gated_act_kernel<T, count, Activation::gelu>);
    case Activation::clamped_swiglu:
      return run(gated_act_kernel<T, count, Activation::clamped_swiglu>);
  }
}

}  // namespace

void launch_gated_act(const GatedActParams& p, Stream stream) {
  if (p.rows == 0 || p.width == 0) return;
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t size = sizeof(T);
    const bool in_packs = p.step == 1 && p.width * size % 16 == 0 && is_aligned(p.gate, p.gate_stride, size) &&
                          is_aligned(p.up, p.up_stride, size) && is_aligned(p.out, p.out_stride, size) &&
                          is_aligned(p.gate_bias, 0, size) && is_aligned(p.up_bias, 0, size);
    if (in_packs) return launch_gated_act_of<T, kPack<T>>(p, stream);
    launch_gated_act_of<T, 1>(p, stream);
  });
}

}  // namespace pop::cuda
