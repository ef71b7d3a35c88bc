// Checks of the CUDA kernels: each compares a launch with the same arithmetic done serially. They run on the shim, or
// on a GPU (target cuda_checks of a build with POP_CUDA=ON) with operands in managed memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/model_spec.h"
#include "row_math.h"

namespace checks {

// Registers a check, which throws if it fails: `static const Check check("name", run);`
struct Check {
  Check(const char* name, void (*run)());
};

#if defined(POP_CUDA_SHIM)

template <class T>
using Memory = std::allocator<T>;

inline void finish() {}

#else

inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Memory that the host and the current device share.
template <class T>
struct Memory {
  using value_type = T;

  Memory() = default;
  template <class Other>
  Memory(const Memory<Other>&) {}

  T* allocate(size_t count) {
    void* memory = nullptr;
    check_cuda(cudaMallocManaged(&memory, count * sizeof(T)));
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t) { static_cast<void>(cudaFree(memory)); }
  bool operator==(const Memory&) const { return true; }
};

// Waits for all launches, and throws their error.
inline void finish() { check_cuda(cudaDeviceSynchronize()); }

#endif

// An operand of a kernel. Do not touch it between a launch and `finish`.
template <class T>
using Vector = std::vector<T, Memory<T>>;

inline std::string name_of(pop::DType dtype) {
  return dtype == pop::DType::f32 ? "f32" : dtype == pop::DType::bf16 ? "bf16" : "f16";
}

inline float round_to(pop::DType dtype, float value) {
  switch (dtype) {
    case pop::DType::f32:
      return value;
    case pop::DType::bf16:
      return pop::bf16_value<float>(pop::bf16_bits(value));
    case pop::DType::f16:
      return pop::f16_value<float>(pop::f16_bits(value));
  }
  return value;
}

#if defined(POP_CUDA_SHIM_THREADS)
inline constexpr bool kRaces = true;  // ThreadSanitizer slows threads down: see Turns
#else
inline constexpr bool kRaces = false;
#endif

// Decides if a check runs its next case in this dtype: always, except under ThreadSanitizer. Kernels synchronise at the
// same points in every dtype, so there each case runs in one dtype, in rotation.
class Turns {
 public:
  explicit Turns(pop::DType dtype) : turn_(static_cast<int>(dtype)) {}

  bool next() { return !kRaces || count_++ % 3 == turn_; }

 private:
  int turn_, count_ = 0;
};

// An array of elements of one dtype, with sentinels before it, after it, and in every element that is not written.
class Buffer {
 public:
  static constexpr float kSentinel = 7776.0f;  // exact in every dtype
  static constexpr int64_t kGuard = 64;        // elements on each side

  // `offset` extra elements before the first one, to test alignment.
  Buffer(pop::DType dtype, int64_t count, int64_t offset = 0)
      : dtype_(dtype),
        count_(count),
        first_(kGuard + offset),
        lines_((count + offset + 2 * kGuard) * element() / sizeof(Line) + 1) {
    for (int64_t i = -first_; i < count_ + kGuard; ++i) set(i, kSentinel);
  }

  void* data() { return base() + first_ * element(); }
  const void* at(int64_t i) const { return static_cast<const char*>(data()) + i * element(); }
  const void* data() const { return const_cast<Buffer*>(this)->data(); }
  int64_t count() const { return count_; }
  pop::DType dtype() const { return dtype_; }

  float get(int64_t i) const {
    const char* from = static_cast<const char*>(data()) + i * element();
    if (dtype_ == pop::DType::f32) {
      float value;
      std::memcpy(&value, from, 4);
      return value;
    }
    uint16_t bits;
    std::memcpy(&bits, from, 2);
    return dtype_ == pop::DType::bf16 ? pop::bf16_value<float>(bits) : pop::f16_value<float>(bits);
  }

  void set(int64_t i, float value) {
    char* to = static_cast<char*>(data()) + i * element();
    if (dtype_ == pop::DType::f32) {
      std::memcpy(to, &value, 4);
      return;
    }
    const uint16_t bits =
        static_cast<uint16_t>(dtype_ == pop::DType::bf16 ? pop::bf16_bits(value) : pop::f16_bits(value));
    std::memcpy(to, &bits, 2);
  }

  void fill_random(std::mt19937& random, float scale = 1.0f) {
    std::normal_distribution<float> normal(0.0f, scale);
    for (int64_t i = 0; i < count_; ++i) set(i, normal(random));
  }

  bool guards_intact() const {
    for (int64_t i = 0; i < kGuard; ++i) {
      if (get(-1 - i) != kSentinel || get(count_ + i) != kSentinel) return false;
    }
    return true;
  }

 private:
  int64_t element() const { return dtype_ == pop::DType::f32 ? 4 : 2; }
  char* base() { return reinterpret_cast<char*>(lines_.data()); }

  struct alignas(64) Line {
    char bytes[64];
  };

  pop::DType dtype_;
  int64_t count_, first_;
  Vector<Line> lines_;
};

// Throws unless `buffer` holds `expected` within |error| <= absolute + relative * |expected| and its guards are intact.
inline void expect_close(const std::string& what, const Buffer& buffer, const std::vector<float>& expected,
                         float absolute, float relative) {
  if (!buffer.guards_intact()) throw std::runtime_error(what + ": wrote outside its output");
  for (int64_t i = 0; i < buffer.count(); ++i) {
    const float got = buffer.get(i), want = expected[i];
    if (std::abs(got - want) <= absolute + relative * std::abs(want)) continue;
    std::ostringstream text;
    text << what << ": element " << i << ": expected " << want << ", got " << got;
    throw std::runtime_error(text.str());
  }
}

// The relative error of one rounding to `dtype`.
inline float rounding(pop::DType dtype) {
  return dtype == pop::DType::f32 ? 1e-5f : dtype == pop::DType::bf16 ? 1.0f / 128 : 1.0f / 1024;
}

}  // namespace checks
