// Work over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

namespace pop::cpu {

// Below this many elements a second thread costs more than it saves.
inline constexpr int64_t kGrainElements = 1 << 14;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many threads over_tasks takes for so many tasks.
inline int64_t workers_for(int64_t tasks) { return std::min<int64_t>(torch::stable::get_num_threads(), tasks); }

// Runs task(0, worker) .. task(count - 1, worker), tasks that differ in cost: each worker takes the next one. The first
// exception is thrown at the end.
template <class Task>
void over_tasks(int64_t count, const Task& task) {
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::once_flag failed;
  torch::stable::parallel_for(0, workers_for(count), 1, [&](int64_t worker, int64_t) {
    try {
      for (int64_t i = next++; i < count; i = next++) task(i, worker);
    } catch (...) {
      std::call_once(failed, [&] { error = std::current_exception(); });
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace pop::cpu
