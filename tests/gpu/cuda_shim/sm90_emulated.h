// Replaces cuda/sm90.cuh under the CPU shim: the same functions, emulated as the PTX ISA describes them.
//
// A cluster is one block of the shim; threadIdx.y is the rank of a block in it. Where hardware may act at any time
// between two points, the emulation takes the one that is more likely to show an error: a TMA box is written when it is
// requested, and the operands of a product are read when it is waited for, and must then be the same as when it was
// issued.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <stdexcept>
#include <vector>

#include "cuda/elements.cuh"

namespace pop::cuda::sm90 {

using Barrier = uint64_t;

struct TensorMap {
  const unsigned char* matrix;
  int64_t rows, columns, row_bytes;
  int box_rows;
};

inline constexpr size_t kSharedSlack = 0;

namespace emulated {

inline constexpr uint32_t kWindow = 3 * 1024;  // the start of shared memory in its window
inline size_t rank_bytes = 0;                  // shared memory of one block of a cluster
inline unsigned cluster = 1;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "sm90_emulated: %s (block %u of cluster %u, thread %u)\n", what, threadIdx.y, blockIdx.x,
               threadIdx.x);
  std::abort();
}

inline unsigned char* shared_base(unsigned rank) {
  const uintptr_t first = (reinterpret_cast<uintptr_t>(cuda_shim::dynamic_shared()) + 1023) / 1024 * 1024;
  return reinterpret_cast<unsigned char*>(first) + rank * rank_bytes;
}

// Threads of each block of the cluster that have returned. No other block may touch the shared memory of a block that
// has exited.
inline std::atomic<unsigned> returned[2];
inline unsigned threads = 0;
inline std::vector<int> unfenced_inits;  // barriers that a thread initialised since its last fence

inline void expect_resident(unsigned rank) {
  if (returned[rank] == threads) fail("the other block of the cluster has exited");
}

// The same address in another block of the cluster.
template <class T>
T* in_rank(T* pointer, unsigned rank) {
  expect_resident(rank);
  return reinterpret_cast<T*>(shared_base(rank) +
                              (reinterpret_cast<unsigned char*>(pointer) - shared_base(threadIdx.y)));
}

// The 128-byte swizzle: bits 4-6 of an address are XORed with bits 7-9.
inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7u) << 4); }

}  // namespace emulated

inline uint32_t shared_address(const void* pointer) {
  const auto* byte = static_cast<const unsigned char*>(pointer);
  return emulated::kWindow + static_cast<uint32_t>(byte - emulated::shared_base(threadIdx.y));
}

template <class T>
T& shared_memory() {
  return *reinterpret_cast<T*>(emulated::shared_base(threadIdx.y));
}

inline int cluster_rank() { return static_cast<int>(threadIdx.y); }
inline int cluster_index() { return static_cast<int>(blockIdx.x); }
inline int cluster_count() { return static_cast<int>(gridDim.x); }
inline void cluster_sync() {
  if (emulated::unfenced_inits[cuda_shim::lane->index] != 0)
    emulated::fail("a barrier was initialised without a fence behind it");
  __syncthreads();
}

template <int count>
void give_registers() {}
template <int count>
void take_registers() {}

// ---- mbarrier ------------------------------------------------------------------------------

namespace emulated {

struct BarrierState {
  uint16_t phase, arrivals;  // parity of the current phase; arrivals that complete a phase
  int16_t pending;           // arrivals still missing
  int16_t bytes;             // in units of 16, still missing; negative if they came before they were expected
};

// Applies `change`, and completes the phase if nothing is missing.
template <class Change>
void update(Barrier* barrier, const Change& change) {
  std::atomic_ref<uint64_t> word(*barrier);
  uint64_t old = word.load(), next;
  do {
    auto state = std::bit_cast<BarrierState>(old);
    change(state);
    if (state.pending < 0) fail("more arrivals at a barrier than it was made for");
    if (state.pending == 0 && state.bytes == 0) {
      state.phase ^= 1;
      state.pending = static_cast<int16_t>(state.arrivals);
    }
    next = std::bit_cast<uint64_t>(state);
  } while (!word.compare_exchange_weak(old, next));
}

}  // namespace emulated

