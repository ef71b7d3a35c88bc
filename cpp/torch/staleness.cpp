// Weights that changed since loading.
#include <algorithm>

#include "torch/checks.h"
#include "torch/copied_matrices.h"

namespace pop {

namespace {

// A hash of up to 64 elements spread over a tensor in host memory; 0 for other memory. It notices a change made through
// `.data`, which does not increase the version counter.
uint64_t sample_of(const Tensor& tensor) {
  if (!tensor.is_cpu() || tensor.numel() == 0) return 0;
  constexpr int64_t kSamples = 64;
  const int64_t element = tensor.element_size();
  const char* data = static_cast<const char*>(tensor.const_data_ptr());
  const int64_t cols = tensor.size(tensor.dim() - 1);
  const int64_t row_stride = tensor.dim() > 1 ? tensor.stride(0) : 0;
  uint64_t hash = 0xcbf29ce484222325ull;  // FNV-1a
  for (int64_t i = 0; i < kSamples; ++i) {
    const int64_t index = (tensor.numel() - 1) * i / (kSamples - 1);
    const char* bytes = data + ((index / cols) * row_stride + index % cols) * element;
    for (int64_t b = 0; b < element; ++b) hash = (hash ^ static_cast<unsigned char>(bytes[b])) * 0x100000001b3ull;
  }
  return hash;
}

bool is_folded(const std::string& name) {
  return name.ends_with(".k_proj") || name.ends_with(".v_proj") || name.ends_with(".input_norm");
}

}  // namespace

void LoadedModel::stamp_weights() {
  stamps_.reserve(slots_.size());
  for (size_t i = 0; i < slots_.size(); ++i) stamps_.push_back(stamp_of(i));
}

LoadedModel::Stamp LoadedModel::stamp_of(size_t index) const {
  const Tensor& tensor = weights_[index];
  const WeightSlot& slot = slots_[index];
  const bool copies = model_.products != Products::plain || model_.prepacked;
  const bool copied =
      slot.layer >= 0 &&
      (is_projected(slot.layer) ? is_folded(slot.name) : copies && is_copied_matrix(slot.name, model_.products));
  return {.data = tensor.const_data_ptr(),
          .dtype = static_cast<int32_t>(tensor.scalar_type()),
          .sizes = {tensor.sizes().begin(), tensor.sizes().end()},
          .strides = {tensor.strides().begin(), tensor.strides().end()},
          .copied = copied,
          .sample = copied ? sample_of(tensor) : 0};
}

int64_t LoadedModel::stale_index() const {
  for (size_t i = 0; i < weights_.size(); ++i) {
    const Tensor& tensor = weights_[i];
    const Stamp& stamp = stamps_[i];
    const bool current =
        tensor.const_data_ptr() == stamp.data && static_cast<int32_t>(tensor.scalar_type()) == stamp.dtype &&
        std::ranges::equal(tensor.sizes(), stamp.sizes) && std::ranges::equal(tensor.strides(), stamp.strides) &&
        (!stamp.copied || sample_of(tensor) == stamp.sample);
    if (!current) return static_cast<int64_t>(i);
  }
  return -1;
}

}  // namespace pop
