#include "torch/foreign_ops.h"

#include <map>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>

namespace pop::foreign {

// Operators behind torch/csrc/stable/ops.h are not listed: its wrappers pass the version that they were built with, and
// torch adapts the call.
const char* const kSchemas =
    "aten::mm.out(Tensor self, Tensor mat2, *, Tensor(a!) out) -> Tensor(a!)\n"
    "aten::addmm.out(Tensor self, Tensor mat1, Tensor mat2, *, Scalar beta=1, Scalar alpha=1, Tensor(a!) out) "
    "-> Tensor(a!)\n"
    "aten::mul.Tensor(Tensor self, Tensor other) -> Tensor\n"
    "aten::detach(Tensor(a) self) -> Tensor(a)\n"
    "aten::is_neg(Tensor self) -> bool\n"
    "aten::resolve_neg(Tensor(a) self) -> Tensor(a)\n"
    "aten::_scaled_mm.out(Tensor self, Tensor mat2, Tensor scale_a, Tensor scale_b, Tensor? bias=None, "
    "Tensor? scale_result=None, ScalarType? out_dtype=None, bool use_fast_accum=False, *, Tensor(a!) out) "
    "-> Tensor(a!)\n"
    "aten::_grouped_mm(Tensor self, Tensor mat2, Tensor? offs=None, Tensor? bias=None, ScalarType? out_dtype=None) "
    "-> Tensor\n"
    "aten::scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, "
    "float dropout_p=0., bool is_causal=False, *, float? scale=None, bool enable_gqa=False) -> Tensor\n"
    "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, "
    "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, "
    "SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, "
    "Tensor? alibi_slopes=None, Tensor? block_table=None, int? num_splits=None) -> (Tensor output, "
    "Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)\n"
    "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, "
    "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, "
    "SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, "
    "Tensor? alibi_slopes=None) -> (Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, "
    "Tensor debug_attn_mask)\n"
    "mkldnn::_reorder_linear_weight(Tensor self, int? batch_size=None) -> Tensor Y\n"
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) "
    "-> Tensor Y\n"
    "flash_attn_3::fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, "
    "Tensor? q_v=None, Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, "
    "int? max_seqlen_k=None, Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, "
    "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, "
    "Tensor? k_descale=None, Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, "
    "int window_size_left=-1, int window_size_right=-1, int attention_chunk=0, float softcap=0., "
    "bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, "
    "int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)\n"
    "flash_attn::_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, "
    "SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax) "
    "-> (Tensor, Tensor, Tensor, Tensor)";

namespace {

struct Found {
  int variant;
  std::string reason;
};

struct Table {
  std::shared_mutex mutex;
  std::map<std::string, Found> found;
};

Table& table() {
  static Table instance;
  return instance;
}

Found find(const std::string& name) {
  std::shared_lock lock(table().mutex);
  const auto entry = table().found.find(name);
  if (entry != table().found.end()) return entry->second;
  return name.starts_with("aten::") ? Found{0, ""} : Found{-1, "not looked for"};
}

}  // namespace

void set_variant(const std::string& name, int variant, const std::string& reason) {
  std::unique_lock lock(table().mutex);
  table().found[name] = {variant, reason};
}

int variant_of(const std::string& name) { return find(name).variant; }

std::string reason_against(const std::string& name) {
  const Found found = find(name);
  return found.variant < 0 ? found.reason : "";
}

int require(const std::string& name) {
  const Found found = find(name);
  if (found.variant < 0) throw std::runtime_error(name + ": disabled: " + found.reason);
  return found.variant;
}

}  // namespace pop::foreign