inline void barrier_init(Barrier* barrier, int arrivals) {
  ++emulated::unfenced_inits[cuda_shim::lane->index];
  const auto count = static_cast<uint16_t>(arrivals);
  *barrier = std::bit_cast<uint64_t>(emulated::BarrierState{0, count, static_cast<int16_t>(count), 0});
}

inline void barrier_init_fence() { emulated::unfenced_inits[cuda_shim::lane->index] = 0; }

inline void barrier_arrive_expecting(Barrier* barrier, int bytes) {
  emulated::update(barrier, [&](auto& state) {
    state.bytes = static_cast<int16_t>(state.bytes + bytes / 16);
    --state.pending;
  });
}

inline void barrier_arrive_at(Barrier* barrier, int rank) {
#if !defined(POP_CUDA_SHIM_THREADS)
  // An arrival of the second block at the first takes its time: more than the first needs to return if it does not
  // wait.
  if (rank == 0 && threadIdx.y == 1) {
    for (int i = 0; i < 300; ++i) cuda_shim::yield();
  }
#endif
  emulated::update(emulated::in_rank(barrier, static_cast<unsigned>(rank)), [](auto& state) { --state.pending; });
}

inline void store_at(float (&to)[4], int rank, float a, float b, float c, float d) {
  const float values[4] = {a, b, c, d};
  std::memcpy(emulated::in_rank(&to[0], static_cast<unsigned>(rank)), values, sizeof(values));
}

inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  const auto begin = std::chrono::steady_clock::now();
  const std::atomic_ref<uint64_t> word(*barrier);
  while (std::bit_cast<emulated::BarrierState>(word.load()).phase == parity) {
    if (std::chrono::steady_clock::now() - begin > std::chrono::seconds(60)) emulated::fail("waits forever");
    cuda_shim::yield();
  }
}

// ---- TMA -----------------------------------------------------------------------------------

namespace emulated {

inline void write_box(const TensorMap& map, unsigned char* to, Barrier* barrier, int64_t row, int64_t column) {
  if (reinterpret_cast<uintptr_t>(to) % 1024 != 0) fail("a swizzled box begins at a multiple of 1024 bytes");
  for (uint32_t r = 0; r < static_cast<uint32_t>(map.box_rows); ++r) {
    for (uint32_t c = 0; c < 64; ++c) {
      uint16_t element = 0;
      if (row + r < map.rows && column + c < map.columns) {
        std::memcpy(&element, map.matrix + (row + r) * map.row_bytes + (column + c) * 2, 2);
      }
      std::memcpy(to + swizzled(r * 128 + c * 2), &element, 2);
    }
  }
  update(barrier, [&](auto& state) { state.bytes = static_cast<int16_t>(state.bytes - map.box_rows * 128 / 16); });
}

}  // namespace emulated

inline void prefetch(const TensorMap&) {}

inline void load_box(const TensorMap& map, void* to, Barrier* barrier, int row, int column) {
  emulated::write_box(map, static_cast<unsigned char*>(to), barrier, row, column);
}

inline void load_box_multicast(const TensorMap& map, void* to, Barrier* barrier, int row, int column, uint16_t ranks) {
  for (unsigned rank = 0; rank < emulated::cluster; ++rank) {
    if ((ranks >> rank & 1) == 0) continue;
    emulated::write_box(map, emulated::in_rank(static_cast<unsigned char*>(to), rank), emulated::in_rank(barrier, rank),
                        row, column);
  }
}

// ---- wgmma ---------------------------------------------------------------------------------

namespace emulated {

struct Product {
  float* c;
  uint64_t a, b;
  bool accumulate;
  std::vector<float> as_issued;
};

struct Products {
  bool fenced = false;  // since the last group
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
};

inline std::vector<Products> products;  // one per thread of the block

inline float operand(uint64_t descriptor, uint32_t row, uint32_t k) {
  const uint32_t start = (descriptor & 0x3fffu) << 4, eight_rows = (descriptor >> 32 & 0x3fffu) << 4;
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7u) != 0) fail("expected a 128-byte swizzle without a base offset");
  const uint32_t address = swizzled(start + row / 8 * eight_rows + row % 8 * 128 + k * 2);
  uint16_t bits;
  std::memcpy(&bits, shared_base(threadIdx.y) + address - kWindow, 2);
  return bf16_value<float>(bits);
}

