// POP_HD marks inline functions that the CPU and the CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define POP_HD __host__ __device__ __forceinline__
#else
#define POP_HD inline __attribute__((always_inline))
#endif
