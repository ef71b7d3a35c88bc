// Launches kernels into a stream, and sums over threads. Under the CPU shim (tests/gpu/cuda_shim) a launch runs on the
// host.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/math.h"
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace pop::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// True if `base` and every row after it are aligned for accesses of `bytes`; `stride` is in elements.
inline bool is_aligned(const void* base, int64_t stride, int64_t element_bytes, int64_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(base) % bytes == 0 && stride * element_bytes % bytes == 0;
}

// ---- Early launches: kernels that start before the previous one has ended ---------------------
//
// launch_early uses programmatic dependent launch, on compute capability 9.0 and up. The blocks of such a kernel start
// as soon as all blocks of the previous kernel have passed their wait. Until its own wait a kernel loads only what no
// kernel of a prefill writes: weights. At most two kernels run at once, since each lets the next one start only after
// its own wait; a library's kernel between them finds everything before the previous kernel finished. The shim checks
// that every thread waits, and a test that every kernel of such a file does. Since a compiler moves loads,
// scripts/check_sass.py reads the machine code; a comment in a kernel says how many loads of weights it finds.

// After this, the results of previous kernels are visible, and their inputs may be overwritten.
__device__ __forceinline__ void wait_for_kernels_in_front() {
#if defined(POP_CUDA_SHIM)
  cuda_shim::count_wait();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start once every block of this one has reached this call.
__device__ __forceinline__ void let_kernel_behind_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// `name` is for the error text. The runtime's own error names neither the kernel nor a number.
inline void check_shared_bytes(const char* name, size_t shared_bytes) {
  const size_t most = device_facts().block_shared_bytes;
  if (shared_bytes <= most) return;
  throw std::runtime_error(std::string("pop: CUDA: ") + name + ": expected at most " + std::to_string(most) +
                           " bytes of shared memory per block, the limit of this device, got " +
                           std::to_string(shared_bytes));
}

#if defined(POP_CUDA_SHIM)

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, Stream, A... args) {
  check_shared_bytes(name, shared_bytes);
  cuda_shim::run(grid, block, shared_bytes, [&] { kernel(args...); });
}

template <class... P, class... A>
void launch_early(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, Stream,
                  A... args) {
  check_shared_bytes(name, shared_bytes);
  cuda_shim::run(grid, block, shared_bytes, [&] { kernel(args...); }, name);
}

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(cuda_shim::dynamic_shared());
}

#else

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("pop: CUDA: ") + what + ": " + cudaGetErrorString(error));
  }
}

inline constexpr size_t kSharedWithoutAsking = 48 << 10;

// Lets a kernel have that much shared memory. Asks the runtime once a thread, kernel and device: it takes a
// microsecond.
inline void allow_shared_bytes(const char* name, const void* kernel, size_t bytes) {
  if (bytes <= kSharedWithoutAsking) return;
  static thread_local std::map<std::pair<const void*, int>, size_t> allowed;
  size_t& most = allowed[{kernel, current_device()}];
  if (bytes <= most) return;
  check_shared_bytes(name, bytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name);
  most = bytes;
}

template <class... P, class... A>
void launch_as(bool early, const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
               Stream stream, A... args) {
  allow_shared_bytes(name, reinterpret_cast<const void*>(kernel), shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args...), name);
}

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
            A... args) {
  launch_as(false, name, kernel, grid, block, shared_bytes, stream, args...);
}

// Only for kernels in which every thread calls wait_for_kernels_in_front.
template <class... P, class... A>
void launch_early(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
                  A... args) {
  launch_as(EarlyLaunches::wanted(), name, kernel, grid, block, shared_bytes, stream, args...);
}

template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char pop_dynamic_shared[];
  return reinterpret_cast<T*>(pop_dynamic_shared);
}

#endif

// ---- Sums and maxima over threads ----------------------------------------------------------

// The sum over `width` adjacent lanes (a power of two up to 32), returned to each of them.
template <int width = kWarp>
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = width / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

template <int width = kWarp>
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = width / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

// Reduces over a block of whole warps, always in the same order; every thread gets the result. `partial` is shared
// memory with one float per warp. Each call needs its own: there is no barrier after the last read. A block of several
// warps passes one barrier.
template <class OverWarp>
__device__ __forceinline__ float over_block(float value, float neutral, float* partial, OverWarp over_warp) {
  value = over_warp(value);
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  if (warps == 1) return value;
  if (lane == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  return over_warp(lane < warps ? partial[lane] : neutral);
}

__device__ __forceinline__ float block_sum(float value, float* partial) {
  return over_block(value, 0.0f, partial, [](float x) { return warp_sum(x); });
}

__device__ __forceinline__ float block_max(float value, float* partial) {
  return over_block(value, -INFINITY, partial, [](float x) { return warp_max(x); });
}

}  // namespace pop::cuda
