// Work over torch's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>

#include "cpu/torch_calls.h"

namespace pop::cpu {

// With fewer elements per thread, a further thread costs more than it saves.
inline constexpr int64_t kGrainElements = 1 << 14;

// The number of threads that parallel_tasks uses for so many tasks.
inline int64_t workers_for(int64_t tasks) { return std::min<int64_t>(num_threads(), tasks); }

// Runs task(0, worker) ... task(count - 1, worker) for tasks of unequal cost: each worker takes the next one. Throws
// the first exception at the end.
template <class Task>
void parallel_tasks(int64_t count, const Task& task) {
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::once_flag failed;
  parallel_for(0, workers_for(count), 1, [&](int64_t worker, int64_t) {
    try {
      for (int64_t i = next++; i < count; i = next++) task(i, worker);
    } catch (...) {
      std::call_once(failed, [&] { error = std::current_exception(); });
    }
  });
  if (error) std::rethrow_exception(error);
}

struct AlignedDelete {
  void operator()(char* memory) const { ::operator delete(memory, std::align_val_t(kAlignment)); }
};

// Uninitialised memory for one call, aligned to kAlignment.
using Scratch = std::unique_ptr<char, AlignedDelete>;

inline Scratch allocate(size_t bytes) {
  return Scratch(static_cast<char*>(::operator new(std::max<size_t>(bytes, 1), std::align_val_t(kAlignment))));
}

}  // namespace pop::cpu
