// Loading with prepack: copies of matrices in the backend's layout, for products of many rows.
#include "torch/backends.h"
#include "torch/checks.h"
#include "torch/copied_matrices.h"

namespace pop {

std::string prepack_missing(const ModelSpec& spec, const Tensor& like) {
  if (std::string missing = dense_missing(spec); !missing.empty()) return missing;
  return BackendOfCall(like)->prepack_missing(spec.dtype);
}

void LoadedModel::prepack_layers() {
  const BackendOfCall backend(weights_.front());
  for_each_copied_matrix(Products::plain, [&](const Tensor& given, Linear& linear) {
    packed_.push_back(backend->prepack({.dtype = model_.spec.dtype,
                                        .n = given.size(0),
                                        .k = given.size(1),
                                        .w = given.const_data_ptr(),
                                        .w_stride = given.stride(0)}));
    linear.packed = packed_.back().get();
    extra_bytes_ += given.numel() * element_size(model_.spec.dtype);
  });
  model_.prepacked = true;
}

}  // namespace pop
