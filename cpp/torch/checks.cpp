#include "torch/checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "torch/aten.h"
#include "torch/overlaps.h"

namespace pop {

namespace {

// True if all elements lie in memory that the tensor has. A storage may have been freed or shrunk under it.
bool has_memory(const Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  int64_t bytes = 0, offset = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset));
  const int64_t needed = (offset + elements_spanned(tensor)) * static_cast<int64_t>(tensor.element_size());
  return needed <= bytes && tensor.const_data_ptr() != nullptr;
}

}  // namespace

void check_tensor(const Tensor& tensor, const std::string& name) {
  check(tensor.defined(), name, ": expected a tensor, got None");  // None in Python arrives as an undefined tensor
  check(tensor.layout() == torch::headeronly::Layout::Strided, name,
        ": expected a dense tensor, got a sparse one or one in the layout of a library");
  if (!tensor.is_cpu() && !tensor.is_cuda()) return;  // whoever reads it refuses its device
  check(has_memory(tensor), name, ": expected a tensor with memory for its elements, got shape ", shape_of(tensor),
        " over a storage without (freed, shrunk, or lazily zero)");
}

void check_resolved(const Tensor& tensor, const std::string& name) {
  check_tensor(tensor, name);
  check(!aten::is_neg(tensor), name,
        ": expected resolved values, got a lazily negated tensor (pass resolve_neg() of it)");
}

std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += join(d == 0 ? "" : ", ", tensor.size(d));
  return text + "]";
}

std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return join("cuda:", tensor.get_device_index());
  return tensor.device().type() == torch::headeronly::DeviceType::Meta ? "meta" : "another kind of device";
}

ScalarType type_of(const Tensor& tensor) {
  try {
    return tensor.scalar_type();
  } catch (const std::exception&) {  // torch's headers throw for those that they do not know, as of quantised tensors
    return ScalarType::Undefined;
  }
}

std::string dtype_name(const Tensor& tensor) {
  switch (type_of(tensor)) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

DType dtype_of(const Tensor& tensor, const std::string& name) {
  check_tensor(tensor, name);
  switch (type_of(tensor)) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      throw std::runtime_error(join(name, ": expected float32, bfloat16 or float16, got ", dtype_name(tensor)));
  }
}

void check_dtype(const Tensor& tensor, DType dtype, const std::string& name) {
  const DType actual = dtype_of(tensor, name);
  check(actual == dtype, name, ": expected dtype ", to_string(dtype), ", got ", to_string(actual));
}

void check_same_device(const Tensor& tensor, const Tensor& like, const std::string& name) {
  check_tensor(tensor, name);
  const bool same = tensor.is_cpu() == like.is_cpu() && tensor.get_device_index() == like.get_device_index();
  check(same, name, ": expected device ", device_of(like), " like the rest of the call, got ", device_of(tensor));
}

void check_like(const Tensor& tensor, const Tensor& like, const std::string& name) {
  check_dtype(tensor, dtype_of(like, name), name);
  check_same_device(tensor, like, name);
}

void check_shape(const Tensor& tensor, const std::vector<int64_t>& shape, const std::string& name) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (int64_t d = 0; same && d < tensor.dim(); ++d) same = shape[d] == -1 || tensor.size(d) == shape[d];
  if (same) return;
  std::string expected;
  for (size_t d = 0; d < shape.size(); ++d) {
    expected += join(d == 0 ? "" : ", ", shape[d] == -1 ? "*" : to_text(shape[d]));
  }
  throw std::runtime_error(join(name, ": expected shape [", expected, "], got ", shape_of(tensor)));
}

void check_head_dim(int64_t head_dim, const std::string& name) {
  check(head_dim >= kHeadDimStep && head_dim <= kMaxHeadDim && head_dim % kHeadDimStep == 0, name,
        ": expected a head_dim that is a multiple of ", kHeadDimStep, " up to ", kMaxHeadDim, ", got ", head_dim);
}

void check_last_dim_contiguous(const Tensor& tensor, const std::string& name) {
  const int64_t last = tensor.dim() - 1;
  check(last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1, name,
        ": expected a contiguous last dimension (stride 1), got stride ", last < 0 ? 1 : tensor.stride(last));
}

const void* optional_vector(const std::optional<Tensor>& tensor, const Tensor& like, int64_t width,
                            const std::string& name) {
  if (!tensor.has_value()) return nullptr;
  check_like(*tensor, like, name);
  check_shape(*tensor, {width}, name);
  check_last_dim_contiguous(*tensor, name);
  return tensor->const_data_ptr();
}

std::vector<int64_t> read_lengths(const Tensor& tensor, int64_t count, const std::string& name) {
  check_tensor(tensor, name);
  check(tensor.is_cpu(), name, ": expected a tensor on the CPU (the operator never synchronises), got ",
        device_of(tensor));
  check(type_of(tensor) == ScalarType::Int, name, ": expected dtype int32, got ", dtype_name(tensor));
  check_shape(tensor, {count}, name);
  const int32_t* data = static_cast<const int32_t*>(tensor.const_data_ptr());
  const int64_t stride = count > 1 ? tensor.stride(0) : 1;
  std::vector<int64_t> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = data[i * stride];
  return values;
}

}  // namespace pop
