// For tests only: vpdpbusd in plain C++, of vectors of any width.
#pragma once

#include <cstddef>
#include <cstdint>

namespace {

// Each lane of `sum`, modulo 2^32, plus the products of its four unsigned bytes of `a` and signed bytes of `w`.
template <class Vector>
inline Vector emulated_vpdpbusd(Vector sum, Vector a, Vector w) {
  uint32_t sums[sizeof(Vector) / 4];
  uint8_t unsigned_bytes[sizeof(Vector)];
  int8_t signed_bytes[sizeof(Vector)];
  __builtin_memcpy(sums, &sum, sizeof(sum));
  __builtin_memcpy(unsigned_bytes, &a, sizeof(a));
  __builtin_memcpy(signed_bytes, &w, sizeof(w));
  for (std::size_t i = 0; i < sizeof(Vector); ++i) {
    sums[i / 4] += static_cast<uint32_t>(unsigned_bytes[i] * signed_bytes[i]);
  }
  __builtin_memcpy(&sum, sums, sizeof(sum));
  return sum;
}

}  // namespace
