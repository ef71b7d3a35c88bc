// Vectors of fp32 lanes, as wide as a register of the instruction set that this file is compiled for, with loads and
// stores of float32, bfloat16 and float16. Only for files that are compiled per instruction set (POP_ISA).
#pragma once

#include <cstdint>
#include <utility>

#include "core/model_spec.h"
#include "row_math.h"

#if defined(__SSE2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define POP_INLINE inline __attribute__((always_inline))

namespace pop::cpu::POP_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr __mmask16 kAll = 0xffff;  // without a mask, g++ 12 warns of an undefined register
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Vec = float __attribute__((vector_size(4 * kLanes)));
using VecI32 = int32_t __attribute__((vector_size(4 * kLanes)));
using VecU32 = uint32_t __attribute__((vector_size(4 * kLanes)));
using Quad = float __attribute__((vector_size(16)));
using QuadI32 = int32_t __attribute__((vector_size(16)));
using VecU16 = uint16_t __attribute__((vector_size(2 * kLanes)));

}  // namespace
}  // namespace pop::cpu::POP_ISA

template <>
struct pop::LaneInts<pop::cpu::POP_ISA::Vec> {
  using i32 = pop::cpu::POP_ISA::VecI32;
  using u32 = pop::cpu::POP_ISA::VecU32;
};

namespace pop::cpu::POP_ISA {
namespace {

// The element types are float and these two. Loads and stores convert them.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

POP_INLINE float float_of(float value) { return value; }
POP_INLINE float float_of(BFloat16 value) { return bf16_value<float>(value.bits); }
POP_INLINE float float_of(Float16 value) { return f16_value<float>(value.bits); }

POP_INLINE Vec splat(float value) { return value - Vec{}; }

// a > b ? a : b, and b where one of them is a NaN.
POP_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a, b);  // the plain form draws a false warning from g++ 12
#elif defined(__AVX__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

POP_INLINE Vec load(const float* from) {
  Vec value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

// g++ compiles __builtin_convertvector between 16 and 32 bits to several instructions, so intrinsics are used.
POP_INLINE VecU32 load_u16(const void* from) {
#if defined(__AVX512F__)
  return lane_cast<VecU32>(_mm512_maskz_cvtepu16_epi32(kAll, _mm256_loadu_si256(static_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
  return lane_cast<VecU32>(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
#else
  VecU16 bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return __builtin_convertvector(bits, VecU32);
#endif
}

POP_INLINE Vec load(const BFloat16* from) { return bf16_value<Vec>(load_u16(from)); }

POP_INLINE Vec load(const Float16* from) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  return f16_value<Vec>(load_u16(from));
#endif
}

POP_INLINE Vec load(const int8_t* from) {
#if defined(__AVX512F__)
  return __builtin_convertvector(
      lane_cast<VecI32>(_mm512_maskz_cvtepi8_epi32(kAll, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))),
      Vec);
#elif defined(__AVX2__)
  return __builtin_convertvector(
      lane_cast<VecI32>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))), Vec);
#else
  using VecI8 = int8_t __attribute__((vector_size(kLanes)));
  VecI8 bytes;
  __builtin_memcpy(&bytes, from, sizeof(bytes));
  return __builtin_convertvector(bytes, Vec);
#endif
}

POP_INLINE void store(float* to, Vec value) { __builtin_memcpy(to, &value, sizeof(value)); }

// Every lane is below 2^16.
POP_INLINE void store_u16(void* to, VecU32 value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_maskz_cvtepi32_epi16(kAll, lane_cast<__m512i>(value)));
#elif defined(__AVX2__)
  const __m256i lanes = lane_cast<__m256i>(value);
  _mm_storeu_si128(static_cast<__m128i*>(to),
                   _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1)));
#else
  const VecU16 bits = __builtin_convertvector(value, VecU16);
  __builtin_memcpy(to, &bits, sizeof(bits));
#endif
}

// Stores the low 8 bits of each lane.
POP_INLINE void store_u8(void* to, VecU32 value) {
#if defined(__AVX512F__)
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(kAll, lane_cast<__m512i>(value)));
#else
  using VecU8 = uint8_t __attribute__((vector_size(kLanes)));
  const VecU8 bytes = __builtin_convertvector(value, VecU8);
  __builtin_memcpy(to, &bytes, sizeof(bytes));
#endif
}

POP_INLINE void store(BFloat16* to, Vec value) { store_u16(to, bf16_bits(value)); }

