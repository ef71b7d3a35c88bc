// The schemas of the operators that write into their arguments, which torch/negated.h reads, too.
#pragma once

namespace pop {

inline constexpr char kPrefillSchema[] =
    "prefill(int model, Tensor input, Tensor cos, Tensor sin, Tensor cu_seqlens, Tensor past_lens, "
    "Tensor cache_start, Tensor boundary, Tensor logits_to_keep, Tensor(a!)[] key_cache, Tensor(b!)[] value_cache, "
    "Tensor? slot_table=None, bool restore_on_error=True, bool window_only=False, Tensor? cos_local=None, "
    "Tensor? sin_local=None, Tensor? blocks=None, Tensor? feature_index=None, Tensor[]? features=None) -> Tensor";

inline constexpr char kAddRmsNormSchema[] =
    "add_rms_norm(Tensor(a!) x, Tensor delta, Tensor weight, float eps, Tensor? delta_bias=None, "
    "Tensor? delta_norm=None, float weight_offset=0.0, float delta_scale=1.0) -> Tensor";

inline constexpr char kRopeCacheWriteSchema[] =
    "rope_cache_write(Tensor(a!) query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor cu_seqlens, "
    "Tensor past_lens, Tensor cache_start, Tensor(b!) key_cache, Tensor(c!) value_cache, Tensor? q_norm=None, "
    "Tensor? k_norm=None, float norm_eps=1e-6, Tensor? slot_table=None, float norm_offset=0.0, "
    "bool interleaved=False, bool norm_after=False) -> ()";

inline constexpr char kKvProjectSchema[] =
    "kv_project(Tensor hidden, Tensor weight, Tensor cos, Tensor sin, Tensor cu_seqlens, Tensor past_lens, "
    "Tensor cache_start, float eps, Tensor(a!)[] key_cache, Tensor(b!)[] value_cache, Tensor[]? k_bias=None, "
    "Tensor[]? v_bias=None, Tensor[]? k_norm=None, Tensor? slot_table=None, float norm_offset=0.0, "
    "bool interleaved=False, bool norm_after=False) -> ()";

}  // namespace pop
