#include "torch/checks.h"

#include <algorithm>
#include <array>

#include "torch/aten.h"

namespace pop {

namespace {

struct Extent {
  int64_t begin;  // bytes
  int64_t end;
  size_t index;
};

struct Dim {
  int64_t stride;  // bytes
  int64_t size;
};

std::vector<Dim> dims_of(const Tensor& tensor, int64_t element) {
  std::vector<Dim> dims;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) dims.push_back({tensor.stride(d) * element, tensor.size(d)});
  }
  std::sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) { return a.stride > b.stride; });
  return dims;
}

// True if distance = sum of d_i * stride_i has a solution with |d_i| < size_i. Two views with these strides and that
// distance then share an element.
bool reachable(const std::vector<Dim>& dims, size_t first, int64_t distance) {
  if (first == dims.size()) return distance == 0;
  const Dim& dim = dims[first];
  const int64_t quotient = distance / dim.stride;
  for (int64_t steps = quotient - 1; steps <= quotient + 1; ++steps) {
    if (std::abs(steps) < dim.size && reachable(dims, first + 1, distance - steps * dim.stride)) return true;
  }
  return false;
}

bool same_strides(const std::vector<Dim>& a, const std::vector<Dim>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const Dim& x, const Dim& y) { return x.stride == y.stride && x.size == y.size; });
}

}  // namespace

// None in Python arrives as an undefined tensor.
void check_given(const Tensor& tensor, const std::string& name) {
  check(tensor.defined(), name, ": expected a tensor, got None");
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

std::string dtype_name(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
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
  check_given(tensor, name);
  switch (tensor.scalar_type()) {
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
  check_given(tensor, name);
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
  check_given(tensor, name);
  check(tensor.is_cpu(), name, ": expected a tensor on the CPU (the operator never synchronises), got ",
        device_of(tensor));
  check(tensor.scalar_type() == ScalarType::Int, name, ": expected dtype int32, got ", dtype_name(tensor));
  check_shape(tensor, {count}, name);
  const int32_t* data = static_cast<const int32_t*>(tensor.const_data_ptr());
  const int64_t stride = count > 1 ? tensor.stride(0) : 1;
  std::vector<int64_t> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = data[i * stride];
  return values;
}

void check_disjoint(const std::vector<Tensor>& tensors, const std::vector<std::string>& names) {
  std::vector<Extent> extents;
  std::vector<std::vector<Dim>> dims;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t element = element_size(dtype_of(tensors[i], names[i]));
    dims.push_back(dims_of(tensors[i], element));
    int64_t span = element;
    int64_t inner = element;  // bytes spanned by the dimensions inside of the current one
    for (auto dim = dims.back().rbegin(); dim != dims.back().rend(); ++dim) {
      check(dim->stride >= inner, names[i], ": expected elements that do not share memory, got shape ",
            shape_of(tensors[i]), " with a stride of ", dim->stride / element, " over ", inner / element, " elements");
      inner = dim->stride * (dim->size - 1) + inner;
      span = inner;
    }
    const int64_t begin = reinterpret_cast<int64_t>(tensors[i].const_data_ptr());
    if (tensors[i].numel() > 0) extents.push_back({begin, begin + span, i});
  }
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (size_t i = 0; i < extents.size(); ++i) {
    for (size_t j = i + 1; j < extents.size() && extents[j].begin < extents[i].end; ++j) {
      const size_t a = extents[i].index, b = extents[j].index;
      // Views of one buffer may interleave without sharing an element.
      const bool shared = !same_strides(dims[a], dims[b]) || reachable(dims[a], 0, extents[j].begin - extents[i].begin);
      const std::string& other = names[std::min(a, b)];
      check(!shared, names[std::max(a, b)], ": expected memory of its own, got memory shared with ",
            other.substr(other.rfind(' ') + 1));
    }
  }
}

}  // namespace pop
