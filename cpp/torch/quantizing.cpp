// Loading with fp8 or int8: copies of matrices in 8 bits, one scale per row.
#include <torch/csrc/stable/ops.h>

#include <stdexcept>
#include <utility>

#include "torch/backends.h"
#include "torch/checks.h"
#include "torch/copied_matrices.h"

namespace pop {

namespace {

std::string sizes_missing(const ModelSpec& spec, Products products) {
  const std::pair<int64_t, const char*> sizes[] = {{spec.hidden_size, "hidden_size"},
                                                   {spec.q_dim(), "num_heads * head_dim"},
                                                   {spec.kv_dim(), "num_kv_heads * head_dim"},
                                                   {spec.intermediate_size, "intermediate_size"}};
  for (const auto& [size, name] : sizes) {
    if (products == Products::fp8 && size % kFp8Multiple != 0) {
      return join("expected ", name, " to be a multiple of ", kFp8Multiple, ", got ", size);
    }
    if (products == Products::int8 && size > kInt8MostElements) {
      return join("expected ", name, " to be at most ", kInt8MostElements, ", got ", size);
    }
  }
  return "";
}

}  // namespace

void check_int8_scale(const Tensor& scale, const Tensor& weight, const std::string& name) {
  const int64_t n = weight.size(0), k = weight.size(1);
  check_dtype(scale, DType::f32, name);
  check(scale.is_contiguous(), name, ": expected a contiguous tensor");
  if (scale.dim() == 1) return check_shape(scale, {n}, name);
  check_shape(scale, {n, -1}, name);
  const int64_t groups = scale.size(1);
  check(groups > 0 && k % groups == 0 && is_int8_group(k / groups), name, ": expected one scale for each row of ", k,
        ", or for each 32, 64, 128 or 256 elements of it, got ", groups, " a row");
}

Products parse_products(const std::string& text) {
  if (text == "fp8") return Products::fp8;
  if (text == "int8") return Products::int8;
  throw std::invalid_argument(join("products: expected fp8 or int8, got '", shortened(text), "'"));
}

std::string products_missing(Products products, const ModelSpec& spec, const Tensor& like) {
  if (std::string missing = dense_missing(spec); !missing.empty()) return missing;
  if (std::string missing = sizes_missing(spec, products); !missing.empty()) return missing;
  return BackendOfCall(like)->products_missing(products, spec.dtype);
}

QuantizedWeight quantize_weight(Backend& backend, Products products, DType dtype, const Tensor& weight) {
  const int64_t n = weight.size(0), k = weight.size(1);
  const ScalarType type = products == Products::int8 ? ScalarType::Char : ScalarType::Float8_e4m3fn;
  const Tensor values = torch::stable::new_empty(weight, {n, k}, type);
  const Tensor scale = torch::stable::new_empty(weight, {n}, ScalarType::Float);
  backend.quantize_rows({.dtype = dtype,
                         .products = products,
                         .rows = n,
                         .width = k,
                         .x = weight.const_data_ptr(),
                         .x_stride = weight.stride(0),
                         .out = static_cast<uint8_t*>(values.mutable_data_ptr()),
                         .out_stride = k,
                         .scale = static_cast<float*>(scale.mutable_data_ptr())});
  return {values, scale};
}

void LoadedModel::quantize_layers(Products products) {
  const BackendOfCall backend(weights_.front());
  for_each_copied_matrix(products, [&](const Tensor& given, Linear& linear) {
    if (linear.products == Products::int8_weight) {  // the checkpoint's own integers, in place
      linear.products = products;
      return;
    }
    const auto [values, scale] = quantize_weight(*backend, products, model_.spec.dtype, given);
    linear = {.data = values.const_data_ptr(),
              .stride = given.size(1),
              .scale = static_cast<const float*>(scale.const_data_ptr()),
              .products = products};
    extra_bytes_ += values.numel() + scale.numel() * static_cast<int64_t>(sizeof(float));
    quantized_.insert(quantized_.end(), {values, scale});
  });
  model_.products = products;
}

}  // namespace pop
