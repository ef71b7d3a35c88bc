// Operators on a CPU in a process that was forked from one with OpenMP threads.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "torch/checks.h"

namespace pop {

// Checks that work on the CPU may use as many threads as torch is set to. `fork` copies the thread that calls it and no
// other, and the child's OpenMP runtime still counts on its parent's: the next parallel loop would wait forever. Throws
// if the parent had passed this check with several threads and torch may still use more than one.
void check_threads();

// An operator on a CPU that checks the threads first.
template <auto kernel>
struct ChecksThreads;

template <class Result, class... Args, Result (*kernel)(Args...)>
struct ChecksThreads<kernel> {
  static Result call(Args... args) {
    if ((on_cpu(args) || ...)) check_threads();
    return kernel(std::move(args)...);
  }

 private:
  template <class Argument>
  static bool on_cpu(const Argument&) {
    return false;
  }
  static bool on_cpu(const Tensor& tensor) { return tensor.defined() && tensor.is_cpu(); }
  static bool on_cpu(const std::vector<Tensor>& tensors) { return !tensors.empty() && on_cpu(tensors.front()); }
};

}  // namespace pop
