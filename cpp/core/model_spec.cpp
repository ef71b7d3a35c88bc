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

// In the order of the enums.
constexpr const char* kDTypeNames[] = {"float32", "bfloat16", "float16"};
constexpr const char* kActivationNames[] = {"silu", "gelu_tanh", "gelu", "clamped_swiglu"};
constexpr const char* kRouterScoresNames[] = {"softmax", "sigmoid"};

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
  fail(field, "one of " + expected, shortened(name));
}

void check_range(const char* field, int64_t value, Range range) {
  const int64_t least = range == Range::positive ? 1 : 0;
  if (range == Range::any || value >= least) return;
  fail(field, "an integer >= " + std::to_string(least), std::to_string(value));
}

void check_range(const char* field, double value, Range range) {
  if (range == Range::any) return;
  if (std::isfinite(value) && (range == Range::positive ? value > 0 : value >= 0)) return;
  fail(field, range == Range::positive ? "a finite number > 0" : "a finite number >= 0", rounded(value));
}

bool has_one(const std::vector<int64_t>& entries) {
  return std::find(entries.begin(), entries.end(), 1) != entries.end();
}

// One entry per layer, each of which `allowed` accepts; `expected` says which those are.
template <class Allowed>
void check_layer_list(const char* field, const std::vector<int64_t>& entries, int64_t num_layers,
                      const Allowed& allowed, const char* expected) {
  if (static_cast<int64_t>(entries.size()) != num_layers) {
    fail(field, "an entry for each of " + std::to_string(num_layers) + " layers", std::to_string(entries.size()));
  }
  for (const int64_t entry : entries) {
    if (!allowed(entry)) fail(field, expected, std::to_string(entry));
  }
}

void read(const json::Members& members, const char* name, std::string& value) { value = members.string(name); }
void read(const json::Members& members, const char* name, DType& value) { value = parse_dtype(members.string(name)); }
void read(const json::Members& members, const char* name, Activation& value) {
  value = parse_activation(members.string(name));
}
void read(const json::Members& members, const char* name, RouterScores& value) {
  value = parse_router_scores(members.string(name));
}
void read(const json::Members& members, const char* name, int64_t& value) { value = members.integer(name); }
void read(const json::Members& members, const char* name, double& value) { value = members.number(name); }
void read(const json::Members& members, const char* name, bool& value) { value = members.boolean(name); }
void read(const json::Members& members, const char* name, std::vector<int64_t>& value) {
  value = members.integers(name);
}

}  // namespace

int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

const char* to_string(DType dtype) { return kDTypeNames[static_cast<int>(dtype)]; }

DType parse_dtype(const std::string& name) { return parse_enum<DType>("dtype", kDTypeNames, name); }

const char* to_string(Activation activation) { return kActivationNames[static_cast<int>(activation)]; }

Activation parse_activation(const std::string& name) {
  return parse_enum<Activation>("activation", kActivationNames, name);
}

const char* to_string(RouterScores scores) { return kRouterScoresNames[static_cast<int>(scores)]; }

RouterScores parse_router_scores(const std::string& name) {
  return parse_enum<RouterScores>("router_scores", kRouterScoresNames, name);
}

std::vector<WeightSlot> ModelSpec::weight_slots() const {
  std::vector<WeightSlot> slots{{"embed_tokens", -1, {vocab_size, hidden_size}, dtype},
                                {"norm", -1, {hidden_size}, dtype}};
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    const std::string prefix = "layers." + std::to_string(layer) + ".";
    const auto add = [&](const char* name, std::vector<int64_t> shape) {
      slots.push_back({prefix + name, layer, std::move(shape), dtype});
    };
    const auto add_linear = [&](const std::string& name, int64_t out, int64_t in, bool bias) {
      slots.push_back({prefix + name + "_proj", layer, {out, in}, dtype});
      if (bias) slots.push_back({prefix + name + "_bias", layer, {out}, dtype});
    };
    if (input_norms) add("input_norm", {hidden_size});
    add_linear("q", q_dim(), hidden_size, qkv_bias);
    add_linear("k", kv_dim(), hidden_size, qkv_bias);
    add_linear("v", kv_dim(), hidden_size, qkv_bias);
    if (qk_norm) add("q_norm", {qk_norm_over_heads ? q_dim() : head_dim});
    if (qk_norm) add("k_norm", {qk_norm_over_heads ? kv_dim() : head_dim});
    if (attention_sinks) add("sinks", {num_heads});
    add_linear("o", hidden_size, q_dim(), o_bias);
    if (output_norms) add("attention_out_norm", {hidden_size});
    if (input_norms) add("post_norm", {hidden_size});
    if (sparse[layer] != 0) {
      const auto add_experts = [&](const std::string& name, int64_t out, int64_t in) {
        const auto [rows, columns] = experts_transposed ? std::pair(in, out) : std::pair(out, in);
        add(name.c_str(), {num_experts, rows, columns});
        if (expert_bias) add((name + "_bias").c_str(), {num_experts, out});
      };
      slots.push_back({prefix + "router", layer, {num_experts, hidden_size}, router_dtype()});
      if (router_logit_bias) slots.push_back({prefix + "router_logit_bias", layer, {num_experts}, router_dtype()});
      if (router_bias) slots.push_back({prefix + "router_bias", layer, {num_experts}, router_dtype()});
      add_experts("experts_gate_up", 2 * moe_intermediate_size, hidden_size);
      add_experts("experts_down", hidden_size, moe_intermediate_size);
      if (shared_intermediate_size > 0) {
        add_linear("shared_gate", shared_intermediate_size, hidden_size, false);
        add_linear("shared_up", shared_intermediate_size, hidden_size, false);
        add_linear("shared_down", hidden_size, shared_intermediate_size, false);
        if (shared_gate) add("shared_gate", {1, hidden_size});
      }
    } else {
      add_linear("gate", intermediate_size, hidden_size, mlp_bias);
      add_linear("up", intermediate_size, hidden_size, mlp_bias);
      add_linear("down", hidden_size, intermediate_size, mlp_bias);
    }
    if (output_norms) add("mlp_out_norm", {hidden_size});
  }
  return slots;
}

