// A model as `pop::load` makes it: weights that are shared with the caller, and the memory that loading adds (folded
// K/V stacks, 8-bit copies, prepacked copies). Its parts are a file each: loaded_model.cpp, folding.cpp,
// quantizing.cpp, prepacking.cpp and staleness.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "backend/backend.h"
#include "runtime/model.h"
#include "torch/overlaps.h"

namespace pop {

class LoadedModel {
 public:
  // `scales`: one tensor for each weight, float32 [out_features] (or a scale for each group) of an int8 matrix, empty
  // for others; none: no weight is int8. `projections`: fitted matrices [2 * kv_dim, hidden_size], one per omitted
  // layer, which are copied; none: the layers' own. `products` other than plain, or `prepack`, not both, copies the
  // matrices of the layers outside of the runs: to 8 bits, or to the backend's layout. Throws std::runtime_error naming
  // the argument, what was expected and what came.
  LoadedModel(const ModelSpec& spec, const Plan& plan, std::vector<Tensor> weights, std::vector<Tensor> scales,
              const std::optional<std::vector<Tensor>>& projections, Products products, bool prepack);

  const Model& model() const { return model_; }
  const Tensor& embed_tokens() const { return weights_.front(); }
  const ResidentTensors& resident_weights() const { return resident_weights_; }
  int64_t extra_bytes() const { return extra_bytes_; }  // of the folded stacks and the copied matrices

  // The index of a weight whose memory, dtype or layout changed since loading, or of a folded or copied weight of which
  // a sample of values changed; -1 if there is none.
  int64_t stale_index() const;
  const std::string& weight_name(int64_t index) const { return slots_[index].name; }

 private:
  // The state of a weight at loading.
  struct Stamp {
    const void* data;
    int32_t dtype;
    std::vector<int64_t> sizes;
    std::vector<int64_t> strides;
    bool copied;      // folded into a stack, quantised or prepacked
    uint64_t sample;  // hash of some values, for copied weights in host memory
  };

  // loaded_model.cpp
  void check_weights() const;
  void check_scaled(size_t index) const;
  bool is_scaled(size_t index) const { return !scales_.empty() && scales_[index].numel() > 0; }
  ResidentTensors named_weights() const;
  void set_layer(int64_t layer);
  const Tensor* weight(const std::string& name) const;  // null if the model has none of that name
  const Tensor* scale(const std::string& name) const;   // of an int8 weight; else null
  bool is_projected(int64_t layer) const;               // the layer is in a run

  // folding.cpp
  Tensor in_float32(const std::string& name) const;
  void fold(LayerRange layers);
  void set_projections(const std::vector<Tensor>& projections);

  // quantizing.cpp, prepacking.cpp
  void quantize_layers(Products products);
  void prepack_layers();
  template <class Copy>
  void for_each_copied_matrix(Products products, const Copy& copy);  // copied_matrices.h

  // staleness.cpp
  void stamp_weights();
  Stamp stamp_of(size_t index) const;

  std::vector<WeightSlot> slots_;
  std::unordered_map<std::string, size_t> index_;  // slot name -> index
  std::vector<Tensor> weights_;                    // in the order of slots_
  std::vector<Tensor> scales_;                     // the same, or none at all
  ResidentTensors resident_weights_;
  std::vector<Tensor> stacks_;  // in the order of model_.runs
  std::vector<Tensor> quantized_;
  std::vector<std::unique_ptr<PackedWeight>> packed_;
  std::vector<Stamp> stamps_;
  Model model_;
  int64_t extra_bytes_ = 0;
};

// The K and V weights of each layer in one matrix [layers * 2 * kv_dim, hidden_size], multiplied by the layer's input
// norm plus `norm_offset`; unchanged if `input_norm` is empty.
Tensor fold_kv(const std::vector<Tensor>& k_proj, const std::vector<Tensor>& v_proj,
               const std::vector<Tensor>& input_norm, double norm_offset);

// A weight in 8 bits with one scale per row.
struct QuantizedWeight {
  Tensor values, scale;
};
QuantizedWeight quantize_weight(Backend& backend, Products products, DType dtype, const Tensor& weight);

// Checks the scales of an int8 matrix [n, k]: float32 [n], or [n, k / g] for groups of g elements (is_int8_group).
void check_int8_scale(const Tensor& scale, const Tensor& weight, const std::string& name);

// "fp8" or "int8"; throws std::invalid_argument for another text.
Products parse_products(const std::string& text);

// The reason why a model of that spec, with its weights on the device of `like`, cannot be loaded with these products,
// or with prepack; empty if it can.
std::string products_missing(Products products, const ModelSpec& spec, const Tensor& like);
std::string prepack_missing(const ModelSpec& spec, const Tensor& like);

}  // namespace pop
