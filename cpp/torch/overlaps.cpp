#include "torch/overlaps.h"

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <utility>

#include "core/text.h"
#include "torch/checks.h"

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
  int64_t begin;
  int64_t end;
};

Extent extent_of(const Tensor& tensor) {
  const int64_t begin = reinterpret_cast<int64_t>(tensor.const_data_ptr());
  return {begin, begin + elements_spanned(tensor) * static_cast<int64_t>(tensor.element_size())};
}

// A tensor of a call that is not empty.
struct Argument {
  const NamedTensor* named;
  size_t index;  // among the tensors of the call
  Extent extent;
};

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
bool share_elements(const Tensor& a, const Extent& of_a, const Tensor& b, const Extent& of_b) {
  if (of_a.end <= of_b.begin || of_b.end <= of_a.begin) return false;
  if (a.element_size() != b.element_size()) return true;
  std::vector<Steps> steps;
  add_steps(steps, a, 1);
  add_steps(steps, b, -1);
  std::ranges::sort(steps, std::greater<>(), &Steps::stride);
  int64_t tries = 10'000;
  return reachable(steps, 0, of_b.begin - of_a.begin, tries);
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

[[noreturn]] void refuse_shared(const std::string& name, const std::string& other) {
  throw std::runtime_error(join(name, ": expected memory of its own, got memory shared with ", other));
}

}  // namespace

int64_t elements_spanned(const Tensor& tensor) {
  int64_t span = 1;
  for (int64_t d = 0; d < tensor.dim(); ++d) span += (tensor.size(d) - 1) * tensor.stride(d);
  return span;
}

void check_disjoint(const std::vector<NamedTensor>& written, const std::vector<NamedTensor>& read) {
  std::vector<Argument> arguments;
  const auto add = [&](const NamedTensor& named, size_t index) {
    if (named.tensor.numel() > 0) arguments.push_back({&named, index, extent_of(named.tensor)});
  };
  for (size_t i = 0; i < written.size(); ++i) {
    check_elements_disjoint(written[i].tensor, written[i].name);
    add(written[i], i);
  }
  for (size_t i = 0; i < read.size(); ++i) add(read[i], written.size() + i);
  std::ranges::sort(arguments, std::less<>(), [](const Argument& argument) { return argument.extent.begin; });
  for (size_t i = 0; i < arguments.size(); ++i) {
    for (size_t j = i + 1; j < arguments.size() && arguments[j].extent.begin < arguments[i].extent.end; ++j) {
      const auto [first, second] = std::minmax(arguments[i], arguments[j],
                                               [](const Argument& a, const Argument& b) { return a.index < b.index; });
      if (first.index >= written.size()) continue;
      if (!share_elements(first.named->tensor, first.extent, second.named->tensor, second.extent)) continue;
      const std::string& other = first.named->name;
      refuse_shared(second.named->name, other.substr(other.rfind(' ') + 1));
    }
  }
}

ResidentTensors::ResidentTensors(std::vector<NamedTensor> tensors) {
  for (NamedTensor& named : tensors) {
    if (named.tensor.numel() == 0) continue;
    const Extent extent = extent_of(named.tensor);
    sorted_.push_back({std::move(named), extent.begin, extent.end, extent.end});
  }
  std::ranges::sort(sorted_, std::less<>(), &Entry::begin);
  for (size_t i = 1; i < sorted_.size(); ++i) sorted_[i].reach = std::max(sorted_[i].reach, sorted_[i - 1].reach);
}

void ResidentTensors::check_apart(const NamedTensor& written) const {
  if (written.tensor.numel() == 0) return;
  const Extent extent = extent_of(written.tensor);
  auto entry = std::ranges::lower_bound(sorted_, extent.end, std::less<>(), &Entry::begin);
  while (entry != sorted_.begin() && (--entry)->reach > extent.begin) {
    if (!share_elements(written.tensor, extent, entry->named.tensor, {entry->begin, entry->end})) continue;
    refuse_shared(written.name, entry->named.name);
  }
}

}  // namespace pop
