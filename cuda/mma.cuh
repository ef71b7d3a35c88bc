// mma.sync, the product of a warp on the tensor cores (compute capability 8.0 and up). The CPU shim uses
// tests/gpu/cuda_shim/mma_emulated.h instead of this file.
#pragma once

#include "cuda/elements.cuh"

namespace pop::cuda {

// "mma.sync.m16n8k16": c += a . b in fp32, a [16, 16] and b [16, 8]. Lane l = 4 g + q has
//   a: words 0, 1: k = 2 q and 2 q + 1 of rows g and g + 8; words 2, 3: the same rows at k + 8
//   b: word 0: k = 2 q and 2 q + 1 of column g; word 1: the same column at k + 8
//   c: 0, 1: columns 2 q and 2 q + 1 of row g; 2, 3: of row g + 8
template <class T>
__device__ __forceinline__ void multiply_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace pop::cuda
