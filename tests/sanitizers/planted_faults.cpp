// Operators with a fault each, to show that a sanitizer reports it; only in libraries built with POP_SANITIZE.
// planted_faults.py calls each in a process of its own.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>

#include "cpu/kernels.h"
#include "cpu/torch_calls.h"

namespace pop {

namespace {

using torch::stable::Tensor;

int64_t unprotected = 0;

// Reads the element of float32 [n] `x` that follows its last.
double planted_over_read(const Tensor& x) {
  const volatile float* data = static_cast<const float*>(x.const_data_ptr());
  return data[x.numel()];
}

// Normalises a row of float32 [n] `x` with the kernel of this process's instruction set, as if x had n + 1 elements.
int64_t planted_kernel_over_read(Tensor x) {
  RmsNormParams params{};
  params.dtype = DType::f32;
  params.rows = 1;
  params.width = x.numel() + 1;
  params.x = x.mutable_data_ptr();
  params.x_stride = params.width;
  params.out_stride = params.width;
  params.eps = 1e-6f;
  float rstd = 0;
  params.rstd = &rstd;
  cpu::kernels().rms_norm(params, 0, 1);
  return rstd > 0 ? 1 : 0;
}

// Overflows the largest integer.
int64_t planted_overflow(int64_t addend) {
  const volatile int64_t largest = std::numeric_limits<int64_t>::max();
  return largest + addend;
}

// Counts without a lock, so that two threads that call it race.
int64_t planted_race(int64_t times) {
  volatile int64_t& counter = unprotected;
  for (int64_t i = 0; i < times; ++i) counter = counter + 1;
  return unprotected;
}

// The same by the threads of a parallel loop.
int64_t planted_race_of_workers(int64_t times) {
  cpu::parallel_for(0, 2, 1, [&](int64_t, int64_t) { planted_race(times); });
  return unprotected;
}

// Adds up times of the threads of a parallel loop, after the loop and without a fault.
int64_t planted_no_race(int64_t times) {
  int64_t sums[2] = {0, times};
  cpu::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] += times;
  });
  return sums[0] + sums[1];
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pop, m) {
  m.def("planted_over_read(Tensor x) -> float");
  m.def("planted_kernel_over_read(Tensor x) -> int");
  m.def("planted_overflow(int addend) -> int");
  m.def("planted_race(int times) -> int");
  m.def("planted_race_of_workers(int times) -> int");
  m.def("planted_no_race(int times) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(pop, CompositeExplicitAutograd, m) {
  m.impl("planted_over_read", TORCH_BOX(&planted_over_read));
  m.impl("planted_kernel_over_read", TORCH_BOX(&planted_kernel_over_read));
  m.impl("planted_overflow", TORCH_BOX(&planted_overflow));
  m.impl("planted_race", TORCH_BOX(&planted_race));
  m.impl("planted_race_of_workers", TORCH_BOX(&planted_race_of_workers));
  m.impl("planted_no_race", TORCH_BOX(&planted_no_race));
}

}  // namespace pop
