// The KV cache arguments of an operator: tensors [batch, kv_heads, capacity, head_dim].
#pragma once

#include <string>
#include <vector>

#include "backend/backend.h"
#include "torch/checks.h"
#include "torch/geometry.h"
#include "torch/overlaps.h"

namespace pop {

// The dtype and shape that the caches of a call must have.
struct CacheForm {
  DType dtype;
  int64_t kv_heads;
  int64_t head_dim;
};

struct OtherTensors {
  std::vector<NamedTensor> written, read;
  const ResidentTensors* resident = nullptr;  // read, too
};

// The slots of a cache [batch, kv_heads, capacity, head_dim].
int64_t capacity_of(const Tensor& cache, const std::string& name);

// Checks the caches of `keys.size()` layers and returns them for the runtime. They must have `form`, be on the device
// of `like`, be large enough for the call, and share no memory with each other or with `arguments`, other tensors that
// the call writes or reads.
std::vector<LayerCache> check_caches(const std::string& op, const Geometry& geometry, const CacheForm& form,
                                     const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                                     const Tensor& like, const OtherTensors& arguments);

// The same for one layer, for an operator that only reads its caches: shared memory is allowed.
LayerCache check_cache(const std::string& op, const Geometry& geometry, const CacheForm& form, const Tensor& key,
                       const Tensor& value, const Tensor& like);

// Saves the cache slots that a call is about to overwrite, and restores them on destruction unless keep() was called.
// The copies are made up front, so restoring allocates nothing and cannot fail.
class CacheGuard {
 public:
  CacheGuard(bool enabled, Backend& backend, const Geometry& geometry, const std::vector<Tensor>& keys,
             const std::vector<Tensor>& values);
  CacheGuard(const CacheGuard&) = delete;
  CacheGuard& operator=(const CacheGuard&) = delete;
  ~CacheGuard();

  void keep() { saved_.clear(); }

 private:
  void restore(const Tensor& written, const Tensor& saved) noexcept;

  Backend& backend_;
  std::vector<Tensor> written_;  // [kv_heads, new slots, head_dim] views of the caches
  std::vector<Tensor> saved_;    // contiguous copies of them
};

}  // namespace pop
