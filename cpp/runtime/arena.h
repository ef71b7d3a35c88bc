// Cuts one allocation into aligned pieces. Without an allocation it counts the bytes that the pieces take.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/params.h"

namespace pop {

class Arena {
 public:
  // `base` is aligned to kAlignment, or null to count only.
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

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
