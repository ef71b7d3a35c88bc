// For tests only: found before the compiler's header, it gives the AVX-512 kernels of cpp/cpu the few intrinsics that
// they use, in plain C++, so that they run, slowly, on any x86-64 processor. CMakeLists.txt defines __AVX512F__ and
// __AVX512BF16__ by hand (POP_EMULATE_AVX512). A kernel that uses another intrinsic does not compile.
#pragma once

#include <cstdint>

#include "../emulated_amx.h"
#include "../emulated_vpdpbusd.h"

using __m512 = float __attribute__((vector_size(64), may_alias));
using __m512i = long long __attribute__((vector_size(64), may_alias));
using __m512bh = short __attribute__((vector_size(64), may_alias));
using __m128i = long long __attribute__((vector_size(16), may_alias));
using __m256i = long long __attribute__((vector_size(32), may_alias));
using __mmask16 = unsigned short;

#define _MM_FROUND_TO_NEAREST_INT 0

namespace avx512_emulated {

using Bytes = int8_t __attribute__((vector_size(16)));
using Words = uint16_t __attribute__((vector_size(64)));
using HalfWords = uint16_t __attribute__((vector_size(32)));
using Ints = uint32_t __attribute__((vector_size(64)));

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T>
inline T read(const void* from) {
  T value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

inline float widen(uint16_t bfloat16) { return bits<float>(static_cast<uint32_t>(bfloat16) << 16); }

// Rounds to nearest, ties to even; a NaN stays a NaN.
inline uint16_t narrow(float value) {
  const uint32_t word = bits<uint32_t>(value);
  if (value != value) return static_cast<uint16_t>((word >> 16) | 0x40u);
  return static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

}  // namespace avx512_emulated

inline __m128i _mm_loadu_si128(const __m128i* from) { return avx512_emulated::read<__m128i>(from); }
inline __m256i _mm256_loadu_si256(const __m256i* from) { return avx512_emulated::read<__m256i>(from); }
inline void _mm_storeu_si128(__m128i* to, __m128i value) { __builtin_memcpy(to, &value, sizeof(value)); }
inline void _mm256_storeu_si256(__m256i* to, __m256i value) { __builtin_memcpy(to, &value, sizeof(value)); }
inline __m512i _mm512_loadu_si512(const void* from) { return avx512_emulated::read<__m512i>(from); }

inline __m512i _mm512_maskz_cvtepi8_epi32(__mmask16 mask, __m128i from) {
  const auto bytes = avx512_emulated::bits<avx512_emulated::Bytes>(from);
  avx512_emulated::Ints out;
  for (int i = 0; i < 16; ++i) out[i] = mask >> i & 1 ? static_cast<uint32_t>(static_cast<int32_t>(bytes[i])) : 0;
  return avx512_emulated::bits<__m512i>(out);
}

inline __m512i _mm512_maskz_cvtepu16_epi32(__mmask16 mask, __m256i from) {
  const auto words = avx512_emulated::bits<avx512_emulated::HalfWords>(from);
  avx512_emulated::Ints out;
  for (int i = 0; i < 16; ++i) out[i] = mask >> i & 1 ? words[i] : 0;
  return avx512_emulated::bits<__m512i>(out);
}

inline __m256i _mm512_maskz_cvtepi32_epi16(__mmask16 mask, __m512i from) {
  const auto ints = avx512_emulated::bits<avx512_emulated::Ints>(from);
  avx512_emulated::HalfWords out;
  for (int i = 0; i < 16; ++i) out[i] = mask >> i & 1 ? static_cast<uint16_t>(ints[i]) : 0;
  return avx512_emulated::bits<__m256i>(out);
}

inline __m128i _mm512_maskz_cvtepi32_epi8(__mmask16 mask, __m512i from) {
  const auto ints = avx512_emulated::bits<avx512_emulated::Ints>(from);
  avx512_emulated::Bytes out;
  for (int i = 0; i < 16; ++i) out[i] = mask >> i & 1 ? static_cast<int8_t>(ints[i]) : 0;
  return avx512_emulated::bits<__m128i>(out);
}

inline __m512 _mm512_maskz_cvtph_ps(__mmask16 mask, __m256i from) {
  const auto words = avx512_emulated::bits<avx512_emulated::HalfWords>(from);
  __m512 out;
  for (int i = 0; i < 16; ++i) {
    out[i] = mask >> i & 1 ? static_cast<float>(avx512_emulated::bits<_Float16>(static_cast<uint16_t>(words[i]))) : 0;
  }
  return out;
}

inline __m256i _mm512_maskz_cvtps_ph(__mmask16 mask, __m512 from, int /*rounding: to the nearest*/) {
  avx512_emulated::HalfWords out;
  for (int i = 0; i < 16; ++i) {
    out[i] = mask >> i & 1 ? avx512_emulated::bits<uint16_t>(static_cast<_Float16>(from[i])) : 0;
  }
  return avx512_emulated::bits<__m256i>(out);
}

// Returns the second operand if one of them is a NaN, as the instruction does.
inline __m512 _mm512_maskz_max_ps(__mmask16 mask, __m512 a, __m512 b) {
  __m512 out;
  for (int i = 0; i < 16; ++i) out[i] = mask >> i & 1 ? (a[i] > b[i] ? a[i] : b[i]) : 0;
  return out;
}

inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const auto x = avx512_emulated::bits<avx512_emulated::Words>(a), y = avx512_emulated::bits<avx512_emulated::Words>(b);
  for (int i = 0; i < 16; ++i) {
    sum[i] += avx512_emulated::widen(x[2 * i + 1]) * avx512_emulated::widen(y[2 * i + 1]);
    sum[i] += avx512_emulated::widen(x[2 * i]) * avx512_emulated::widen(y[2 * i]);
  }
  return sum;
}

// `b` is the lower half of the result.
inline __m512bh _mm512_cvtne2ps_pbh(__m512 a, __m512 b) {
  avx512_emulated::Words out;
  for (int i = 0; i < 16; ++i) {
    out[i] = avx512_emulated::narrow(b[i]);
    out[16 + i] = avx512_emulated::narrow(a[i]);
  }
  return avx512_emulated::bits<__m512bh>(out);
}

inline __m512i _mm512_permutexvar_epi16(__m512i indices, __m512i from) {
  const auto which = avx512_emulated::bits<avx512_emulated::Words>(indices);
  const auto words = avx512_emulated::bits<avx512_emulated::Words>(from);
  avx512_emulated::Words out;
  for (int i = 0; i < 32; ++i) out[i] = words[which[i] & 31];
  return avx512_emulated::bits<__m512i>(out);
}

inline __m512i _mm512_permutex2var_epi16(__m512i a, __m512i indices, __m512i b) {
  const auto which = avx512_emulated::bits<avx512_emulated::Words>(indices);
  const auto low = avx512_emulated::bits<avx512_emulated::Words>(a),
             high = avx512_emulated::bits<avx512_emulated::Words>(b);
  avx512_emulated::Words out;
  for (int i = 0; i < 32; ++i) out[i] = which[i] & 32 ? high[which[i] & 31] : low[which[i] & 31];
  return avx512_emulated::bits<__m512i>(out);
}

inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i w) { return emulated_vpdpbusd(sum, a, w); }
