// The activation of the gated MLP: out = act(gate + gate_bias) * (up + up_bias), rounded once.
//
// Floor: gate and up read, out written: three times rows * width elements. The biases stay in L2.
#include <algorithm>

#include "cuda/elements.cuh"
#include "cuda/launch.cuh"

namespace pop::cuda {

namespace {

constexpr int kMaxThreads = 256;
constexpr int kPieces = 2;  // per thread: four loads of 16 bytes in flight

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

// kPieces pieces of `count` adjacent elements per thread, 1 where channels are p.step apart. Block (row, part): pieces
// of one part are blockDim.x apart, so that the accesses of a warp are adjacent. All loads are issued before the first
// use.
template <class T, int count, Activation activation>
__global__ void __launch_bounds__(kMaxThreads) gated_act_kernel(const GatedActParams p) {
  wait_for_kernels_in_front();
  let_kernel_behind_start();
  const int64_t row = blockIdx.x;
  const T* gate_row = static_cast<const T*>(p.gate) + row * p.gate_stride;
  const T* up_row = static_cast<const T*>(p.up) + row * p.up_stride;
  T* out_row = static_cast<T*>(p.out) + row * p.out_stride;
  const int64_t distance = static_cast<int64_t>(blockDim.x) * count;
  const int64_t first = kPieces * distance * blockIdx.y + threadIdx.x * count;
  Operand<T, count> gate_piece[kPieces], up_piece[kPieces];
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int64_t i = first + piece * distance;
    if (i >= p.width) continue;
    gate_piece[piece].load(gate_row + i * p.step);
    up_piece[piece].load(up_row + i * p.step);
  }
  float out[kPieces][count];
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int64_t i = first + piece * distance;
    if (i >= p.width) continue;
    float gate[count], up[count];
#pragma unroll
    for (int e = 0; e < count; ++e) {
      gate[e] = gate_piece[piece].value(e);
      up[e] = up_piece[piece].value(e);
    }
    add_bias<T>(gate, p.gate_bias, i * p.step);
    add_bias<T>(up, p.up_bias, i * p.step);
#pragma unroll
    for (int e = 0; e < count; ++e) out[piece][e] = activate<activation>(p, gate[e], up[e]);
  }
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int64_t i = first + piece * distance;
    if (i < p.width) store(out_row + i, out[piece]);
  }
}

template <class T, int count>
void launch_gated_act_of(const GatedActParams& p, Stream stream) {
  const int64_t pieces = ceil_div(p.width, count);
  const int64_t parts = ceil_div(pieces, kPieces * kMaxThreads);
  const int64_t threads = ceil_div(ceil_div(pieces, kPieces * parts), kWarp) * kWarp;
  // Rows are the first dimension of the grid, since the second one is limited to 65,535.
  const dim3 grid(static_cast<unsigned>(p.rows), static_cast<unsigned>(parts));
  const auto run = [&](auto kernel) {
    launch_early("gated_act", kernel, grid, dim3(static_cast<unsigned>(threads)), 0, stream, p);
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
