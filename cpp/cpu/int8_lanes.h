// Lanes of the int8 kernel (cpu/int8_gemm.cpp): loads of bytes, and the product of an instruction set.
#pragma once

#include "core/math.h"
#include "cpu/vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pop::cpu::POP_ISA {
namespace {

#if defined(POP_VNNI)
constexpr bool kVnni = true;
#else
constexpr bool kVnni = false;
#endif

constexpr int kGroup = kVnni ? 4 : 2;   // elements along k in the 32 bits of a lane
constexpr int kStep = kGroup * kLanes;  // elements along k of a vector

POP_INLINE VecU32 load_u32(const void* from) {
  VecU32 value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

POP_INLINE void store_u32(void* to, VecU32 value) { __builtin_memcpy(to, &value, sizeof(value)); }

POP_INLINE VecU32 splat_u32(uint32_t value) { return VecU32{} + value; }

// sum + the products of the kGroup elements in each lane.
POP_INLINE VecU32 dot(VecU32 sum, VecU32 a, VecU32 w) {
#if defined(POP_VNNI) && defined(__AVX512F__)
  return lane_cast<VecU32>(_mm512_dpbusd_epi32(lane_cast<__m512i>(sum), lane_cast<__m512i>(a), lane_cast<__m512i>(w)));
#elif defined(POP_VNNI)
  return lane_cast<VecU32>(
      _mm256_dpbusd_avx_epi32(lane_cast<__m256i>(sum), lane_cast<__m256i>(a), lane_cast<__m256i>(w)));
#elif defined(__AVX2__)
  return sum + lane_cast<VecU32>(_mm256_madd_epi16(lane_cast<__m256i>(a), lane_cast<__m256i>(w)));
#else
  const auto low = [](VecU32 pair) { return lane_cast<VecI32>(pair << 16) >> 16; };
  const auto high = [](VecU32 pair) { return lane_cast<VecI32>(pair) >> 16; };
  return sum + lane_cast<VecU32>(low(a) * low(w) + high(a) * high(w));
#endif
}

// kLanes groups of a row of w as dot() reads them, zero beyond `count` elements.
POP_INLINE VecU32 load_w(const int8_t* from, int64_t count) {
  int8_t bytes[kStep] = {};
  if (count < kStep) {
    for (int64_t i = 0; i < count; ++i) bytes[i] = from[i];
    from = bytes;
  }
#if defined(POP_VNNI)
  return load_u32(from);
#elif defined(__AVX2__)
  return lane_cast<VecU32>(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  int16_t wide[kStep];
  for (int i = 0; i < kStep; ++i) wide[i] = from[i];
  return load_u32(wide);
#endif
}

// The same of a row of a. dot() reads its bytes as unsigned ones, AMX as signed ones.
template <bool Unsigned = kVnni>
POP_INLINE VecU32 load_a(const int8_t* from, int64_t count) {
  const VecU32 signed_elements = load_w(from, count);
  return Unsigned ? signed_elements ^ splat_u32(0x80808080u) : signed_elements;
}

}  // namespace
}  // namespace pop::cpu::POP_ISA
