// The arguments of the kernels (backend/backend.h), as plain structs.
//
// Pointers are to memory of the backend's device, except where marked "host". The structs, and arrays of them, are in
// host memory and may be freed when the call returns. Strides are in elements. Activations, weights and caches have one
// dtype; rstd, cos and sin are float32.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cache_address.h"
#include "core/math.h"
#include "core/model_spec.h"

namespace pop {

// Attention takes a head_dim that is a multiple of kHeadDimStep up to kMaxHeadDim.
inline constexpr int64_t kHeadDimStep = 8;
inline constexpr int64_t kMaxHeadDim = 256;

// Consecutive rows of one sequence: row `first_row + i` is at position `first_position + i` of `sequence`. Positions
// count the sequence's real tokens (no padding) from its start.
struct Segment {
  int64_t sequence;
  int64_t first_row;
  int64_t rows;
  int64_t first_position;
  int64_t first_source;  // the row of the packed input that is row `first_row`
  int64_t cache_start;   // CacheAddress::start of the sequence
  // For attention: every row also sees the positions before this one (the block of an image); 0: causal.
  int64_t visible_end = 0;
};

// The rows of a call: their sequences, positions, places in the packed input, and RoPE tables. Rows are ordered
// context, boundary, wanted (runtime/batch.h), so that every set of rows that the loop works on is a range.
struct Batch {
  int64_t rows;
  int64_t sequences;
  const int64_t* row_sequence;  // [rows]
  const int64_t* row_position;  // [rows]
  const int64_t* row_source;    // [rows] index into the packed input
  const float* cos;             // [rows, rotary_dim / 2]
  const float* sin;             // [rows, rotary_dim / 2]
  const float* cos_local;       // the same for layers with RoPE table 1; null if there are none
  const float* sin_local;
  CacheAddress address;
};

// Fills the tables of a Batch from the segments of a call.
struct RowTablesParams {
  const Segment* segments;  // host; every row is in exactly one
  int64_t num_segments;
  int64_t sequences;
  CacheAddress address;   // host
  int64_t* row_sequence;  // [rows]
  int64_t* row_position;  // [rows]
  int64_t* row_source;    // [rows]
  int64_t* start;         // [sequences]
  int32_t* slot_table;    // [sequences, address.slot_table_stride], or null if the address has none
};

struct EmbedParams {
  DType dtype;
  int64_t rows, width;
  int64_t vocab_size;
  const int64_t* ids;         // [packed rows], or null if `table` holds the input embeddings
  const int64_t* row_source;  // [rows]
  const void* table;          // [vocab_size, width], or [packed rows, width] without ids
  int64_t table_stride;
  void* out;           // [rows, width]
  float scale = 1.0f;  // out = table * scale
};

// out[row] += features[index[row_source[row]]]; rows with index -1 are left unchanged.
struct AddFeaturesParams {
  DType dtype;
  int64_t rows, width;
  const int64_t* row_source;  // [rows]
  const int64_t* index;       // [packed rows] row of `features`, or -1
  int64_t num_features;       // larger indices count as -1
  const void* features;       // [num_features, width]
  int64_t features_stride;
  void* out;  // [rows, width]
};

struct RmsNormParams {
  DType dtype;
  int64_t rows, width;
  void* x;  // [rows, width] residual stream; updated in place if `delta` is given
  int64_t x_stride;
  const void* delta = nullptr;  // [rows, width] or null; x += delta + delta_bias, before the norm
  int64_t delta_stride = 0;
  const void* delta_bias = nullptr;  // [width] or null
  const void* delta_norm = nullptr;  // [width] or null; RMSNorm weight for delta + delta_bias, before it is added
  float delta_scale = 1.0f;          // multiplies what is added to x
  const void* weight = nullptr;      // [width], or null for ones
  float weight_offset = 0.0f;        // added to delta_norm and weight
  float eps;
  void* out;  // [rows, width] or null; may be x if there is no delta
  int64_t out_stride;
  float* rstd = nullptr;  // [rows] or null
};

// The operands of a product: elements of the model's dtype, or both in 8 bits with one scale per row: floats (e4m3), or
// signed integers. With int8_weight only the weight is in integers.
enum class Products { plain, fp8, int8, int8_weight };

constexpr const char* to_string(Products products) {
  switch (products) {
    case Products::plain:
      return "plain";
    case Products::fp8:
      return "fp8";
    case Products::int8:
      return "int8";
    case Products::int8_weight:
      return "int8_weight";
  }
  return "";
}

// True if the rows that meet a weight are rounded to 8 bits.
constexpr bool rounds_rows(Products products) { return products == Products::fp8 || products == Products::int8; }

// Rounds rows to 8 bits with one scale per row: x = out * scale, where the largest |out| of a row is 448 (fp8) or 127
// (int8). A row with NaN or infinity gets a NaN scale (int8), or NaN elements (fp8).
struct QuantizeRowsParams {
  DType dtype;
  Products products = Products::fp8;  // or int8
  int64_t rows, width;
  const void* x;  // [rows, width]
  int64_t x_stride;
  uint8_t* out;  // [rows, width]
  int64_t out_stride;
  float* scale;  // [rows]
};

// n and k of e4m3 products are multiples of this.
inline constexpr int64_t kFp8Multiple = 16;

// Elements along k that may share a scale of an int8 weight, other than all: parts of what kernels take at a time.
constexpr bool is_int8_group(int64_t elements) { return elements >= 32 && elements <= 256 && 256 % elements == 0; }

// The largest k of int8 products: a sum of k products of 127 and -128 fits an int32. Rows are rounded to 127 at most; a
// weight of a checkpoint may hold -128.
inline constexpr int64_t kInt8MostElements = 132104;

// Rows of an MLP's intermediate activations held at a time.
inline constexpr int64_t kMlpChunkRows = 2048;

// A copy of a weight in the backend's own layout, for products of many rows. The plain weight stays in memory too.
class PackedWeight {
 public:
  PackedWeight() = default;
  virtual ~PackedWeight() = default;
  PackedWeight(const PackedWeight&) = delete;
  PackedWeight& operator=(const PackedWeight&) = delete;
};

struct PrepackParams {
  DType dtype;
  int64_t n, k;
  const void* w;  // [n, k]
  int64_t w_stride;
};

// out = a . w^T, or a . w with w [k, n] if `w_transposed`. With fp8 and int8 products, a and w have 8-bit elements, w
// is not transposed and out = (a . w^T) * a_scale * w_scale^T; with int8_weight, w alone. With `accumulate`, out += a .
// w^T, rounded once: only with plain products, and where Backend::accumulates.
struct GemmParams {
  DType dtype;  // of out, and of plain a and w
  int64_t m, n, k;
  const void* a;  // [m, k]
  int64_t a_stride;
  const void* w;  // [n, k]
  int64_t w_stride;
  void* out;  // [m, n]
  int64_t out_stride;
  Products products = Products::plain;
  const float* a_scale = nullptr;        // [m], or null
  const float* w_scale = nullptr;        // [n], or null; [n, k / w_group] with groups
  int64_t w_group = 0;                   // elements along k that share a scale of w; 0: all of a row
  const PackedWeight* packed = nullptr;  // the prepacked copy of w, or null
  bool w_transposed = false;
  bool accumulate = false;
};

// One product for each of `groups` matrices: rows [begin[g], begin[g + 1]) of out are those of `a` times w[g], as in
// GemmParams. Pairs of a row and its expert, sorted by expert, are such rows.
struct GroupedGemmParams {
  DType dtype;
  int64_t rows, groups, n, k;
  const void* a;  // [rows, k]
  int64_t a_stride;
  const void* w;  // [groups, n, k], or [groups, k, n] if `w_transposed`
  int64_t w_matrix_stride, w_stride;
  bool w_transposed;
  const int64_t* begin;  // [groups + 1]; the first is 0, the last `rows`
  void* out;             // [rows, n]
  int64_t out_stride;
};

// K and V of one layer. Element [sequence, head, slot, channel]; channels are contiguous.
struct LayerCache {
  void* key;
  void* value;
  CacheStrides key_strides;
  CacheStrides value_strides;
};

// q, k, v += bias; RMSNorm of q and k per head; RoPE of q and k; k and v are written to the cache. With
// rope.norm_after, RMSNorm follows RoPE.
struct RopeCacheWriteParams {
  DType dtype;
  int64_t heads, kv_heads, head_dim, rotary_dim;
  int64_t first_row, rows;  // rows of the batch; row 0 of q, k, v is `first_row`
  void* q;                  // [rows, heads * head_dim] in place, or null
  int64_t q_stride;
  const void* k;  // [rows, kv_heads * head_dim]
  const void* v;  // [rows, kv_heads * head_dim]
  int64_t kv_stride;
  const void *q_bias, *k_bias, *v_bias;  // [heads or kv_heads * head_dim] or null
  const void *q_norm, *k_norm;           // [head_dim] or null
  float norm_eps;
  float norm_offset = 0.0f;  // added to q_norm and k_norm
  int64_t rope_table = 0;    // 1: use cos_local and sin_local of the batch
  int64_t q_rope_table = 0;  // the same for q
  RopeForm rope;
  const float* row_scale;  // [rows] or null; multiplies k and v before the bias
  const Batch* batch;
  LayerCache cache;
};

// The independent KV projection of a run of omitted layers. For every layer j of the run
// [k_j | v_j] = rstd(x) * (x . weight_j^T), then bias, k_norm, RoPE and the cache write.
struct KvProjectParams {
  DType dtype;
  int64_t first_row, rows;  // rows of the batch; row 0 of x and rstd is `first_row`
  int64_t hidden_size;
  int64_t kv_heads, head_dim, rotary_dim;
  const void* x;  // [rows, hidden_size]
  int64_t x_stride;
  bool normalise = true;  // false: rstd(x) is 1
  const float* rstd;      // [rows], or null to compute it from x
  int64_t layers;
  const void* weight;         // [layers * 2 * kv_dim, hidden_size], input norm folded in
  const void* const* k_bias;  // host [layers] of [kv_dim] or null
  const void* const* v_bias;  // host [layers] of [kv_dim] or null
  const void* const* k_norm;  // host [layers] of [head_dim] or null
  float eps;
  float norm_offset = 0.0f;             // added to k_norm; the input norm's is folded into `weight`
  bool norm_over_heads = false;         // k_norm is [kv_dim], over all heads; requires no biases and normalise = false
  const int64_t* rope_table = nullptr;  // host [layers] of 0 and 1, or null: 0 in all
  RopeForm rope;
  const Batch* batch;
  const LayerCache* caches;  // host [layers]
  void* workspace;           // kv_project_workspace(...) bytes
};

// Causal attention of packed rows over the cache. A row at position p sees positions first <= i < end of its sequence:
// first = max(0, p - window + 1), or 0 if window is 0; end = max(p + 1, visible_end of its segment).
struct AttentionParams {
  DType dtype;
  int64_t heads, kv_heads, head_dim;
  float scale;
  float softcap = 0.0f;  // scores become softcap * tanh(score / softcap); 0: no cap
  int64_t window;
  // [heads] or null: one more score of each head, which takes its share of the softmax and adds no value (gpt-oss).
  const void* sinks = nullptr;
  const Segment* segments;  // host; rows outside of them are not written
  int64_t num_segments;
  int64_t first_row;  // row 0 of q and out is this row of the batch
  const void* q;      // [rows, heads * head_dim]
  int64_t q_stride;
  void* out;  // [rows, heads * head_dim]
  int64_t out_stride;
  LayerCache cache;
  CacheAddress address;
};

// out = act(gate + gate_bias) * (up + up_bias), or clamped_swiglu of both
struct GatedActParams {
  DType dtype;
  Activation activation;
  int64_t rows, width;
  const void* gate;  // [rows, width]
  int64_t gate_stride;
  const void* up;  // [rows, width]
  int64_t up_stride;
  const void *gate_bias, *up_bias;  // [width] or null
  int64_t step = 1;  // elements from channel to channel of gate, up and the biases: 2 where gate and up take turns
  void* out;         // [rows, width]; may be gate if `step` is 1
  int64_t out_stride;
  float swiglu_alpha = 0, swiglu_limit = 0;  // of clamped_swiglu
};

// act.out = gated_act of two products of the same rows. act.gate and act.up are the memory of their results, which a
// backend need not use.
struct GatedGemmParams {
  GemmParams gate, up;
  GatedActParams act;
};

// out = x in float32, for a router that computes in float32.
struct ToFloat32Params {
  DType dtype;  // of x
  int64_t rows, width;
  const void* x;  // [rows, width]
  int64_t x_stride;
  float* out;  // [rows, width]
};

// Chooses the experts of each row: those with the experts_per_row largest keys, largest first, the lower index first
// among equal keys. The key is the logit or, with sigmoid scores, the score plus the expert's bias. The weights are the
// scores of the chosen experts, without the bias: softmax probabilities over all experts, or sigmoids. `normalise`
// divides them by their sum + norm_eps; then they are multiplied by `scale`.
struct RouteParams {
  DType dtype;  // of logits and bias
  int64_t rows, experts, experts_per_row;
  RouterScores scores = RouterScores::softmax;
  bool normalise;
  float norm_eps = 0.0f;
  float scale = 1.0f;
  const void* bias = nullptr;        // [experts] or null; with sigmoid scores only
  const void* logits;                // [rows, experts]
  const void* logit_bias = nullptr;  // [experts] or null; added to the logits; with softmax scores only
  int32_t* expert;                   // [rows, experts_per_row]
  float* weight;                     // [rows, experts_per_row]
};

// Sorts (row, expert) pairs by expert, and by row within an expert.
struct GroupRowsParams {
  int64_t rows, experts, experts_per_row;
  const int32_t* expert;  // [rows, experts_per_row]
  int32_t* place;         // [rows, experts_per_row] index of the pair in sorted order
  int64_t* row;           // [rows * experts_per_row] row of the pair at each index
  int64_t* begin;         // [experts + 1] first index of each expert; the last entry is the number of pairs
  int64_t* host_begin;    // host [experts + 1]: a copy of begin; or null
};

// out[row] = sum over the row's experts of weight * (x[place] + bias[expert]), plus shared[row] *
// sigmoid(shared_gate[row])
struct CombineRowsParams {
  DType dtype;
  int64_t rows, width, experts_per_row;
  const void* x;               // [rows * experts_per_row, width]
  const int32_t* place;        // [rows, experts_per_row]
  const float* weight;         // [rows, experts_per_row]
  const void* bias = nullptr;  // [experts, width] or null
  int64_t bias_stride = 0;
  const int32_t* expert = nullptr;  // [rows, experts_per_row], with bias
  void* out;                        // [rows, width]
  int64_t out_stride;
  const void* shared = nullptr;       // [rows, width], rows `out_stride` apart, or null; may be out
  const void* shared_gate = nullptr;  // [rows], or null for a factor of one
};

// Alignment in bytes of workspaces and of the pieces that they are cut into: a cache line, and the widest access.
inline constexpr size_t kAlignment = 64;

constexpr size_t aligned(size_t bytes) { return round_up(bytes, kAlignment); }

}  // namespace pop
