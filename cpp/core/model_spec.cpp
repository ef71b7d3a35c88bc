#include "core/model_spec.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "core/json.h"
#include "core/text.h"

namespace pop {

namespace {

constexpr const char* kDTypeNames[] = {"float32", "bfloat16", "float16"};  // in the order of DType
constexpr const char* kActivationNames[] = {"silu", "gelu_tanh", "gelu"};  // in the order of Activation

[[noreturn]] void fail(const std::string& field, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(field + ": expected " + expected + ", got " + got);
}

template <class Enum, size_t n>
Enum parse_enum(const char* field, const char* const (&names)[n], const std::string& name) {
  std::string expected;
  for (size_t i = 0; i < n; ++i) {
    if (name == names[i]) return static_cast<Enum>(i);
    expected += (i == 0 ? "" : ", ") + std::string(names[i]);
  }
  fail(field, "one of " + expected, name);
}

void positive(const char* field, int64_t value) {
  if (value < 1) fail(field, "an integer >= 1", std::to_string(value));
}

void positive(const char* field, double value) {
  if (value > 0 && std::isfinite(value)) return;
  fail(field, "a finite number > 0", rounded(value));
}

void not_negative(const char* field, double value) {
  if (value >= 0 && std::isfinite(value)) return;
  fail(field, "a finite number >= 0", rounded(value));
}

// The JSON form: every field is required and no other is known, since a field that is passed
// over would change what is computed.
template <class Spec, class Visitor>
void visit_fields(Spec& spec, Visitor& visit) {
  visit("architecture", spec.architecture);
  visit("dtype", spec.dtype);
  visit("num_layers", spec.num_layers);
  visit("hidden_size", spec.hidden_size);
  visit("num_heads", spec.num_heads);
  visit("num_kv_heads", spec.num_kv_heads);
  visit("head_dim", spec.head_dim);
  visit("rotary_dim", spec.rotary_dim);
  visit("intermediate_size", spec.intermediate_size);
  visit("vocab_size", spec.vocab_size);
  visit("rms_norm_eps", spec.rms_norm_eps);
  visit("attention_scale", spec.attention_scale);
  visit("activation", spec.activation);
  visit("qkv_bias", spec.qkv_bias);
  visit("o_bias", spec.o_bias);
  visit("mlp_bias", spec.mlp_bias);
  visit("qk_norm", spec.qk_norm);
  visit("qk_norm_over_heads", spec.qk_norm_over_heads);
  visit("norm_weight_offset", spec.norm_weight_offset);
  visit("input_norms", spec.input_norms);
  visit("output_norms", spec.output_norms);
  visit("embed_scale", spec.embed_scale);
  visit("attention_softcap", spec.attention_softcap);
  visit("window", spec.window);
  visit("rope_table", spec.rope_table);
  visit("sparse", spec.sparse);
  visit("num_experts", spec.num_experts);
  visit("experts_per_token", spec.experts_per_token);
  visit("moe_intermediate_size", spec.moe_intermediate_size);
  visit("norm_topk", spec.norm_topk);
}

struct FieldWriter {
  json::Object fields;

  template <class T>
  void operator()(const char* name, const T& value) {
    if constexpr (std::is_enum_v<T>) {
      fields.emplace_back(name, to_string(value));
    } else {
      fields.emplace_back(name, value);
    }
  }
};

struct FieldReader {
  const json::Members& members;
  std::vector<std::string> names;

  template <class T>
  void operator()(const char* name, T& value) {
    names.push_back(name);
    read(name, value);
  }

  void read(const char* name, std::string& value) { value = members.string(name); }
  void read(const char* name, DType& value) { value = parse_dtype(members.string(name)); }
  void read(const char* name, Activation& value) { value = parse_activation(members.string(name)); }
  void read(const char* name, int64_t& value) { value = members.integer(name); }
  void read(const char* name, double& value) { value = members.number(name); }
  void read(const char* name, bool& value) { value = members.boolean(name); }
  void read(const char* name, std::vector<int64_t>& value) { value = members.integers(name); }
};

}  // namespace

int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

const char* to_string(DType dtype) { return kDTypeNames[static_cast<int>(dtype)]; }

DType parse_dtype(const std::string& name) { return parse_enum<DType>("dtype", kDTypeNames, name); }

const char* to_string(Activation activation) { return kActivationNames[static_cast<int>(activation)]; }

Activation parse_activation(const std::string& name) {
  return parse_enum<Activation>("activation", kActivationNames, name);
}

std::vector<WeightSlot> ModelSpec::weight_slots() const {
  std::vector<WeightSlot> slots{{"embed_tokens", -1, {vocab_size, hidden_size}}, {"norm", -1, {hidden_size}}};
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    const std::string prefix = "layers." + std::to_string(layer) + ".";
    const auto add = [&](const char* name, std::vector<int64_t> shape) {
      slots.push_back({prefix + name, layer, std::move(shape)});
    };
    const auto add_linear = [&](const std::string& name, int64_t out, int64_t in, bool bias) {
      slots.push_back({prefix + name + "_proj", layer, {out, in}});
      if (bias) slots.push_back({prefix + name + "_bias", layer, {out}});
    };
    if (input_norms) add("input_norm", {hidden_size});
    add_linear("q", q_dim(), hidden_size, qkv_bias);
    add_linear("k", kv_dim(), hidden_size, qkv_bias);
    add_linear("v", kv_dim(), hidden_size, qkv_bias);
    if (qk_norm) add("q_norm", {qk_norm_over_heads ? q_dim() : head_dim});
    if (qk_norm) add("k_norm", {qk_norm_over_heads ? kv_dim() : head_dim});
    add_linear("o", hidden_size, q_dim(), o_bias);
    if (output_norms) add("attention_out_norm", {hidden_size});
    if (input_norms) add("post_norm", {hidden_size});
    if (sparse[layer] != 0) {
      add("router", {num_experts, hidden_size});
      add("experts_gate_up", {num_experts, 2 * moe_intermediate_size, hidden_size});
      add("experts_down", {num_experts, hidden_size, moe_intermediate_size});
    } else {
      add_linear("gate", intermediate_size, hidden_size, mlp_bias);
      add_linear("up", intermediate_size, hidden_size, mlp_bias);
      add_linear("down", hidden_size, intermediate_size, mlp_bias);
    }
    if (output_norms) add("mlp_out_norm", {hidden_size});
  }
  return slots;
}

