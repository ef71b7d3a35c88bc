// Cuts an allocation into aligned pieces, or, without one, counts the bytes that they take.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend.h"

namespace pop {

class Cutter {
 public:
  explicit Cutter(void* base) : base_(static_cast<char*>(base)) {}

  void* take(size_t bytes) {
    void* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += aligned(bytes);
    return piece;
  }

  template <class T>
  T* take_array(int64_t count) {
    return static_cast<T*>(take(count * sizeof(T)));
  }

  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace pop
