// The operators of namespace `pop`: every schema, once. Implementations per dispatch key are
// in ops_prefill.cpp, ops_rows.cpp and ops_cache.cpp, fake kernels in Python (pop_ext). Those that return str are
// implemented in Python (pop_ext.ops.texts), over their twins that return UTF-8: torch, up to 2.13, never frees a
// string that an operator of the stable ABI returns.
#include <torch/csrc/stable/library.h>

#include "torch/schemas.h"

STABLE_TORCH_LIBRARY(pop, m) {
  // Loads a model and returns its handle, which `unload` frees and which is never reused. Weights are shared, not
  // copied; only the K/V weights of omitted layers are folded into new memory. `projections` replace those of the
  // plan's omitted layers, in the plan's order. `fp8` or `int8` makes copies of the other layers' matrices in 8-bit
  // floats or integers, `prepack` copies in the backend's layout for products of many rows. `scales` has one tensor for
  // each weight: float32 [out_features] for an int8 matrix, empty for the others.
  m.def(
      "load(str spec, str plan, Tensor[] weights, Tensor[]? projections=None, bool fp8=False, bool prepack=False, "
      "bool int8=False, Tensor[]? scales=None) -> int");
  // The reason why a model of that spec, with its weights on the device of `like`, cannot have `products`, which is
  // "fp8" or "int8"; "" if it can.
  m.def("products_missing(str products, str spec, Tensor like) -> str");
  m.def("products_missing_utf8(str products, str spec, Tensor like) -> int[]");
  // The same for `prepack`.
  m.def("prepack_missing(str spec, Tensor like) -> str");
  m.def("prepack_missing_utf8(str spec, Tensor like) -> int[]");
  // The reason why the kernels of this build cannot run on the device of `like`; "" if they can.
  m.def("device_missing(Tensor like) -> str");
  m.def("device_missing_utf8(Tensor like) -> int[]");
  m.def("unload(int model) -> ()");
  m.def("info(int model) -> str");
  m.def("info_utf8(int model) -> int[]");
  // Bytes of the folded and copied weights.
  m.def("extra_bytes(int model) -> int");
  // The index in `weights` of one whose memory, dtype or (if it was folded or copied) values changed since `load`; -1
  // for none.
  m.def("stale_index(int model) -> int");
  // Its name; "" for none.
  m.def("stale_weight(int model) -> str");
  m.def("stale_weight_utf8(int model) -> int[]");

  // Prefills packed sequences by the model's plan and returns the hidden states of the wanted rows after the final
  // norm. See docs/ops.md.
  m.def(pop::kPrefillSchema);

  // Building blocks.
  m.def("linear(Tensor x, Tensor weight) -> Tensor");
  // The products of a prefill with `fp8`: rows of x and of the weight in 8-bit floats (e4m3).
  m.def("fp8_linear(Tensor x, Tensor weight, Tensor weight_scale) -> Tensor");
  m.def("quantize_rows(Tensor x, str products=\"fp8\") -> (Tensor, Tensor)");
  // The same with `int8`; without `round_rows` only the weight is in integers.
  m.def("int8_linear(Tensor x, Tensor weight, Tensor weight_scale, bool round_rows=True) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float weight_offset=0.0) -> Tensor");
  m.def(pop::kAddRmsNormSchema);
  m.def(
      "gated_act(Tensor gate, Tensor up, str activation=\"silu\", Tensor? gate_bias=None, Tensor? up_bias=None, "
      "float swiglu_alpha=1.702, float swiglu_limit=7.0) -> Tensor");
  m.def(pop::kRopeCacheWriteSchema);
  m.def(
      "attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cu_seqlens, Tensor past_lens, "
      "Tensor cache_start, float scale, int window=0, Tensor? slot_table=None, float softcap=0.0, "
      "Tensor? blocks=None, Tensor? sinks=None) -> Tensor");
  m.def("fold_kv(Tensor[] k_proj, Tensor[] v_proj, Tensor[] input_norm, float norm_offset=0.0) -> Tensor");
  m.def(pop::kKvProjectSchema);

  // For the schema checks at import and for `pop-ext info`.
  m.def("foreign_schemas() -> str");
  m.def("foreign_schemas_utf8() -> int[]");
  // Records that the operator `name` of another library has its schema number `variant`, or is missing (-1) and why.
  m.def("set_foreign(str name, int variant, str reason) -> ()");
  m.def("cpu_isa() -> str");
  m.def("cpu_isa_utf8() -> int[]");
  m.def("int8_isa() -> str");
  m.def("int8_isa_utf8() -> int[]");
  // Sets the function that a prefill polls between layers (torch/interrupts.h), by its address; 0: none.
  m.def("set_interrupt_check(int address) -> ()");
  // Sets an option of a backend for the calls of this thread, and returns the value before; for measuring.
  m.def("tune(str option, int value) -> int");
}