// This thread's part of a . b^T: register i is row 16 warp + lane / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (lane % 4)
// + i % 2.
inline std::vector<float> product(uint64_t a, uint64_t b) {
  const uint32_t warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  std::vector<float> sums(128);
  for (uint32_t k = 0; k < 16; ++k) {
    const uint32_t row = 16 * warp + lane / 4;
    const float first = operand(a, row, k), second = operand(a, row + 8, k);
    for (uint32_t i = 0; i < 128; ++i) {
      if (i % 4 >= 2) continue;
      const float weight = operand(b, 8 * (i / 4) + 2 * (lane % 4) + i % 2, k);
      sums[i] += first * weight;
      sums[i + 2] += second * weight;
    }
  }
  return sums;
}

}  // namespace emulated

inline void multiply_fence() { emulated::products[cuda_shim::lane->index].fenced = true; }

inline void multiply_64x256x16(float (&c)[128], uint64_t a, uint64_t b, bool accumulate) {
  if (!emulated::products[cuda_shim::lane->index].fenced) emulated::fail("a product without a fence before it");
  const bool watched = threadIdx.x % 16 == 5;  // only some threads: computing it twice takes time
  std::vector<float> now = watched ? emulated::product(a, b) : std::vector<float>();
  emulated::products[cuda_shim::lane->index].open.push_back({c, a, b, accumulate, std::move(now)});
}

inline void multiply_commit() {
  emulated::Products& own = emulated::products[cuda_shim::lane->index];
  own.groups.push_back(std::move(own.open));
  own.open.clear();
  own.fenced = false;
}

template <size_t pending>
void multiply_wait() {
  emulated::Products& own = emulated::products[cuda_shim::lane->index];
  for (int i = 0; i < 2; ++i)
    cuda_shim::yield();  // gives a producer time to overwrite a stage that it wrongly takes for free
  for (; own.groups.size() > pending; own.groups.pop_front()) {
    for (const emulated::Product& each : own.groups.front()) {
      const std::vector<float> sums = emulated::product(each.a, each.b);
      if (!each.as_issued.empty() && each.as_issued != sums) emulated::fail("operands changed before they were used");
      for (int i = 0; i < 128; ++i) each.c[i] = sums[i] + (each.accumulate ? each.c[i] : 0.0f);
    }
  }
}

inline void multiply_done(float (&)[128]) {}

// ---- Host ----------------------------------------------------------------------------------

inline bool available() { return false; }

inline TensorMap tensor_map(const void* matrix, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  if (!is_aligned(matrix, stride, 2) || rows < 1 || columns < 1 || box_rows > 256) {
    throw std::runtime_error("sm90_emulated: cuTensorMapEncodeTiled would refuse this matrix");
  }
  return {static_cast<const unsigned char*>(matrix), rows, columns, stride * 2, box_rows};
}

struct ClusterShape {
  int cluster, threads;
  size_t shared_bytes;
};

// Few, so that a block has several tiles.
template <class... P>
int resident_clusters(const char*, void (*)(P...), const ClusterShape& shape) {
  return shape.cluster == 1 ? 3 : 2;
}

template <class... P>
void launch_clusters(const char* name, void (*kernel)(P...), int most, const ClusterShape& shape, Stream,
                     const P&... args) {
  const auto [cluster, threads, shared_bytes] = shape;
  if (shared_bytes > 227 << 10) throw std::runtime_error("sm90_emulated: more shared memory than a block may have");
  const int clusters = std::min(most, resident_clusters(name, kernel, shape));
  emulated::cluster = static_cast<unsigned>(cluster);
  emulated::rank_bytes = (shared_bytes + 1023) / 1024 * 1024;
  emulated::products.assign(threads * cluster, {});
  emulated::unfenced_inits.assign(threads * cluster, 0);
  emulated::threads = static_cast<unsigned>(threads);
  cuda_shim::run(dim3(clusters), dim3(threads, cluster), cluster * emulated::rank_bytes + 1024, [&] {
    if (emulated::returned[threadIdx.y] == emulated::threads) emulated::returned[threadIdx.y] = 0;  // a new cluster
    kernel(args...);
    ++emulated::returned[threadIdx.y];
  });
  for (auto& count : emulated::returned) count = 0;
}

}  // namespace pop::cuda::sm90
