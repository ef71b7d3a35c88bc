// The building blocks on rows as operators: one kernel call of the backend each.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <utility>

#include "torch/backends.h"
#include "torch/checks.h"
#include "torch/device_keys.h"
#include "torch/forks.h"
#include "torch/loaded_model.h"
#include "torch/negated.h"
#include "torch/overlaps.h"
#include "torch/schemas.h"
#include "torch/texts.h"

namespace pop {

namespace {

// The size of the last dimension, which must be at least 1.
int64_t width_of(const Tensor& tensor, const std::string& name) {
  check(tensor.dim() >= 1 && tensor.size(tensor.dim() - 1) >= 1, name,
        ": expected a last dimension of at least 1, got ", shape_of(tensor));
  return tensor.size(tensor.dim() - 1);
}

// All leading dimensions as one dimension of rows; copies only if there is no such view.
Tensor as_rows(const Tensor& tensor) {
  const int64_t width = tensor.size(tensor.dim() - 1);
  const Tensor rows = torch::stable::reshape(tensor, {-1, width});
  return width <= 1 || rows.stride(1) == 1 ? rows : torch::stable::contiguous(rows);
}

Tensor empty_like_rows(const Tensor& tensor) { return torch::stable::new_empty(tensor, tensor.sizes()); }

// The same shape with another last dimension.
Tensor empty_like_rows(const Tensor& tensor, int64_t width) {
  std::vector<int64_t> shape(tensor.sizes().begin(), tensor.sizes().end());
  shape.back() = width;
  return torch::stable::new_empty(tensor, shape);
}

// Elements of a row of a weight that share a scale; 0: all of them.
int64_t group_of(const Tensor& weight, const Tensor& scale) {
  return scale.dim() == 1 ? 0 : weight.size(1) / scale.size(1);
}

void check_int8(const Backend& backend, DType dtype, const std::string& name) {
  const std::string missing = backend.products_missing(Products::int8, dtype);
  check(missing.empty(), name, ": ", missing);
}

Tensor linear(Tensor x, Tensor weight) {
  const DType dtype = dtype_of(x, "pop::linear: x");
  const int64_t k = width_of(x, "pop::linear: x");
  check_like(weight, x, "pop::linear: weight");
  check_shape(weight, {-1, k}, "pop::linear: weight");
  const bool transposed = weight.stride(1) != 1 && weight.stride(0) == 1;
  if (!transposed) check_last_dim_contiguous(weight, "pop::linear: weight");
  const Tensor rows = as_rows(x);
  Tensor out = empty_like_rows(x, weight.size(0));
  const GemmParams product{.dtype = dtype,
                           .m = rows.size(0),
                           .n = weight.size(0),
                           .k = k,
                           .a = rows.const_data_ptr(),
                           .a_stride = rows.stride(0),
                           .w = weight.const_data_ptr(),
                           .w_stride = weight.stride(transposed ? 1 : 0),
                           .out = out.mutable_data_ptr(),
                           .out_stride = weight.size(0),
                           .w_transposed = transposed};
  BackendOfCall(x)->gemm(&product, 1);
  return out;
}

// Returns e4m3 or int8 [..., width] and the float32 scale of each row, [...].
std::tuple<Tensor, Tensor> quantized_rows(const Tensor& x, Products products) {
  const DType dtype = dtype_of(x, "pop::quantize_rows: x");
  const int64_t width = width_of(x, "pop::quantize_rows: x");
  const BackendOfCall backend(x);
  if (products == Products::int8) check_int8(*backend, dtype, "pop::quantize_rows: x");
  const Tensor rows = as_rows(x);
  const ScalarType type = products == Products::int8 ? ScalarType::Char : ScalarType::Float8_e4m3fn;
  Tensor out = torch::stable::new_empty(x, x.sizes(), type);
  const std::vector<int64_t> leading(x.sizes().begin(), x.sizes().end() - 1);
  Tensor scale = torch::stable::new_empty(x, leading, ScalarType::Float);
  backend->quantize_rows({.dtype = dtype,
                          .products = products,
                          .rows = rows.size(0),
                          .width = width,
                          .x = rows.const_data_ptr(),
                          .x_stride = rows.stride(0),
                          .out = static_cast<uint8_t*>(out.mutable_data_ptr()),
                          .out_stride = width,
                          .scale = static_cast<float*>(scale.mutable_data_ptr())});
  return {out, scale};
}

// The product of x and a quantised weight [n, k]. x is rounded by rows if such products round them.
Tensor quantized_product(Backend& backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                         Products products) {
  std::optional<std::tuple<Tensor, Tensor>> rounded;
  if (rounds_rows(products)) rounded = quantized_rows(x, products);
  const Tensor rows = as_rows(rounded ? std::get<0>(*rounded) : x);
  const int64_t n = weight.size(0);
  Tensor out = empty_like_rows(x, n);
  const auto floats = [](const Tensor& scale) { return static_cast<const float*>(scale.const_data_ptr()); };
  const GemmParams product{.dtype = dtype_of(x, "x"),
                           .m = rows.size(0),
                           .n = n,
                           .k = weight.size(1),
                           .a = rows.const_data_ptr(),
                           .a_stride = rows.stride(0),
                           .w = weight.const_data_ptr(),
                           .w_stride = weight.stride(0),
                           .out = out.mutable_data_ptr(),
                           .out_stride = n,
                           .products = products,
                           .a_scale = rounded ? floats(std::get<1>(*rounded)) : nullptr,
                           .w_scale = floats(weight_scale),
                           .w_group = group_of(weight, weight_scale)};
  backend.gemm(&product, 1);
  return out;
}

std::tuple<Tensor, Tensor> quantize_rows(Tensor x, TextArgument products) try {
  return quantized_rows(x, parse_products(products.text));
} catch (const std::invalid_argument& error) {
  throw std::runtime_error(join("pop::quantize_rows: ", error.what()));
}

Tensor int8_linear(Tensor x, Tensor weight, Tensor weight_scale, bool round_rows) {
  const std::string op = "pop::int8_linear";
  const DType dtype = dtype_of(x, op + ": x");
  const int64_t k = width_of(x, op + ": x");
  check(k <= kInt8MostElements, op, ": x: expected a last dimension of at most ", kInt8MostElements, ", got ", k);
  check_same_device(weight, x, op + ": weight");
  check(type_of(weight) == ScalarType::Char, op, ": weight: expected dtype int8, got ", dtype_name(weight));
  check_shape(weight, {-1, k}, op + ": weight");
  check_last_dim_contiguous(weight, op + ": weight");
  check_same_device(weight_scale, x, op + ": weight_scale");
  check_int8_scale(weight_scale, weight, op + ": weight_scale");
  const BackendOfCall backend(x);
  check_int8(*backend, dtype, op + ": x");
  return quantized_product(*backend, x, weight, weight_scale, round_rows ? Products::int8 : Products::int8_weight);
}

Tensor fp8_linear(Tensor x, Tensor weight, Tensor weight_scale) {
  const std::string op = "pop::fp8_linear";
  const DType dtype = dtype_of(x, op + ": x");
  const int64_t k = width_of(x, op + ": x");
  check_same_device(weight, x, op + ": weight");
  check(type_of(weight) == ScalarType::Float8_e4m3fn, op, ": weight: expected dtype float8_e4m3fn, got ",
        dtype_name(weight));
  check_shape(weight, {-1, k}, op + ": weight");
  check(weight.is_contiguous() && reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0, op,
        ": weight: expected a contiguous tensor that is aligned to 16 bytes");
  const int64_t n = weight.size(0);
  check_same_device(weight_scale, x, op + ": weight_scale");
  check_dtype(weight_scale, DType::f32, op + ": weight_scale");
  check_shape(weight_scale, {n}, op + ": weight_scale");
  check(weight_scale.is_contiguous(), op, ": weight_scale: expected a contiguous tensor");
  check(k % kFp8Multiple == 0 && n % kFp8Multiple == 0, op, ": weight: expected multiples of ", kFp8Multiple, ", got ",
        shape_of(weight));
  const BackendOfCall backend(x);
  const std::string missing = backend->products_missing(Products::fp8, dtype);
  check(missing.empty(), op, ": x: ", missing);
  return quantized_product(*backend, x, weight, weight_scale, Products::fp8);
}

Tensor rms_norm(Tensor x, Tensor weight, double eps, double weight_offset) {
  const DType dtype = dtype_of(x, "pop::rms_norm: x");
  const int64_t width = width_of(x, "pop::rms_norm: x");
  const void* gamma = optional_vector(weight, x, width, "pop::rms_norm: weight");
  const Tensor rows = as_rows(x);
  Tensor out = empty_like_rows(x);
  BackendOfCall(x)->rms_norm({.dtype = dtype,
                              .rows = rows.size(0),
                              .width = width,
                              .x = rows.mutable_data_ptr(),  // read only: there is no delta
                              .x_stride = rows.stride(0),
                              .weight = gamma,
                              .weight_offset = static_cast<float>(weight_offset),
                              .eps = static_cast<float>(eps),
                              .out = out.mutable_data_ptr(),
                              .out_stride = width});
  return out;
}

Tensor add_rms_norm(Tensor x, Tensor delta, Tensor weight, double eps, std::optional<Tensor> delta_bias,
                    std::optional<Tensor> delta_norm, double weight_offset, double delta_scale) {
  const DType dtype = dtype_of(x, "pop::add_rms_norm: x");
  check(x.dim() == 2 && x.size(1) >= 1, "pop::add_rms_norm: x: expected shape [rows, width], got ", shape_of(x));
  const int64_t width = x.size(1);
  check_last_dim_contiguous(x, "pop::add_rms_norm: x");
  check_like(delta, x, "pop::add_rms_norm: delta");
  check_shape(delta, {x.size(0), width}, "pop::add_rms_norm: delta");
  check_last_dim_contiguous(delta, "pop::add_rms_norm: delta");
  const void* gamma = optional_vector(weight, x, width, "pop::add_rms_norm: weight");
  const void* bias = optional_vector(delta_bias, x, width, "pop::add_rms_norm: delta_bias");
  const void* norm = optional_vector(delta_norm, x, width, "pop::add_rms_norm: delta_norm");
  std::vector<NamedTensor> read{{delta, "pop::add_rms_norm: delta"}, {weight, "pop::add_rms_norm: weight"}};
  if (delta_bias.has_value()) read.push_back({*delta_bias, "pop::add_rms_norm: delta_bias"});
  if (delta_norm.has_value()) read.push_back({*delta_norm, "pop::add_rms_norm: delta_norm"});
  check_disjoint({{x, "pop::add_rms_norm: x"}}, read);
  Tensor out = empty_like_rows(x);
  BackendOfCall(x)->rms_norm({.dtype = dtype,
                              .rows = x.size(0),
                              .width = width,
                              .x = x.mutable_data_ptr(),
                              .x_stride = x.stride(0),
                              .delta = delta.const_data_ptr(),
                              .delta_stride = delta.stride(0),
                              .delta_bias = bias,
                              .delta_norm = norm,
                              .delta_scale = static_cast<float>(delta_scale),
                              .weight = gamma,
                              .weight_offset = static_cast<float>(weight_offset),
                              .eps = static_cast<float>(eps),
                              .out = out.mutable_data_ptr(),
                              .out_stride = width});
  return out;
}

Tensor gated_act(Tensor gate, Tensor up, TextArgument activation, std::optional<Tensor> gate_bias,
                 std::optional<Tensor> up_bias, double swiglu_alpha, double swiglu_limit) try {
  const DType dtype = dtype_of(gate, "pop::gated_act: gate");
  const int64_t width = width_of(gate, "pop::gated_act: gate");
  check_like(up, gate, "pop::gated_act: up");
  check_shape(up, std::vector<int64_t>(gate.sizes().begin(), gate.sizes().end()), "pop::gated_act: up");
  for (const auto& [name, value] : {std::pair("alpha", swiglu_alpha), std::pair("limit", swiglu_limit)}) {
    check(value > 0 && std::isfinite(value), "pop::gated_act: swiglu_", name, ": expected a finite number > 0, got ",
          value);
  }
  Tensor out = empty_like_rows(gate);
  const Tensor gate_rows = as_rows(gate), up_rows = as_rows(up);
  BackendOfCall(gate)->gated_act({.dtype = dtype,
                                  .activation = parse_activation(activation.text),
                                  .rows = up_rows.size(0),
                                  .width = width,
                                  .gate = gate_rows.const_data_ptr(),
                                  .gate_stride = gate_rows.stride(0),
                                  .up = up_rows.const_data_ptr(),
                                  .up_stride = up_rows.stride(0),
                                  .gate_bias = optional_vector(gate_bias, gate, width, "pop::gated_act: gate_bias"),
                                  .up_bias = optional_vector(up_bias, gate, width, "pop::gated_act: up_bias"),
                                  .out = out.mutable_data_ptr(),
                                  .out_stride = width,
                                  .swiglu_alpha = static_cast<float>(swiglu_alpha),
                                  .swiglu_limit = static_cast<float>(swiglu_limit)});
  return out;
} catch (const std::invalid_argument& error) {
  throw std::runtime_error(join("pop::gated_act: ", error.what()));
}

}  // namespace

// The functions are the same for every device; only the backend differs.
static void implement(torch::stable::detail::StableLibrary& m) {  // no template: gcc 12 would not instantiate them
  m.impl("linear", TORCH_BOX(&ChecksThreads<&linear>::call));
  m.impl("fp8_linear", TORCH_BOX(&ChecksThreads<&fp8_linear>::call));
  m.impl("int8_linear", TORCH_BOX(&ChecksThreads<&int8_linear>::call));
  m.impl("quantize_rows", TORCH_BOX(&ChecksThreads<&quantize_rows>::call));
  m.impl("rms_norm", TORCH_BOX(&ChecksThreads<&rms_norm>::call));
  m.impl("add_rms_norm", TORCH_BOX(&ChecksThreads<&add_rms_norm>::call));
  m.impl("gated_act", TORCH_BOX(&ChecksThreads<&gated_act>::call));
}

POP_IMPL_ON_DEVICES(implement)

STABLE_TORCH_LIBRARY_IMPL(pop, Negative, m) {
  m.impl("add_rms_norm", TORCH_BOX((&ChecksThreads<&OfNegated<&add_rms_norm, kAddRmsNormSchema>::call>::call)));
}

}  // namespace pop
