// Asynchronous copies to shared memory, for tests only (see cuda_runtime.h). A copy is made when its thread waits for
// it, the latest moment that a GPU allows, so that a missing wait shows.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <vector>

namespace cuda_shim {

struct AsyncCopy {
  void* to;
  const void* from;
  size_t bytes;
};

// The copies of one thread that are not committed, and its groups that are not waited for.
struct AsyncCopies {
  std::vector<AsyncCopy> open;
  std::deque<std::vector<AsyncCopy>> groups;
};

inline std::array<AsyncCopies, 1024> async_copies;

}  // namespace cuda_shim

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes != 0) {
    std::fputs("cuda_shim: misaligned asynchronous copy\n", stderr);
    std::abort();
  }
  cuda_shim::async_copies[cuda_shim::lane->index].open.push_back({to, from, bytes});
}

inline void __pipeline_commit() {
  auto& own = cuda_shim::async_copies[cuda_shim::lane->index];
  own.groups.push_back(std::move(own.open));
  own.open.clear();
}

// Waits for all groups except the latest `count`.
inline void __pipeline_wait_prior(size_t count) {
  auto& own = cuda_shim::async_copies[cuda_shim::lane->index];
  for (; own.groups.size() > count; own.groups.pop_front()) {
    for (const auto& copy : own.groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
  }
}
