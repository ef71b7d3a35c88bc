// Replaces cuda/mma.cuh under the CPU shim: the same function, emulated as the PTX ISA describes it ("Matrix Fragments
// for mma.m16n8k16 with floating point type").
#pragma once

#include "cuda/elements.cuh"

namespace pop::cuda {

template <class T>
void multiply_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct A {
    uint32_t words[4];
  } own_a;
  struct B {
    uint32_t words[2];
  } own_b;
  std::memcpy(own_a.words, a, sizeof(a));
  std::memcpy(own_b.words, b, sizeof(b));
  const auto value = [](uint32_t word, int odd) { return to_float(T{static_cast<uint16_t>(word >> 16 * odd)}); };
  const unsigned lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  float rows[2][16], columns[2][16];
  for (unsigned p = 0; p < 4; ++p) {
    const A from = cuda_shim::shuffle(own_a, 4 * g + p);
    for (int word = 0; word < 4; ++word) {
      for (int odd = 0; odd < 2; ++odd) rows[word % 2][2 * p + odd + 8 * (word / 2)] = value(from.words[word], odd);
    }
  }
  for (unsigned column = 0; column < 2; ++column) {
    for (unsigned p = 0; p < 4; ++p) {
      const B from = cuda_shim::shuffle(own_b, 4 * (2 * q + column) + p);
      for (int word = 0; word < 2; ++word) {
        for (int odd = 0; odd < 2; ++odd) columns[column][2 * p + odd + 8 * word] = value(from.words[word], odd);
      }
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) c[i] += rows[i / 2][k] * columns[i % 2][k];
  }
}

}  // namespace pop::cuda
