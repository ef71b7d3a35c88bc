#include "torch/checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <functional>
#include <utility>

#include "torch/aten.h"

namespace pop {

namespace {

// Numbers of steps of `stride` bytes, from `low` to `high`.
struct Steps {
  int64_t stride;
  int64_t low;
  int64_t high;
};

// The bytes from the first element of a tensor to the end of its last one.
struct Extent {
  const NamedTensor* named;
  size_t index;  // among the tensors of the call
  int64_t begin;
  int64_t end;
};

// From the first element to the last one, both included; of a tensor that is not empty.
int64_t elements_spanned(const Tensor& tensor) {
  int64_t span = 1;
  for (int64_t d = 0; d < tensor.dim(); ++d) span += (tensor.size(d) - 1) * tensor.stride(d);
  return span;
}

Extent extent_of(const NamedTensor& named, size_t index) {
  const Tensor& tensor = named.tensor;
  const int64_t begin = reinterpret_cast<int64_t>(tensor.const_data_ptr());
  return {&named, index, begin, begin + elements_spanned(tensor) * static_cast<int64_t>(tensor.element_size())};
}

void add_steps(std::vector<Steps>& all, const Tensor& tensor, int64_t sign) {
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    const int64_t stride = tensor.stride(d) * static_cast<int64_t>(tensor.element_size()), most = tensor.size(d) - 1;
    if (most == 0 || stride == 0) continue;
    auto same = std::ranges::find(all, stride, &Steps::stride);
    if (same == all.end()) same = all.insert(all.end(), {stride, 0, 0});
    (sign > 0 ? same->high : same->low) += sign * most;
  }
}

int64_t ceil_quotient(int64_t a, int64_t b) { return a / b + (a % b > 0 ? 1 : 0); }
int64_t floor_quotient(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

// True if `distance` bytes are a sum of steps, taken from each of `all` from `first` on; also if `tries` is used up.
bool reachable(const std::vector<Steps>& all, size_t first, int64_t distance, int64_t& tries) {
  if (first == all.size()) return distance == 0;
  const Steps& steps = all[first];
  int64_t low = 0, high = 0;  // what the later ones add up to
  for (size_t i = first + 1; i < all.size(); ++i) {
    low += all[i].low * all[i].stride;
    high += all[i].high * all[i].stride;
  }
  const int64_t least = std::max(steps.low, ceil_quotient(distance - high, steps.stride));
  const int64_t most = std::min(steps.high, floor_quotient(distance - low, steps.stride));
  for (int64_t count = least; count <= most; ++count) {
    if (--tries < 0 || reachable(all, first + 1, distance - count * steps.stride, tries)) return true;
  }
  return false;
}

// True if an element of one lies in memory of the other. Views of one buffer may interleave without that. Answers true
// where counting would take long: among views that nobody makes.
bool share_elements(const Extent& a, const Extent& b) {
  if (a.end <= b.begin || b.end <= a.begin) return false;
  if (a.named->tensor.element_size() != b.named->tensor.element_size()) return true;
  std::vector<Steps> steps;
  add_steps(steps, a.named->tensor, 1);
  add_steps(steps, b.named->tensor, -1);
  std::ranges::sort(steps, std::greater<>(), &Steps::stride);
  int64_t tries = 10'000;
  return reachable(steps, 0, b.begin - a.begin, tries);
}

void check_elements_disjoint(const Tensor& tensor, const std::string& name) {
  std::vector<Steps> dims;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) dims.push_back({tensor.stride(d), 0, tensor.size(d) - 1});
  }
  std::ranges::sort(dims, std::less<>(), &Steps::stride);
  int64_t inner = 1;  // elements spanned by the dimensions inside of the current one
  for (const Steps& dim : dims) {
    check(dim.stride >= inner, name, ": expected elements that do not share memory, got shape ", shape_of(tensor),
          " with a stride of ", dim.stride, " over ", inner, " elements");
    inner += dim.stride * dim.high;
  }
}

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

void check_disjoint(const std::vector<NamedTensor>& written, const std::vector<NamedTensor>& read) {
  std::vector<Extent> extents;
  const auto add = [&](const NamedTensor& named, size_t index) {
    if (named.tensor.numel() > 0) extents.push_back(extent_of(named, index));
  };
  for (size_t i = 0; i < written.size(); ++i) {
    check_elements_disjoint(written[i].tensor, written[i].name);
    add(written[i], i);
  }
  for (size_t i = 0; i < read.size(); ++i) add(read[i], written.size() + i);
  std::ranges::sort(extents, std::less<>(), &Extent::begin);
  for (size_t i = 0; i < extents.size(); ++i) {
    for (size_t j = i + 1; j < extents.size() && extents[j].begin < extents[i].end; ++j) {
      const auto [first, second] =
          std::minmax(extents[i], extents[j], [](const Extent& a, const Extent& b) { return a.index < b.index; });
      if (first.index >= written.size() || !share_elements(first, second)) continue;
      const std::string& other = first.named->name;
      throw std::runtime_error(join(second.named->name, ": expected memory of its own, got memory shared with ",
                                    other.substr(other.rfind(' ') + 1)));
    }
  }
}

}  // namespace pop