bool ModelSpec::has_local_rope() const { return query_rope || has_one(rope_table); }

bool ModelSpec::has_experts() const { return has_one(sparse); }

void ModelSpec::fill_derived(const std::string& name) {
  const std::vector<int64_t> zeros(num_layers > 0 ? num_layers : 0, 0);
  if (name == "rotary_dim") rotary_dim = head_dim;
  if (name == "attention_scale") attention_scale = std::pow(static_cast<double>(head_dim), -0.5);
  if (name == "window") window = zeros;
  if (name == "rope_table") rope_table = zeros;
  if (name == "sparse") sparse = zeros;
}

void ModelSpec::validate() const {
  for_each_field([&](const char* name, auto member, Default, Range range) {
    using Value = std::decay_t<decltype(this->*member)>;
    if constexpr (std::is_same_v<Value, int64_t> || std::is_same_v<Value, double>) {
      check_range(name, this->*member, range);
    }
  });
  if (qk_norm_over_heads && (!qk_norm || qkv_bias)) {
    // Biases are applied on the way to the cache, which is after these norms.
    fail("qk_norm_over_heads", "qk_norm and no qkv_bias", "another combination");
  }
  if (qk_norm_after_rope && (!qk_norm || qk_norm_over_heads)) {
    fail("qk_norm_after_rope", "qk_norm without qk_norm_over_heads", "another combination");
  }
  if (num_heads % num_kv_heads != 0) {
    fail("num_kv_heads", "a divisor of num_heads (" + std::to_string(num_heads) + ")", std::to_string(num_kv_heads));
  }
  if (rotary_dim % 2 != 0 || rotary_dim > head_dim) {
    fail("rotary_dim", "an even number <= head_dim (" + std::to_string(head_dim) + ")", std::to_string(rotary_dim));
  }
  validate_layer_lists();
  // A scale in cos and sin reaches only the channels that are turned, and q cannot read a third table.
  if (query_rope && (rotary_dim != head_dim || has_one(rope_table))) {
    fail("query_rope", "rotary_dim = head_dim and rope_table 0 in every layer", "another combination");
  }
  if (has_experts()) validate_experts();
}

void ModelSpec::validate_layer_lists() const {
  check_layer_list("window", window, num_layers, [](int64_t size) { return size >= 0; }, "sizes >= 0 (0: no window)");
  // The kernels compare positions as 32-bit integers.
  check_layer_list("window", window, num_layers, [](int64_t size) { return size <= INT32_MAX; }, "sizes <= 2147483647");
  const auto is_0_or_1 = [](int64_t entry) { return entry == 0 || entry == 1; };
  check_layer_list("rope_table", rope_table, num_layers, is_0_or_1, "tables 0 and 1");
  check_layer_list("sparse", sparse, num_layers, is_0_or_1, "0 (dense) and 1 (experts)");
}

void ModelSpec::validate_experts() const {
  check_range("num_experts", num_experts, Range::positive);
  check_range("moe_intermediate_size", moe_intermediate_size, Range::positive);
  if (experts_per_token < 1 || experts_per_token > num_experts) {
    fail("experts_per_token", "1 to num_experts (" + std::to_string(num_experts) + ")",
         std::to_string(experts_per_token));
  }
  // Rows and experts of a call are counted in 32-bit integers.
  if (num_experts > kMaxExperts) {
    fail("num_experts", "at most " + std::to_string(kMaxExperts), std::to_string(num_experts));
  }
  if (router_logit_bias && router_scores != RouterScores::softmax) {
    fail("router_logit_bias", "router_scores softmax", to_string(router_scores));
  }
  if (router_bias && router_scores != RouterScores::sigmoid) {
    fail("router_bias", "router_scores sigmoid", to_string(router_scores));
  }
  if (shared_gate && shared_intermediate_size == 0) fail("shared_gate", "shared_intermediate_size > 0", "0");
}

std::string ModelSpec::to_json() const {
  json::Writer members;
  for_each_field([&](const char* name, auto member, Default, Range) {
    if constexpr (std::is_enum_v<std::decay_t<decltype(this->*member)>>) {
      members.add(name, to_string(this->*member));
    } else {
      members.add(name, this->*member);
    }
  });
  return members.text();
}

// No field may be left out and no other is known: a field that is passed over would change the result silently.
ModelSpec ModelSpec::from_json(const std::string& text) {
  const json::Members members(text, "model spec");
  ModelSpec spec;
  std::vector<std::string> names;
  for_each_field([&](const char* name, auto member, Default, Range) {
    read(members, name, spec.*member);
    names.push_back(name);
  });
  members.only(std::move(names));
  spec.validate();
  return spec;
}

}  // namespace pop
