// Replaces the toolkit's header when a kernel of cuda/ is compiled as C++ and run on a CPU; for tests only.
//
// The threads of a block are fibers of one host thread, or, with POP_CUDA_SHIM_THREADS, host threads under
// ThreadSanitizer. Blocks run one after another. Shared memory is `static`, so launches run one after another too. A
// kernel that uses anything that is not here does not compile.
#pragma once

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#if !defined(POP_CUDA_SHIM)
#error "compile with -DPOP_CUDA_SHIM"
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) alignas(n)
#define __grid_constant__

namespace cuda_shim {

constexpr unsigned kWarpSize = 32;

// One CUDA thread.
struct Lane {
  dim3 thread, block;
  unsigned index;  // within the block
};

extern thread_local Lane* lane;
extern dim3 grid_dim, block_dim;

// Runs `body` as every thread of every block. Throws std::runtime_error if threads wait for each other forever. With
// `early`, the name of a kernel, it also throws unless every thread called count_wait once.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body, const char* early = nullptr);

// Sets the most shared memory that a block can be given, before any launch.
void set_block_shared_bytes(size_t bytes);
void set_sm_count(int count);

void count_wait();  // counts calls of wait_for_kernels_in_front (cuda/launch.cuh)

void* dynamic_shared();  // filled with NaN before each block
void block_barrier();
void warp_barrier();
void lanes_meet();                    // all lanes of the warp are there; unlike a barrier, this orders no memory
void yield();                         // lets other threads run; for a thread that polls
void* warp_slot(unsigned warp_lane);  // 16 bytes per lane, to exchange values

// A shuffle exchanges registers and orders no memory: under ThreadSanitizer it is no synchronisation, so that a missing
// __syncwarp shows.
template <class T>
T shuffle(T value, unsigned from) {
  constexpr size_t kWords = (sizeof(T) + 3) / 4;
  static_assert(kWords <= 4);
  uint32_t words[kWords] = {};
  std::memcpy(words, &value, sizeof(T));
  const auto slot = [](unsigned of) { return static_cast<uint32_t*>(warp_slot(of % kWarpSize)); };
  uint32_t* own = slot(lane->index);
  for (size_t i = 0; i < kWords; ++i) std::atomic_ref(own[i]).store(words[i], std::memory_order_relaxed);
  lanes_meet();
  uint32_t* other = slot(from);
  for (size_t i = 0; i < kWords; ++i) words[i] = std::atomic_ref(other[i]).load(std::memory_order_relaxed);
  lanes_meet();
  std::memcpy(&value, words, sizeof(T));
  return value;
}

}  // namespace cuda_shim

#define threadIdx (::cuda_shim::lane->thread)
#define blockIdx (::cuda_shim::lane->block)
#define blockDim (::cuda_shim::block_dim)
#define gridDim (::cuda_shim::grid_dim)

inline void __syncthreads() { cuda_shim::block_barrier(); }
inline void __syncwarp(unsigned = 0xffffffffu) { cuda_shim::warp_barrier(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_shim::shuffle(value, cuda_shim::lane->index ^ static_cast<unsigned>(mask));
}
template <class T>
T __shfl_sync(unsigned, T value, int from, int width = 32) {
  const unsigned first = cuda_shim::lane->index & ~static_cast<unsigned>(width - 1);
  return cuda_shim::shuffle(value, first + static_cast<unsigned>(from) % static_cast<unsigned>(width));
}

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}

template <class T>
void __stwt(T* to, T value) {
  std::atomic_ref<T>(*to).store(value);
}

inline int atomicExch(int* to, int value) { return std::atomic_ref<int>(*to).exchange(value); }
inline int atomicAdd(int* to, int value) { return std::atomic_ref<int>(*to).fetch_add(value); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