POP_INLINE void store(Float16* to, Vec value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(kAll, value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
  store_u16(to, f16_bits(value));
#endif
}

// The bits of each lane in the element type.
POP_INLINE VecU32 bits_of(BFloat16, Vec value) { return bf16_bits(value); }

POP_INLINE VecU32 bits_of(Float16, Vec value) {
#if defined(__F16C__) || defined(__AVX512F__)
  Float16 lanes[kLanes];
  store(lanes, value);
  return load_u16(lanes);
#else
  return f16_bits(value);
#endif
}

// Loads the first 1 <= `count` < kLanes elements; the other lanes are zero.
template <class T>
POP_INLINE Vec load_tail(const T* from, int64_t count) {
  if (count < 1) __builtin_unreachable();  // without it, g++ 12 warns of a copy of a negative size
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load(lanes);
}

template <class T>
POP_INLINE void store_tail(T* to, Vec value, int64_t count) {
  T lanes[kLanes];
  store(lanes, value);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

// Loads min(count, kLanes) elements, for count >= 1.
template <class T>
POP_INLINE Vec load_upto(const T* from, int64_t count) {
  return count >= kLanes ? load(from) : load_tail(from, count);
}

// The same of elements that are `step` apart.
template <class T>
POP_INLINE Vec load_upto(const T* from, int64_t count, int64_t step) {
  if (step == 1) return load_upto(from, count);
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < kLanes && i < count; ++i) lanes[i] = from[i * step];
  return load(lanes);
}

template <class T>
POP_INLINE void store_upto(T* to, Vec value, int64_t count) {
  if (count >= kLanes) {
    store(to, value);
  } else {
    store_tail(to, value, count);
  }
}

// Stores like store_upto and returns the stored values, rounded to the element type.
POP_INLINE Vec store_rounded(float* to, Vec value, int64_t count) {
  store_upto(to, value, count);
  return value;
}

POP_INLINE Vec store_rounded(BFloat16* to, Vec value, int64_t count) {
  const VecU32 bits = bf16_bits(value);
  if (count >= kLanes) {
    store_u16(to, bits);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i].bits = static_cast<uint16_t>(bits[i]);
  }
  return bf16_value<Vec>(bits);
}

POP_INLINE Vec store_rounded(Float16* to, Vec value, int64_t count) {
  store_upto(to, value, count);
  return load_upto(to, count);
}

// Adds the upper half of the lanes to the lower half until four are left.
POP_INLINE Quad fold_to_quad(Vec value) {
  Quad quads[kLanes / 4];
  __builtin_memcpy(quads, &value, sizeof(value));
  for (int width = kLanes / 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) quads[i] += quads[i + width];
  }
  return quads[0];
}

// The sum of the lanes, always in the same order.
POP_INLINE float sum_lanes(Vec value) {
  const Quad quad = fold_to_quad(value);
  return (quad[0] + quad[2]) + (quad[1] + quad[3]);
}

// The same sums for four vectors at once.
POP_INLINE Quad sum_lanes(const Vec (&values)[4]) {
  Quad pairs[2];
  for (int i = 0; i < 2; ++i) {
    const Quad a = fold_to_quad(values[2 * i]), b = fold_to_quad(values[2 * i + 1]);
    pairs[i] = __builtin_shuffle(a, b, QuadI32{0, 4, 1, 5}) + __builtin_shuffle(a, b, QuadI32{2, 6, 3, 7});
  }
  return __builtin_shuffle(pairs[0], pairs[1], QuadI32{0, 1, 4, 5}) +
         __builtin_shuffle(pairs[0], pairs[1], QuadI32{2, 3, 6, 7});
}

template <class V, int... Lane>
POP_INLINE void exchange(V& a, V& b, int step, std::integer_sequence<int, Lane...>) {
  const V before = a;
  a = __builtin_shuffle(before, b, VecI32{((Lane & step) == 0 ? Lane : Lane + kLanes - step)...});
  b = __builtin_shuffle(before, b, VecI32{((Lane & step) == 0 ? Lane + step : Lane + kLanes)...});
}

// Swaps the lanes of `a` whose index has the bit `step` with the lanes of `b` whose index has not.
template <class V>
POP_INLINE void exchange(V& a, V& b, int step) {
  exchange(a, b, step, std::make_integer_sequence<int, kLanes>{});
}

// Transposes kLanes rows of kLanes lanes.
template <class V>
POP_INLINE void transpose(V (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int step = kLanes / 2; step > 0; step /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & step) == 0) exchange(rows[i], rows[i + step], step);
    }
  }
}

POP_INLINE void store_one(float* to, float value) { *to = value; }
POP_INLINE void store_one(BFloat16* to, float value) { to->bits = static_cast<uint16_t>(bf16_bits(value)); }
POP_INLINE void store_one(Float16* to, float value) { to->bits = static_cast<uint16_t>(f16_bits(value)); }

// Calls `call(T{})` with the element type T of `dtype`.
template <class Call>
POP_INLINE void with_element(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::f32:
      return call(float{});
    case DType::bf16:
      return call(BFloat16{});
    case DType::f16:
      return call(Float16{});
  }
}

}  // namespace
}  // namespace pop::cpu::POP_ISA
