// The shape of a decoder-only transformer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pop {

enum class DType { f32, bf16, f16 };

int64_t element_size(DType dtype);   // bytes
const char* to_string(DType dtype);  // "float32", "bfloat16", "float16"
DType parse_dtype(const std::string& name);

// The non-linearity of the gated MLP: down(act(gate(x)) * up(x)). With clamped_swiglu the argument of down is another
// function of gate(x) and up(x) (row_math.h).
enum class Activation { silu, gelu_tanh, gelu, clamped_swiglu };

const char* to_string(Activation activation);  // "silu", "gelu_tanh", "gelu", "clamped_swiglu"
Activation parse_activation(const std::string& name);

// The scores of a router of experts: probabilities over all experts, or a sigmoid of each logit.
enum class RouterScores { softmax, sigmoid };

const char* to_string(RouterScores scores);  // "softmax", "sigmoid"
RouterScores parse_router_scores(const std::string& name);

inline constexpr int64_t kMaxExperts = 4096;

// How q and k are turned.
struct RopeForm {
  bool interleaved = false;  // pairs of channels are (2i, 2i + 1); false: (i, i + rotary_dim / 2)
  bool norm_after = false;   // RMSNorm of q and k per head follows RoPE; false: it comes before
};

// One tensor that the runtime reads. `layer` is -1 for a tensor outside the layers.
struct WeightSlot {
  std::string name;  // "embed_tokens", "norm", "layers.3.k_proj", "layers.3.k_bias", ...
  int64_t layer;
  std::vector<int64_t> shape;
  DType dtype;
};

// How a field of ModelSpec gets its value in the Python constructor. In JSON every field is required.
enum class Default {
  none,     // required
  stated,   // the member's initialiser
  derived,  // computed from other fields (ModelSpec::fill_derived)
};

// The values that a numeric field may have by itself. ModelSpec::validate checks rules between fields.
enum class Range { any, positive, not_negative };

struct ModelSpec {
  std::string architecture;  // informational, such as "llama"
  DType dtype = DType::f32;
  int64_t num_layers = 0;
  int64_t hidden_size = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t rotary_dim = 0;         // leading channels of a head that RoPE turns; pairs are (i, i + rotary_dim / 2)
  bool rope_interleaved = false;  // pairs are (2i, 2i + 1) instead (GLM, ERNIE)
  bool query_rope = false;        // q reads cos/sin table 1, which then holds a scale by position, too (Ministral 3)
  int64_t intermediate_size = 0;
  int64_t vocab_size = 0;
  double rms_norm_eps = 1e-6;
  double attention_scale = 0;  // softmax(scale * q.k)
  Activation activation = Activation::silu;
  double swiglu_alpha = 1.702, swiglu_limit = 7;  // of clamped_swiglu
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;             // RMSNorm over head_dim on q and k before RoPE (Qwen3, Gemma 3)
  bool qk_norm_over_heads = false;  // that norm runs over all heads of q, and of k: weights [q_dim], [kv_dim] (OLMo 2)
  bool qk_norm_after_rope = false;  // that norm follows RoPE (HunYuan)
  double norm_weight_offset = 0;    // added to every RMSNorm weight: 1 where weight - 1 is stored (Gemma)
  bool input_norms = true;       // RMSNorm before attention and MLP; without it they read the residual stream (OLMo 2)
  bool output_norms = false;     // RMSNorm on what attention and MLP add to the residual stream (Gemma, OLMo 2)
  double residual_scale = 1;     // multiplies what attention and MLP add to the residual stream (Granite)
  double embed_scale = 1;        // multiplies embedded ids; where only those, a number of `dtype` (Gemma)
  bool scale_inputs = false;     // embed_scale multiplies input embeddings, too (Granite)
  double attention_softcap = 0;  // scores become softcap * tanh(score / softcap); 0: no cap (Gemma 2)
  bool attention_sinks = false;  // one more score of each head, which adds no value (gpt-oss)
  std::vector<int64_t> window;   // [num_layers]; a query sees itself and window - 1 positions before it; 0: all
  std::vector<int64_t> rope_table;  // [num_layers]; 0 or 1: which of the call's two cos/sin tables the layer uses
  std::vector<int64_t> sparse;      // [num_layers]; 1: a mixture of experts replaces the MLP (Mixtral)
  int64_t num_experts = 0;          // of a sparse layer
  int64_t experts_per_token = 0;
  int64_t moe_intermediate_size = 0;  // of one expert
  bool norm_topk = false;    // true: the weights of a token's experts are divided by their sum; false: they are scores
  double norm_topk_eps = 0;  // added to that sum
  double routed_scale = 1;   // multiplies the weights, after that
  RouterScores router_scores = RouterScores::softmax;
  bool router_bias = false;              // a bias per expert is added to scores to choose experts, not to weigh them
  bool router_float32 = false;           // weights, bias and logits of the router are float32 in every dtype
  int64_t shared_intermediate_size = 0;  // of the MLP that sparse layers add for every token; 0: none
  bool shared_gate = false;              // its output is multiplied by a sigmoid of a learned product per token
  bool router_logit_bias = false;        // added to the router's logits; with softmax scores
  bool expert_bias = false;              // each expert has biases
  bool experts_transposed = false;       // matrices of experts are stored as [in, out] (gpt-oss)
  bool experts_interleaved = false;      // gate and up channels take turns, instead of gate before up (gpt-oss)

