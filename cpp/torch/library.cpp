// The operators of namespace `pop`: every schema, once. Implementations per dispatch key are
// in ops_prefill.cpp, ops_rows.cpp and ops_cache.cpp, fake kernels in python/pop_ext/operators.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pop, m) {
  // A model: weights are shared, not copied; only the K/V weights of omitted layers are folded
  // into new memory. `projections` stand in for those of the plan's omitted layers, in its order. With `fp8` the
  // products of the other layers read copies of their matrices in 8-bit floats, with `prepack` those of many rows
  // copies in the backend's layout. The handle is freed by `unload`, and never reused.
  m.def(
      "load(str spec, str plan, Tensor[] weights, Tensor[]? projections=None, bool fp8=False, bool prepack=False) "
      "-> int");
  // Why `fp8` is not for a model of that spec with its weights on the device of `like`; "" if it is.
  m.def("fp8_missing(str spec, Tensor like) -> str");
  // The same of `prepack`.
  m.def("prepack_missing(str spec, Tensor like) -> str");
  m.def("unload(int model) -> ()");
  m.def("info(int model) -> str");
  // Name of a weight whose memory, dtype or (where it was folded or copied) values changed since `load`; "" for
  // none.
  m.def("stale_weight(int model) -> str");

  // Prefill of packed sequences by the model's plan; hidden states of the wanted rows, final
  // norm applied. See docs/ops.md.
  m.def(
      "prefill(int model, Tensor input, Tensor cos, Tensor sin, Tensor cu_seqlens, Tensor past_lens, "
      "Tensor cache_start, Tensor boundary, Tensor logits_to_keep, Tensor(a!)[] key_cache, Tensor(b!)[] value_cache, "
      "Tensor? slot_table=None, bool restore_on_error=True, bool window_only=False, Tensor? cos_local=None, "
      "Tensor? sin_local=None, Tensor? blocks=None, Tensor? feature_index=None, Tensor[]? features=None) -> Tensor");

  // Building blocks.
  m.def("linear(Tensor x, Tensor weight) -> Tensor");
  // Rows of x, and the weight's, in 8-bit floats (e4m3): the products of a prefill with `fp8`.
  m.def("fp8_linear(Tensor x, Tensor weight, Tensor weight_scale) -> Tensor");
  m.def("quantize_rows(Tensor x) -> (Tensor, Tensor)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float weight_offset=0.0) -> Tensor");
  m.def(
      "add_rms_norm(Tensor(a!) x, Tensor delta, Tensor weight, float eps, Tensor? delta_bias=None, "
      "Tensor? delta_norm=None, float weight_offset=0.0) -> Tensor");
  m.def(
      "gated_act(Tensor gate, Tensor up, str activation=\"silu\", Tensor? gate_bias=None, Tensor? up_bias=None) "
      "-> Tensor");
  m.def(
      "rope_cache_write(Tensor(a!) query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor cu_seqlens, "
      "Tensor past_lens, Tensor cache_start, Tensor(b!) key_cache, Tensor(c!) value_cache, Tensor? q_norm=None, "
      "Tensor? k_norm=None, float norm_eps=1e-6, Tensor? slot_table=None, float norm_offset=0.0) -> ()");
  m.def(
      "attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cu_seqlens, Tensor past_lens, "
      "Tensor cache_start, float scale, int window=0, Tensor? slot_table=None, float softcap=0.0, "
      "Tensor? blocks=None) -> Tensor");
  m.def("fold_kv(Tensor[] k_proj, Tensor[] v_proj, Tensor[] input_norm, float norm_offset=0.0) -> Tensor");
  m.def(
      "kv_project(Tensor hidden, Tensor weight, Tensor cos, Tensor sin, Tensor cu_seqlens, Tensor past_lens, "
      "Tensor cache_start, float eps, Tensor(a!)[] key_cache, Tensor(b!)[] value_cache, "
      "Tensor[]? k_bias=None, Tensor[]? v_bias=None, Tensor[]? k_norm=None, Tensor? slot_table=None, float "
      "norm_offset=0.0) "
      "-> ()");

  // For the checks of python/pop_ext/operators.py and `pop-ext info`.
  m.def("foreign_schemas() -> str");
  // The operator `name` of another library is here under its schema number `variant`, or not (-1) for that reason.
  m.def("set_foreign(str name, int variant, str reason) -> ()");
  m.def("cpu_isa() -> str");
  // Sets an option of a backend and returns what it was, for measuring.
  m.def("tune(str option, int value) -> int");
}
