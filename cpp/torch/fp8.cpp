// Loading with fp8: copies of matrices in 8-bit floats (e4m3), one scale per row.
#include <torch/csrc/stable/ops.h>

#include "torch/backends.h"
#include "torch/checks.h"
#include "torch/copied_matrices.h"

namespace pop {

std::string fp8_missing(const ModelSpec& spec, const Tensor& like) {
  if (std::string missing = dense_missing(spec); !missing.empty()) return missing;
  const std::pair<int64_t, const char*> sizes[] = {{spec.hidden_size, "hidden_size"},
                                                   {spec.q_dim(), "num_heads * head_dim"},
                                                   {spec.kv_dim(), "num_kv_heads * head_dim"},
                                                   {spec.intermediate_size, "intermediate_size"}};
  for (const auto& [size, name] : sizes) {
    if (size % kFp8Multiple == 0) continue;
    return join("expected ", name, " to be a multiple of ", kFp8Multiple, ", got ", size);
  }
  return BackendOfCall(like)->fp8_missing(spec.dtype);
}

void LoadedModel::quantize_layers() {
  const BackendOfCall backend(weights_.front());
  for_each_copied_matrix([&](const Tensor& given, Linear& linear) {
    const Tensor matrix = torch::stable::new_empty(given, {given.size(0), given.size(1)}, ScalarType::Float8_e4m3fn);
    const Tensor scale = torch::stable::new_empty(given, {given.size(0)}, ScalarType::Float);
    backend->quantize_rows({.dtype = model_.spec.dtype,
                            .rows = given.size(0),
                            .width = given.size(1),
                            .x = given.const_data_ptr(),
                            .x_stride = given.stride(0),
                            .out = static_cast<uint8_t*>(matrix.mutable_data_ptr()),
                            .out_stride = given.size(1),
                            .scale = static_cast<float*>(scale.mutable_data_ptr())});
    linear = {.data = matrix.const_data_ptr(),
              .stride = given.size(1),
              .scale = static_cast<const float*>(scale.const_data_ptr())};
    extra_bytes_ += matrix.numel() + scale.numel() * static_cast<int64_t>(sizeof(float));
    quantized_.insert(quantized_.end(), {matrix, scale});
  });
  model_.fp8 = true;
}

}  // namespace pop
