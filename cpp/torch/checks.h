// Checks of operator arguments. Each throws std::runtime_error (Python: RuntimeError) whose text names the operator,
// the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "backend/params.h"
#include "core/text.h"

namespace pop {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Args>
void check(bool ok, const Args&... message) {
  if (!ok) throw std::runtime_error(join(message...));
}

std::string shape_of(const Tensor& tensor);  // "[2, 8, 64]"
std::string device_of(const Tensor& tensor);
ScalarType type_of(const Tensor& tensor);                       // Undefined for one that torch's headers do not know
std::string dtype_name(const Tensor& tensor);                   // "int64"
DType dtype_of(const Tensor& tensor, const std::string& name);  // float32, bfloat16 or float16

// Not None, dense, and with memory for its elements if it is on a device that has memory.
void check_tensor(const Tensor& tensor, const std::string& name);
// The same, and not lazily negated. torch resolves that for every kind of argument but Tensor[]?.
void check_resolved(const Tensor& tensor, const std::string& name);
void check_dtype(const Tensor& tensor, DType dtype, const std::string& name);
void check_same_device(const Tensor& tensor, const Tensor& like, const std::string& name);
void check_like(const Tensor& tensor, const Tensor& like, const std::string& name);  // same dtype, same device
// `shape`: -1 accepts any size.
void check_shape(const Tensor& tensor, const std::vector<int64_t>& shape, const std::string& name);
void check_head_dim(int64_t head_dim, const std::string& name);  // supported by attention
void check_last_dim_contiguous(const Tensor& tensor, const std::string& name);

// The data of a vector [width] with the dtype and device of `like`; null if there is no tensor.
const void* optional_vector(const std::optional<Tensor>& tensor, const Tensor& like, int64_t width,
                            const std::string& name);

// Reads an int32 tensor in host memory.
std::vector<int64_t> read_lengths(const Tensor& tensor, int64_t count, const std::string& name);

}  // namespace pop