  int64_t q_dim() const { return num_heads * head_dim; }
  int64_t kv_dim() const { return num_kv_heads * head_dim; }
  bool has_local_rope() const;  // some layer, or q in every layer, uses RoPE table 1
  RopeForm rope_form() const { return {.interleaved = rope_interleaved, .norm_after = qk_norm_after_rope}; }
  bool has_experts() const;  // some layer is sparse
  DType router_dtype() const { return router_float32 ? DType::f32 : dtype; }

  // Calls visit(name, member, default, range) for every field, in the order of the JSON form. JSON, the range checks
  // and the Python binding are made from this list; python/pop_ext/_core.pyi repeats it.
  template <class Visitor>
  static void for_each_field(Visitor&& visit) {
    visit("architecture", &ModelSpec::architecture, Default::none, Range::any);
    visit("dtype", &ModelSpec::dtype, Default::none, Range::any);
    visit("num_layers", &ModelSpec::num_layers, Default::none, Range::positive);
    visit("hidden_size", &ModelSpec::hidden_size, Default::none, Range::positive);
    visit("num_heads", &ModelSpec::num_heads, Default::none, Range::positive);
    visit("num_kv_heads", &ModelSpec::num_kv_heads, Default::none, Range::positive);
    visit("head_dim", &ModelSpec::head_dim, Default::none, Range::positive);
    visit("rotary_dim", &ModelSpec::rotary_dim, Default::derived, Range::positive);
    visit("rope_interleaved", &ModelSpec::rope_interleaved, Default::stated, Range::any);
    visit("query_rope", &ModelSpec::query_rope, Default::stated, Range::any);
    visit("intermediate_size", &ModelSpec::intermediate_size, Default::none, Range::positive);
    visit("vocab_size", &ModelSpec::vocab_size, Default::none, Range::positive);
    visit("rms_norm_eps", &ModelSpec::rms_norm_eps, Default::stated, Range::positive);
    visit("attention_scale", &ModelSpec::attention_scale, Default::derived, Range::positive);
    visit("activation", &ModelSpec::activation, Default::stated, Range::any);
    visit("swiglu_alpha", &ModelSpec::swiglu_alpha, Default::stated, Range::positive);
    visit("swiglu_limit", &ModelSpec::swiglu_limit, Default::stated, Range::positive);
    visit("qkv_bias", &ModelSpec::qkv_bias, Default::stated, Range::any);
    visit("o_bias", &ModelSpec::o_bias, Default::stated, Range::any);
    visit("mlp_bias", &ModelSpec::mlp_bias, Default::stated, Range::any);
    visit("qk_norm", &ModelSpec::qk_norm, Default::stated, Range::any);
    visit("qk_norm_over_heads", &ModelSpec::qk_norm_over_heads, Default::stated, Range::any);
    visit("qk_norm_after_rope", &ModelSpec::qk_norm_after_rope, Default::stated, Range::any);
    visit("norm_weight_offset", &ModelSpec::norm_weight_offset, Default::stated, Range::not_negative);
    visit("input_norms", &ModelSpec::input_norms, Default::stated, Range::any);
    visit("output_norms", &ModelSpec::output_norms, Default::stated, Range::any);
    visit("residual_scale", &ModelSpec::residual_scale, Default::stated, Range::positive);
    visit("embed_scale", &ModelSpec::embed_scale, Default::stated, Range::positive);
    visit("scale_inputs", &ModelSpec::scale_inputs, Default::stated, Range::any);
    visit("attention_softcap", &ModelSpec::attention_softcap, Default::stated, Range::not_negative);
    visit("attention_sinks", &ModelSpec::attention_sinks, Default::stated, Range::any);
    visit("window", &ModelSpec::window, Default::derived, Range::any);
    visit("rope_table", &ModelSpec::rope_table, Default::derived, Range::any);
    visit("sparse", &ModelSpec::sparse, Default::derived, Range::any);
    visit("num_experts", &ModelSpec::num_experts, Default::stated, Range::any);
    visit("experts_per_token", &ModelSpec::experts_per_token, Default::stated, Range::any);
    visit("moe_intermediate_size", &ModelSpec::moe_intermediate_size, Default::stated, Range::any);
    visit("norm_topk", &ModelSpec::norm_topk, Default::stated, Range::any);
    visit("norm_topk_eps", &ModelSpec::norm_topk_eps, Default::stated, Range::not_negative);
    visit("routed_scale", &ModelSpec::routed_scale, Default::stated, Range::positive);
    visit("router_scores", &ModelSpec::router_scores, Default::stated, Range::any);
    visit("router_bias", &ModelSpec::router_bias, Default::stated, Range::any);
    visit("router_float32", &ModelSpec::router_float32, Default::stated, Range::any);
    visit("shared_intermediate_size", &ModelSpec::shared_intermediate_size, Default::stated, Range::not_negative);
    visit("shared_gate", &ModelSpec::shared_gate, Default::stated, Range::any);
    visit("router_logit_bias", &ModelSpec::router_logit_bias, Default::stated, Range::any);
    visit("expert_bias", &ModelSpec::expert_bias, Default::stated, Range::any);
    visit("experts_transposed", &ModelSpec::experts_transposed, Default::stated, Range::any);
    visit("experts_interleaved", &ModelSpec::experts_interleaved, Default::stated, Range::any);
  }

  // Sets the field `name`, one with Default::derived, from the other fields.
  void fill_derived(const std::string& name);

  // The tensors that `pop::load` takes, in its order.
  std::vector<WeightSlot> weight_slots() const;

  // Throws std::invalid_argument naming the field, what was expected and what came.
  void validate() const;

  std::string to_json() const;
  static ModelSpec from_json(const std::string& text);

 private:
  void validate_layer_lists() const;
  void validate_experts() const;
};

}  // namespace pop
