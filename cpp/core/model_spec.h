// What a decoder-only transformer looks like: the one place that states its shapes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pop {

enum class DType { f32, bf16, f16 };

// Bytes of one element.
int64_t element_size(DType dtype);
const char* to_string(DType dtype);  // "float32", "bfloat16", "float16"
DType parse_dtype(const std::string& name);

// The non-linearity of the gated MLP: down(act(gate(x)) * up(x)).
enum class Activation { silu, gelu_tanh, gelu };

const char* to_string(Activation activation);  // "silu", "gelu_tanh", "gelu"
Activation parse_activation(const std::string& name);

inline constexpr int64_t kMaxExperts = 4096;

// One tensor the runtime reads. `layer` is -1 for tensors of no layer.
struct WeightSlot {
  std::string name;  // "embed_tokens", "norm", "layers.3.k_proj", "layers.3.k_bias", ...
  int64_t layer;
  std::vector<int64_t> shape;
};

struct ModelSpec {
  std::string architecture;  // informational, e.g. "llama"
  DType dtype = DType::f32;
  int64_t num_layers = 0;
  int64_t hidden_size = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t rotary_dim = 0;  // leading channels of a head that RoPE turns; pairs are (i, i + rotary_dim / 2)
  int64_t intermediate_size = 0;
  int64_t vocab_size = 0;
  double rms_norm_eps = 1e-6;
  double attention_scale = 0;  // softmax(scale * q.k)
  Activation activation = Activation::silu;
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;             // RMSNorm over head_dim on q and k before RoPE (Qwen3, Gemma 3)
  bool qk_norm_over_heads = false;  // ... over all heads of q, and of k, instead: weights [q_dim], [kv_dim] (OLMo 2)
  double norm_weight_offset = 0;    // added to the weight of every RMSNorm: 1 where it is stored as weight - 1 (Gemma)
  bool input_norms = true;       // RMSNorm on what attention and MLP read; else they read the residual stream (OLMo 2)
  bool output_norms = false;     // RMSNorm on what attention and MLP add to the residual stream (Gemma, OLMo 2)
  double embed_scale = 1;        // of embedded ids, a number of `dtype`; input embeddings come scaled (Gemma)
  double attention_softcap = 0;  // scores become softcap * tanh(score / softcap); 0: as they are (Gemma 2)
  std::vector<int64_t> window;   // [num_layers]; a query sees itself and window - 1 positions before it; 0: all
  std::vector<int64_t> rope_table;    // [num_layers]; which of a call's tables of cos and sin turns the layer: 0 or 1
  std::vector<int64_t> sparse;        // [num_layers]; 1: a mixture of experts in the place of the MLP (Mixtral)
  int64_t num_experts = 0;            // of a sparse layer
  int64_t experts_per_token = 0;      // how many of them a token goes through
  int64_t moe_intermediate_size = 0;  // of one expert
  bool norm_topk = false;             // the weights of a token's experts sum to one; else they are probabilities

  int64_t q_dim() const { return num_heads * head_dim; }
  int64_t kv_dim() const { return num_kv_heads * head_dim; }
  bool has_local_rope() const;  // does some layer take table 1?
  bool has_experts() const;     // is some layer sparse?

  // The tensors that `pop::load` takes, in its order.
  std::vector<WeightSlot> weight_slots() const;

  // Throws std::invalid_argument naming the field, what was expected and what came.
  void validate() const;

  std::string to_json() const;
  static ModelSpec from_json(const std::string& text);

 private:
  void validate_experts() const;
};

}  // namespace pop