bool ModelSpec::has_local_rope() const {
  return std::find(rope_table.begin(), rope_table.end(), 1) != rope_table.end();
}

bool ModelSpec::has_experts() const { return std::find(sparse.begin(), sparse.end(), 1) != sparse.end(); }

void ModelSpec::validate_experts() const {
  if (static_cast<int64_t>(sparse.size()) != num_layers) {
    fail("sparse", "an entry for each of " + std::to_string(num_layers) + " layers", std::to_string(sparse.size()));
  }
  for (const int64_t entry : sparse) {
    if (entry != 0 && entry != 1) fail("sparse", "0 (dense) and 1 (experts)", std::to_string(entry));
  }
  if (!has_experts()) return;
  positive("num_experts", num_experts);
  positive("moe_intermediate_size", moe_intermediate_size);
  if (experts_per_token < 1 || experts_per_token > num_experts) {
    fail("experts_per_token", "1 to num_experts (" + std::to_string(num_experts) + ")",
         std::to_string(experts_per_token));
  }
  // Rows and experts of a call are counted in 32-bit integers.
  if (num_experts > kMaxExperts) {
    fail("num_experts", "at most " + std::to_string(kMaxExperts), std::to_string(num_experts));
  }
}

void ModelSpec::validate() const {
  positive("num_layers", num_layers);
  positive("hidden_size", hidden_size);
  positive("num_heads", num_heads);
  positive("num_kv_heads", num_kv_heads);
  positive("head_dim", head_dim);
  positive("rotary_dim", rotary_dim);
  positive("intermediate_size", intermediate_size);
  positive("vocab_size", vocab_size);
  positive("rms_norm_eps", rms_norm_eps);
  positive("attention_scale", attention_scale);
  positive("embed_scale", embed_scale);
  not_negative("norm_weight_offset", norm_weight_offset);
  not_negative("attention_softcap", attention_softcap);
  if (qk_norm_over_heads && (!qk_norm || qkv_bias || input_norms)) {
    // Row scale and biases come on the way to the cache, which is after these norms.
    fail("qk_norm_over_heads", "qk_norm, and neither input_norms nor qkv_bias", "another combination");
  }
  if (num_heads % num_kv_heads != 0) {
    fail("num_kv_heads", "a divisor of num_heads (" + std::to_string(num_heads) + ")", std::to_string(num_kv_heads));
  }
  if (rotary_dim % 2 != 0 || rotary_dim > head_dim) {
    fail("rotary_dim", "an even number <= head_dim (" + std::to_string(head_dim) + ")", std::to_string(rotary_dim));
  }
  if (static_cast<int64_t>(window.size()) != num_layers) {
    fail("window", "an entry for each of " + std::to_string(num_layers) + " layers", std::to_string(window.size()));
  }
  for (const int64_t size : window) {
    if (size < 0) fail("window", "sizes >= 0 (0: no window)", std::to_string(size));
    // The kernels compare positions as 32-bit integers.
    if (size > INT32_MAX) fail("window", "sizes <= 2147483647", std::to_string(size));
  }
  if (static_cast<int64_t>(rope_table.size()) != num_layers) {
    fail("rope_table", "an entry for each of " + std::to_string(num_layers) + " layers",
         std::to_string(rope_table.size()));
  }
  for (const int64_t table : rope_table) {
    if (table != 0 && table != 1) fail("rope_table", "tables 0 and 1", std::to_string(table));
  }
  validate_experts();
}

std::string ModelSpec::to_json() const {
  FieldWriter writer;
  visit_fields(*this, writer);
  return json::Value(writer.fields).dump();
}

ModelSpec ModelSpec::from_json(const std::string& text) {
  const json::Members members(json::parse(text, "model spec"), "model spec");
  ModelSpec spec;
  FieldReader reader{members, {}};
  visit_fields(spec, reader);
  members.only(reader.names);
  spec.validate();
  return spec;
}

}  // namespace pop
