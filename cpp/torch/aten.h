// The aten operators that this library calls itself, each under the schema it was written against.
// (Those behind torch/csrc/stable/ops.h are torch's own to keep: the wrappers pass the version they
// were built with, and torch adapts the call.)
//
// The dispatcher passes no argument count: an operator that gained an argument in another torch
// would read past the stack, silently. `kSchemas` is what Python compares with the running torch
// at import (python/pop_ext/operators.py).
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "backend.h"

namespace pop::aten {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr const char* kSchemas =
    "aten::mm.out(Tensor self, Tensor mat2, *, Tensor(a!) out) -> Tensor(a!)\n"
    "aten::mul.Tensor(Tensor self, Tensor other) -> Tensor\n"
    "aten::detach(Tensor(a) self) -> Tensor(a)";

// Why the latest call of this thread failed. Part of torch's C shim from 2.13 on: looked up, not linked.
inline const char* last_error() {
  using What = const char* (*)();
  static const auto what = reinterpret_cast<What>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return what == nullptr ? "failed; torch wrote the reason to stderr" : what();
}

// Operators whose schema in the running torch is another: name and overload -> why they are not called.
class Disabled {
 public:
  void add(const std::string& name, const std::string& reason) {
    std::lock_guard lock(mutex_);
    reasons_[name] = reason;
    any_ = true;
  }

  // Empty where `name` may be called.
  std::string reason(const std::string& name) const {
    if (!any_) return "";
    std::lock_guard lock(mutex_);
    const auto found = reasons_.find(name);
    return found == reasons_.end() ? "" : found->second;
  }

 private:
  std::atomic<bool> any_ = false;
  mutable std::mutex mutex_;
  std::map<std::string, std::string> reasons_;
};

inline Disabled& disabled() {
  static Disabled instance;
  return instance;
}

inline void disable(const std::string& name, const std::string& reason) { disabled().add(name, reason); }

template <size_t N>
inline Tensor call(const char* name, const char* overload, std::array<StableIValue, N> stack) {
  const std::string qualified = *overload == 0 ? std::string(name) : std::string(name) + "." + overload;
  if (const std::string reason = disabled().reason(qualified); !reason.empty()) {
    throw std::runtime_error(qualified + ": disabled: " + reason);
  }
  if (torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION) != 0) {
    throw std::runtime_error(qualified + ": " + last_error());
  }
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline void mm_out(const Tensor& self, const Tensor& mat2, const Tensor& out) {
  using torch::stable::detail::from;
  call("aten::mm", "out", std::array{from(self), from(mat2), from(out)});
}

inline Tensor mul(const Tensor& self, const Tensor& other) {
  using torch::stable::detail::from;
  return call("aten::mul", "Tensor", std::array{from(self), from(other)});
}

inline Tensor detach(const Tensor& self) {
  return call("aten::detach", "", std::array{torch::stable::detail::from(self)});
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

// out = a . w^T on `device`, by the library behind aten's matmul.
inline void matmul_nt(const GemmParams& p, torch::stable::Device device) {
  const ScalarType dtype = scalar_type(p.dtype);
  const auto view = [&](const void* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
    return torch::stable::from_blob(const_cast<void*>(data), {rows, cols}, {row_stride, col_stride}, device, dtype);
  };
  mm_out(view(p.a, p.m, p.k, p.a_stride, 1), view(p.w, p.k, p.n, 1, p.w_stride),
         view(p.out, p.m, p.n, p.out_stride, 1));
}

}  // namespace pop::aten
