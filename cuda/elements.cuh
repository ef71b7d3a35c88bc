// Elements in memory and their fp32 values, one at a time or 16 bytes at a time.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"
#include "row_math.h"

namespace pop::cuda {

// The element types: float, and these two, which a load or store converts.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float element) { return element; }
__device__ __forceinline__ float to_float(BFloat16 element) { return bf16_value<float>(element.bits); }
__device__ __forceinline__ float to_float(Float16 element) { return f16_value<float>(element.bits); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
  return {static_cast<uint16_t>(bf16_bits(value))};
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float value) {
  return {static_cast<uint16_t>(f16_bits(value))};
}

// Elements of one 16-byte access.
template <class T>
inline constexpr int kPack = 16 / sizeof(T);

// `count` neighbouring elements, moved in one access: `count` * sizeof(T) bytes, aligned to as many.
template <class T, int count>
struct alignas(count * sizeof(T)) Elements {
  T at[count];
};

template <int count, class T>
__device__ __forceinline__ void load(const T* from, float (&to)[count]) {
  const Elements<T, count> elements = *reinterpret_cast<const Elements<T, count>*>(from);
#pragma unroll
  for (int i = 0; i < count; ++i) to[i] = to_float(elements.at[i]);
}

template <int count, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[count]) {
  Elements<T, count> elements;
#pragma unroll
  for (int i = 0; i < count; ++i) elements.at[i] = from_float<T>(from[i]);
  *reinterpret_cast<Elements<T, count>*>(to) = elements;
}

// Runs `call(T{})` with the element type of `dtype`.
template <class Call>
void with_element(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::f32:
      return call(float{});
    case DType::bf16:
      return call(BFloat16{});
    case DType::f16:
      return call(Float16{});
  }
}

}  // namespace pop::cuda
