// KV caches as an operator is given them: tensors [batch, kv_heads, capacity, head_dim].
#pragma once

#include <string>
#include <vector>

#include "backend/backend.h"
#include "torch/geometry.h"

namespace pop {

// What the caches of a call must agree with.
struct CacheForm {
  DType dtype;
  int64_t kv_heads;
  int64_t head_dim;
};

// The caches of `keys.size()` layers as the runtime sees them, checked: of one form, on the device of
// `like`, large enough for the call, and none sharing memory with another or with `others`.
std::vector<LayerCache> check_caches(const std::string& op, const Geometry& geometry, const CacheForm& form,
                                     const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                                     const Tensor& like, const std::vector<std::pair<Tensor, std::string>>& others);

// The caches of one layer, for an operator that only reads them.
LayerCache check_cache(const std::string& op, const Geometry& geometry, const CacheForm& form, const Tensor& key,
                       const Tensor& value, const Tensor& like);

// Remembers what a call is about to overwrite, and puts it back unless the call is kept. It holds
// a copy of the new slots of every layer, so that putting back allocates nothing and cannot fail.
class CacheGuard {
 public:
  CacheGuard(bool enabled, Backend& backend, const Geometry& geometry, const std::vector<Tensor>& keys,
             const std::vector<Tensor>& values);
  CacheGuard(const CacheGuard&) = delete;
  CacheGuard& operator=(const CacheGuard&) = delete;
  ~CacheGuard();

  void keep() { saved_.clear(); }

 private:
  void put_back(const Tensor& written, const Tensor& saved) noexcept;

  Backend& backend_;
  std::vector<Tensor> written_;  // [kv_heads, new slots, head_dim] views of the caches
  std::vector<Tensor> saved_;    // contiguous copies of them
};

}  // namespace pop
