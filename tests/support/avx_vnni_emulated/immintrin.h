// For tests only: found before the compiler's header, it gives the AVX-VNNI kernel of cpp/cpu/int8_gemm.cpp its one
// instruction beyond AVX2 in plain C++ (POP_EMULATE_AVX512).
#pragma once

#include_next <immintrin.h>

#include <cstdint>

namespace avx_vnni_emulated {

inline __m256i dpbusd(__m256i sum, __m256i a, __m256i w) {
  uint32_t sums[8];
  uint8_t unsigned_bytes[32];
  int8_t signed_bytes[32];
  __builtin_memcpy(sums, &sum, 32);
  __builtin_memcpy(unsigned_bytes, &a, 32);
  __builtin_memcpy(signed_bytes, &w, 32);
  for (int i = 0; i < 32; ++i) sums[i / 4] += static_cast<uint32_t>(unsigned_bytes[i] * signed_bytes[i]);
  __builtin_memcpy(&sum, sums, 32);
  return sum;
}

}  // namespace avx_vnni_emulated

#define _mm256_dpbusd_avx_epi32 avx_vnni_emulated::dpbusd
