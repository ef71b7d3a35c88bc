#include "torch/caches.h"

#include <torch/csrc/stable/ops.h>

#include "torch/checks.h"

namespace pop {

namespace {

void check_one(const std::string& op, const Geometry& geometry, const CacheForm& form, const Tensor& cache,
               const std::string& name, const Tensor& like) {
  check_same_device(cache, like, name);
  check_dtype(cache, form.dtype, name);
  check_shape(cache, {-1, form.kv_heads, -1, form.head_dim}, name);
  check_last_dim_contiguous(cache, name);
  geometry.check_fits(op, name, cache.size(0), cache.size(2));
}

LayerCache layer_cache(const Tensor& key, const Tensor& value) {
  const auto strides = [](const Tensor& cache) {
    return CacheStrides{.batch = cache.stride(0), .head = cache.stride(1), .slot = cache.stride(2)};
  };
  return {.key = key.mutable_data_ptr(),
          .value = value.mutable_data_ptr(),
          .key_strides = strides(key),
          .value_strides = strides(value)};
}

}  // namespace

int64_t capacity_of(const Tensor& cache, const std::string& name) {
  check_tensor(cache, name);
  check_shape(cache, {-1, -1, -1, -1}, name);
  return cache.size(2);
}

std::vector<LayerCache> check_caches(const std::string& op, const Geometry& geometry, const CacheForm& form,
                                     const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                                     const Tensor& like, const OtherTensors& arguments) {
  std::vector<NamedTensor> written;
  for (const auto& [caches, name] : {std::pair{&keys, "key_cache"}, std::pair{&values, "value_cache"}}) {
    for (size_t layer = 0; layer < caches->size(); ++layer) {
      const Tensor& cache = (*caches)[layer];
      written.push_back({cache, join(op, ": ", name, caches->size() == 1 ? "" : join("[", layer, "]"))});
      check_one(op, geometry, form, cache, written.back().name, like);
    }
  }
  written.insert(written.end(), arguments.written.begin(), arguments.written.end());
  check_disjoint(written, arguments.read);
  if (arguments.resident != nullptr) {
    for (const NamedTensor& tensor : written) arguments.resident->check_apart(tensor);
  }

  std::vector<LayerCache> layers;
  for (size_t layer = 0; layer < keys.size(); ++layer) layers.push_back(layer_cache(keys[layer], values[layer]));
  return layers;
}

LayerCache check_cache(const std::string& op, const Geometry& geometry, const CacheForm& form, const Tensor& key,
                       const Tensor& value, const Tensor& like) {
  check_one(op, geometry, form, key, join(op, ": key_cache"), like);
  check_one(op, geometry, form, value, join(op, ": value_cache"), like);
  return layer_cache(key, value);
}

CacheGuard::CacheGuard(bool enabled, Backend& backend, const Geometry& geometry, const std::vector<Tensor>& keys,
                       const std::vector<Tensor>& values)
    : backend_(backend) {
  if (!enabled) return;
  for (int64_t i = 0; i < geometry.layout().sequences; ++i) {
    const auto [begin, end] = geometry.written_slots(i);
    for (const auto* caches : {&keys, &values}) {
      for (const Tensor& cache : *caches) {
        Tensor sequence = torch::stable::select(cache, 0, i);
        written_.push_back(torch::stable::narrow(sequence, 1, begin, end - begin));
        const Tensor& view = written_.back();
        saved_.push_back(view.is_contiguous() ? torch::stable::clone(view) : torch::stable::contiguous(view));
      }
    }
  }
}

CacheGuard::~CacheGuard() {
  for (size_t i = 0; i < saved_.size(); ++i) restore(written_[i], saved_[i]);
}

// Does not use torch's copy_: an exception is being handled, and a cache that was made in inference mode refuses copy_
// outside of it.
void CacheGuard::restore(const Tensor& written, const Tensor& saved) noexcept {
  const int64_t heads = written.size(0), slots = written.size(1);
  const int64_t element = written.element_size();
  const int64_t row_bytes = written.size(2) * element;
  char* to = static_cast<char*>(written.mutable_data_ptr());
  const char* from = static_cast<const char*>(saved.const_data_ptr());
  for (int64_t head = 0; head < heads; ++head) {
    backend_.copy_rows(to + head * written.stride(0) * element, written.stride(1) * element,
                       from + head * slots * row_bytes, row_bytes, row_bytes, slots);
  }
}

}  // namespace pop
