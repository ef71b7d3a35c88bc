// Arithmetic of attention on vectors: exponential, and the two kinds of products it multiplies with.
#pragma once

#include "vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pop::cpu::POP_ISA {
namespace {

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

// 2^x for x < 128: 0 below -126.5, NaN for NaN. Relative error 7.5e-5 with kDegree 3, a fiftieth of a
// bfloat16's last place, and 2e-7 with kDegree 5. Polynomials: least maximum relative error on [-1/2, 1/2].
template <int kDegree>
POP_INLINE Vec exp2(Vec x) {
  // Adding 1.5 * 2^23 rounds to an integer n and leaves it in the low bits; the 127 on top is the
  // exponent's bias, so that a shift by 23 makes 2^n, and 0 for n = -127.
  const Vec magic = splat(12582912.0f + 127.0f);
  x = max(splat(-127.0f), x);
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  Vec p;
  if constexpr (kDegree == 3) {
    p = splat(0.05517166f) * f + splat(0.24261112f);
    p = p * f + splat(0.69326099f);
    p = p * f + splat(0.99992807f);
  } else {
    p = splat(0.00132765f) * f + splat(0.00967554f);
    p = p * f + splat(0.05550713f);
    p = p * f + splat(0.2402212f);
    p = p * f + splat(0.69314697f);
    p = p * f + splat(1.00000007f);
  }
  return p * (Vec)((VecU32)shifted << 23);
}

// Rows become columns.
POP_INLINE void transpose(Vec (&rows)[kLanes]) {
  VecI32 lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    // Rows `step` apart swap: the lanes with that bit of the upper row, those without of the lower.
    const VecI32 upper = (lane & step) == 0 ? lane : lane + (kLanes - step);
    const VecI32 lower = (lane & step) == 0 ? lane + step : lane + kLanes;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & step) != 0) continue;
      const Vec a = rows[i], b = rows[i + step];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i + step] = __builtin_shuffle(a, b, lower);
    }
  }
}

// The tile path multiplies in units of 32 bits: a unit of one operand is broadcast, the other operand
// holds a unit of kLanes query rows in a vector.
struct FloatUnits {
  static constexpr int kDepth = 1;  // elements of the summed dimension in a unit
  static constexpr int kExpDegree = 5;

  static POP_INLINE Vec broadcast(const float* unit) {
    return splat(*unit);
  }
  static POP_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) { return a * b + sum; }

  // One row of probabilities from kDepth keys.
  static POP_INLINE void store_units(float* to, const Vec* keys) { store(to, *keys); }
};

#if defined(__AVX512BF16__)
// Two bfloat16 that are neighbours along the summed dimension.
struct PairUnits {
  static constexpr int kDepth = 2;
  static constexpr int kExpDegree = 3;

  static POP_INLINE Vec broadcast(const float* unit) {
    return splat(*unit);
  }
  static POP_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }

  static POP_INLINE void store_units(float* to, const Vec* keys) {
    // Lane i of the two keys become the neighbours 2i and 2i + 1.
    const __m512i interleave =
        (__m512i)(VecU32){0x00100000, 0x00110001, 0x00120002, 0x00130003, 0x00140004, 0x00150005,
                          0x00160006, 0x00170007, 0x00180008, 0x00190009, 0x001a000a, 0x001b000b,
                          0x001c000c, 0x001d000d, 0x001e000e, 0x001f000f};
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(keys[1], keys[0]);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(interleave, halves));
  }
};
#endif

}  // namespace
}  // namespace pop::cpu::POP_ISA
