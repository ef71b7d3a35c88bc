// Models behind the integer handles of `pop::load`.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "runtime/model.h"

namespace pop {

using torch::stable::Tensor;

// Keeps the weights alive, shared with whoever passed them, and owns the folded stacks.
class LoadedModel {
 public:
  // `projections`: fitted [2 * kv_dim, hidden_size] of each omitted layer, copied; none: the layers' own.
  // The matrices of the layers that context rows pass through are copied for the products of a prefill by `fp8`, in
  // 8-bit floats, and by `prepack`, in the backend's layout; one of the two.
  LoadedModel(const ModelSpec& spec, const Plan& plan, std::vector<Tensor> weights,
              const std::optional<std::vector<Tensor>>& projections, bool fp8, bool prepack);

  const Model& model() const { return model_; }
  const Tensor& embed_tokens() const { return weights_.front(); }
  int64_t extra_bytes() const { return extra_bytes_; }  // of the folded stacks and copied matrices

  // Name of a weight whose memory, dtype or layout is not what it was at load, or of a folded or copied one
  // with a sample of its values changed; "" if there is none.
  std::string stale_weight() const;

 private:
  struct Stamp {
    const void* data;
    int32_t dtype;
    std::vector<int64_t> sizes;
    std::vector<int64_t> strides;
    bool copied;      // folded into a stack, quantised or prepacked
    uint64_t sample;  // of copied weights in host memory
  };

  Stamp stamp_of(size_t index) const;
  const Tensor* weight(const std::string& name) const;
  void set_layer(int64_t layer);
  void fold(LayerRange layers);
  void place_projections(const std::vector<Tensor>& projections);
  bool is_projected(int64_t layer) const;
  template <class Copy>
  void copy_matrices(const Copy& copy);
  void quantize_layers();
  void prepack_layers();

  std::vector<WeightSlot> slots_;
  std::unordered_map<std::string, size_t> index_;  // of a slot's name
  std::vector<Tensor> weights_;                    // in the order of slots_
  std::vector<Tensor> stacks_;
  std::vector<Tensor> quantized_;
  std::vector<std::unique_ptr<PackedWeight>> packed_;
  std::vector<Stamp> stamps_;
  Model model_;
  int64_t extra_bytes_ = 0;
};

// Why the products of such a model, its weights on the device of `like`, cannot be in 8-bit floats; empty if they can.
std::string fp8_missing(const ModelSpec& spec, const Tensor& like);

// The same of prepacking.
std::string prepack_missing(const ModelSpec& spec, const Tensor& like);

// Handles are never reused. A model lives on while a call that uses it runs.
int64_t register_model(std::shared_ptr<const LoadedModel> model);
std::shared_ptr<const LoadedModel> find_model(int64_t handle);  // throws on a freed or unknown handle
void unregister_model(int64_t handle);

// [layers * 2 * kv_dim, hidden_size]: K and V weights of each layer, times its input norm plus norm_offset; as they
// are where `input_norm` is empty.
Tensor fold_kv(const std::vector<Tensor>& k_proj, const std::vector<Tensor>& v_proj,
               const std::vector<Tensor>& input_norm, double norm_offset);

}  // namespace pop
