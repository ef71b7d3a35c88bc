// Loads and stores of elements as fp32 values, one at a time or 16 bytes at a time.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/launch.cuh"
#include "row_math.h"

namespace pop::cuda {

// The element types are float and these two. Loads and stores convert them.
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

// Elements per 16-byte access.
template <class T>
inline constexpr int kPack = 16 / sizeof(T);

// kPack<T> elements in their own type: a row of 16-bit elements takes half the registers of its fp32 values.
struct alignas(16) Pack {
  uint32_t words[4];
};

template <class T>
__device__ __forceinline__ Pack load_pack(const T* from) {
  return *reinterpret_cast<const Pack*>(from);
}

// To global memory, in one store: of some assignments of a Pack, nvcc makes four stores of 4 bytes.
template <class T>
__device__ __forceinline__ void store_pack(T* to, const Pack& pack) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(pack.words[0]),
               "r"(pack.words[1]), "r"(pack.words[2]), "r"(pack.words[3])
               : "memory");
#else
  *reinterpret_cast<Pack*>(to) = pack;
#endif
}

template <class T>
__device__ __forceinline__ void unpack(const Pack& pack, float (&to)[kPack<T>]) {
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    if constexpr (sizeof(T) == 4) {
      to[i] = lane_cast<float>(pack.words[i]);
    } else {
      to[i] = to_float(T{static_cast<uint16_t>(pack.words[i / 2] >> (i % 2 * 16))});
    }
  }
}

// Two rounded elements in one word. A device converts both with one instruction; two single conversions whose results
// are used again run at a quarter of the rate.
template <class T>
__device__ __forceinline__ uint32_t pair_bits(float low, float high) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, BFloat16>) return lane_cast<uint32_t>(__floats2bfloat162_rn(low, high));
  if constexpr (std::is_same_v<T, Float16>) return lane_cast<uint32_t>(__floats2half2_rn(low, high));
#else
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
#endif
}

template <class T>
__device__ __forceinline__ Pack packed(const float (&from)[kPack<T>]) {
  Pack pack;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      pack.words[i] = lane_cast<uint32_t>(from[i]);
    } else {
      pack.words[i] = pair_bits<T>(from[2 * i], from[2 * i + 1]);
    }
  }
  return pack;
}

// `count` adjacent elements in one access of `count` * sizeof(T) bytes, aligned to that size.
template <class T, int count>
struct alignas(count * sizeof(T)) Elements {
  T at[count];
};

template <int count, class T>
__device__ __forceinline__ void load(const T* from, float (&to)[count]) {
  if constexpr (count == kPack<T>) {
    unpack<T>(load_pack(from), to);
  } else {
    const Elements<T, count> elements = *reinterpret_cast<const Elements<T, count>*>(from);
#pragma unroll
    for (int i = 0; i < count; ++i) to[i] = to_float(elements.at[i]);
  }
}

template <int count, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[count]) {
  if constexpr (count == kPack<T>) {
    store_pack(to, packed<T>(from));
  } else {
    Elements<T, count> elements;
#pragma unroll
    for (int i = 0; i < count; ++i) elements.at[i] = from_float<T>(from[i]);
    *reinterpret_cast<Elements<T, count>*>(to) = elements;
  }
}

// `kCount` adjacent elements in registers, in their own type: for loops that load well ahead of use, or that use less
// than they load.
template <class T, int kCount>
struct Operand {
  Elements<T, kCount> elements;

  __device__ __forceinline__ void load(const T* from) {
    elements = *reinterpret_cast<const Elements<T, kCount>*>(from);
  }
  // Loads memory that will not be read again.
  __device__ __forceinline__ void load_once(const T* from) { load(from); }
  __device__ __forceinline__ float value(int i) const { return to_float(elements.at[i]); }
};

// Held as words, so that the compiler keeps two elements per register.
template <class T, int kCount>
  requires(kCount * sizeof(T) % 4 == 0)
struct Operand<T, kCount> {
  static constexpr int kWords = kCount * sizeof(T) / 4;
  Elements<uint32_t, kWords> words;

  __device__ __forceinline__ void load(const T* from) { words = *reinterpret_cast<const decltype(words)*>(from); }
  __device__ __forceinline__ void load_once(const T* from) {
    if constexpr (kWords == 4) {
      const uint4 all = __ldcs(reinterpret_cast<const uint4*>(from));
      words = {all.x, all.y, all.z, all.w};
    } else {
      load(from);
    }
  }
  __device__ __forceinline__ float value(int i) const {
    if constexpr (sizeof(T) == 4) {
      return lane_cast<float>(words.at[i]);
    } else {
      return to_float(T{static_cast<uint16_t>(i % 2 == 0 ? words.at[i / 2] : words.at[i / 2] >> 16)});
    }
  }
};

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
