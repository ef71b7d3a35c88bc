// Registers an operator's kernels under the dispatch keys of all devices and layouts.
#pragma once

#include <torch/csrc/stable/library.h>

#if defined(POP_WITH_CUDA)
#define POP_IMPL_ON_CUDA(implement)                                  \
  STABLE_TORCH_LIBRARY_IMPL(pop, CUDA, m) { implement(m); }          \
  STABLE_TORCH_LIBRARY_IMPL(pop, SparseCUDA, m) { implement(m); }    \
  STABLE_TORCH_LIBRARY_IMPL(pop, SparseCsrCUDA, m) { implement(m); } \
  STABLE_TORCH_LIBRARY_IMPL(pop, QuantizedCUDA, m) { implement(m); }
#else
#define POP_IMPL_ON_CUDA(implement)
#endif

// `implement` takes a library and adds kernels to it. They get tensors of other layouts, too, to refuse them by name.
#define POP_IMPL_ON_DEVICES(implement)                              \
  STABLE_TORCH_LIBRARY_IMPL(pop, CPU, m) { implement(m); }          \
  STABLE_TORCH_LIBRARY_IMPL(pop, SparseCPU, m) { implement(m); }    \
  STABLE_TORCH_LIBRARY_IMPL(pop, SparseCsrCPU, m) { implement(m); } \
  STABLE_TORCH_LIBRARY_IMPL(pop, MkldnnCPU, m) { implement(m); }    \
  STABLE_TORCH_LIBRARY_IMPL(pop, QuantizedCPU, m) { implement(m); } \
  POP_IMPL_ON_CUDA(implement)
