// Calls of those operators of torch/foreign_ops.h that every backend needs.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <stdexcept>
#include <string>

#include "backend/params.h"
#include "torch/foreign_ops.h"

namespace pop::aten {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The reason why the latest call of this thread failed. It is part of torch's C shim from 2.13 on, so it is looked up,
// not linked.
inline const char* last_error() {
  using What = const char* (*)();
  static const auto what = reinterpret_cast<What>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return what == nullptr ? "failed; torch wrote the reason to stderr" : what();
}

// Writes the results over the arguments: `stack` has the length of the longer of the two.
template <size_t N>
void call(const char* name, const char* overload, std::array<StableIValue, N>& stack) {
  if (torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION) != 0) {
    throw std::runtime_error(std::string(name) + (*overload == 0 ? "" : ".") + overload + ": " + last_error());
  }
}

template <size_t N>
Tensor call_for_tensor(const char* name, const char* overload, std::array<StableIValue, N> stack) {
  foreign::require(*overload == 0 ? std::string(name) : std::string(name) + "." + overload);
  call(name, overload, stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline void mm_out(const Tensor& self, const Tensor& mat2, const Tensor& out) {
  using torch::stable::detail::from;
  call_for_tensor("aten::mm", "out", std::array{from(self), from(mat2), from(out)});
}

inline Tensor mul(const Tensor& self, const Tensor& other) {
  using torch::stable::detail::from;
  return call_for_tensor("aten::mul", "Tensor", std::array{from(self), from(other)});
}

inline Tensor detach(const Tensor& self) {
  return call_for_tensor("aten::detach", "", std::array{torch::stable::detail::from(self)});
}

inline Tensor resolve_neg(const Tensor& self) {
  return call_for_tensor("aten::resolve_neg", "", std::array{torch::stable::detail::from(self)});
}

inline bool is_neg(const Tensor& self) {
  foreign::require("aten::is_neg");
  std::array stack{torch::stable::detail::from(self)};
  call("aten::is_neg", "", stack);
  return torch::stable::detail::to<bool>(stack[0]);
}

inline ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return ScalarType::Float;
    case DType::bf16:
      return ScalarType::BFloat16;
    case DType::f16:
      return ScalarType::Half;
  }
  throw std::invalid_argument("DType: expected f32, bf16 or f16");
}

// A view of rows in host memory, `stride` elements apart.
inline Tensor host_matrix(DType dtype, const void* data, int64_t rows, int64_t columns, int64_t stride) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(const_cast<void*>(data), {rows, columns}, {stride, 1}, cpu, scalar_type(dtype));
}

inline void scaled_mm_out(const Tensor& self, const Tensor& mat2, const Tensor& scale_a, const Tensor& scale_b,
                          ScalarType out_dtype, bool use_fast_accum, const Tensor& out) {
  using torch::stable::detail::from;
  const std::optional<Tensor> none;
  call_for_tensor("aten::_scaled_mm", "out",
                  std::array{from(self), from(mat2), from(scale_a), from(scale_b), from(none), from(none),
                             from(std::optional(out_dtype)), from(use_fast_accum), from(out)});
}

// For each group g: rows [offs[g - 1], offs[g]) of self [rows, k] times mat2[g], of [groups, k, n].
inline Tensor grouped_mm(const Tensor& self, const Tensor& mat2, const Tensor& offs) {
  using torch::stable::detail::from;
  return call_for_tensor(
      "aten::_grouped_mm", "",
      std::array{from(self), from(mat2), from(std::optional(offs)), from(std::nullopt), from(std::nullopt)});
}

inline Tensor matrix_view(const void* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                          torch::stable::Device device, ScalarType dtype) {
  return torch::stable::from_blob(const_cast<void*>(data), {rows, columns}, {row_stride, column_stride}, device, dtype);
}

// The matrices of a product as views of the caller's memory: out [m, n] = a [m, k] . w [k, n].
struct MatmulOperands {
  MatmulOperands(const GemmParams& p, torch::stable::Device device)
      : dtype(scalar_type(p.dtype)),
        operand(p.products == Products::plain ? dtype : ScalarType::Float8_e4m3fn),
        a(matrix_view(p.a, p.m, p.k, p.a_stride, 1, device, operand)),
        w(p.w_transposed ? matrix_view(p.w, p.k, p.n, p.w_stride, 1, device, operand)
                         : matrix_view(p.w, p.k, p.n, 1, p.w_stride, device, operand)),
        out(matrix_view(p.out, p.m, p.n, p.out_stride, 1, device, dtype)) {}

  ScalarType dtype, operand;
  Tensor a, w, out;
};

// The product of GemmParams on `device`, by the library that aten's matmul uses. Not for `accumulate`.
inline void matmul(const GemmParams& p, torch::stable::Device device) {
  const MatmulOperands operands(p, device);
  const ScalarType dtype = operands.dtype;
  const Tensor &a = operands.a, &w = operands.w, &out = operands.out;
  if (p.products == Products::plain) return mm_out(a, w, out);
  const Tensor a_scale = matrix_view(p.a_scale, p.m, 1, 1, 1, device, ScalarType::Float);
  const Tensor w_scale = matrix_view(p.w_scale, 1, p.n, p.n, 1, device, ScalarType::Float);
  // The kernel for compute capability 8.9 assumes that the rows of its result are adjacent.
  Tensor to = p.out_stride == p.n ? out : torch::stable::new_empty(out, {p.m, p.n});
  scaled_mm_out(a, w, a_scale, w_scale, dtype, true, to);
  if (p.out_stride != p.n) {
    Tensor place = out;
    torch::stable::copy_(place, to);
  }
}

}  // namespace pop::aten
