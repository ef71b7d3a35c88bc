// Vector arithmetic of attention: the exponential, and the two kinds of products.
#pragma once

#include "vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pop::cpu::POP_ISA {
namespace {

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

// The tile path multiplies in units of 32 bits. A unit of one operand is broadcast; the other operand is a vector with
// one unit for each of kLanes query rows.
struct FloatUnits {
  static constexpr int kDepth = 1;       // elements of the summed dimension in a unit
  static constexpr bool kTiles = false;  // products run in tiles of AMX (attention_amx.h)
  static constexpr int kExpDegree = 5;

  static POP_INLINE Vec broadcast(const float* unit) { return splat(*unit); }
  static POP_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) { return a * b + sum; }

  // Stores a row of units of probabilities from kDepth keys.
  static POP_INLINE void store_units(float* to, const Vec* keys) { store(to, *keys); }
};

#if defined(__AVX512BF16__)
// A unit is two bfloat16 that are adjacent along the summed dimension.
struct PairUnits {
  static constexpr int kDepth = 2;
  static constexpr bool kTiles = false;
  static constexpr int kExpDegree = 3;

  static POP_INLINE Vec broadcast(const float* unit) { return splat(*unit); }
  static POP_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

  static POP_INLINE void store_units(float* to, const Vec* keys) {
    const Vec halves = (Vec)_mm512_cvtne2ps_pbh(keys[1], keys[0]);
    store(to, (Vec)_mm512_permutexvar_epi16(indices(0, 16), (__m512i)halves));
  }

  // Pairs of the first and of the last 16 elements of two rows.
  static POP_INLINE Vec interleave_low(Vec a, Vec b) {
    return (Vec)_mm512_permutex2var_epi16((__m512i)a, indices(0, 32), (__m512i)b);
  }
  static POP_INLINE Vec interleave_high(Vec a, Vec b) {
    return (Vec)_mm512_permutex2var_epi16((__m512i)a, indices(16, 48), (__m512i)b);
  }

 private:
  // first, second, first + 1, second + 1, ...
  static POP_INLINE __m512i indices(uint32_t first, uint32_t second) {
    const VecU32 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (__m512i)((lane + first) | (lane + second) << 16);
  }
};
#endif

}  // namespace
}  // namespace pop::cpu::POP_ISA
