// What a backend provides: the kernels of a prefill, over plain structs. The loop that calls
// them is runtime/prefill.cpp. Pointers are to memory of the backend's device, but for those marked
// host; the structs themselves and arrays of them lie in host memory and may go when the call returns.
// Strides are in elements; activations, weights and caches are of one dtype, rstd, cos and sin are float32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "cache_address.h"
#include "core/model_spec.h"

namespace pop {

// What attention serves: head_dim is a multiple of kHeadDimStep up to kMaxHeadDim.
inline constexpr int64_t kHeadDimStep = 8;
inline constexpr int64_t kMaxHeadDim = 256;

// Consecutive rows of one sequence: row `first_row + i` sits at position `first_position + i`
// of `sequence`, counting that sequence's real tokens from its start.
struct Segment {
  int64_t sequence;
  int64_t first_row;
  int64_t rows;
  int64_t first_position;
  int64_t first_source;  // row of the packed input that row `first_row` comes from
  int64_t cache_start;   // CacheAddress::start of the sequence
  int64_t sees_to = 0;   // attention: rows also see the positions after their own up to this one (an image's)
};

// Where each row of a call comes from and belongs. Rows are ordered context, boundary, wanted
// (runtime/batch.h), so that every set of rows the loop works on is a range.
struct Batch {
  int64_t rows;
  int64_t sequences;
  const int64_t* row_sequence;  // [rows]
  const int64_t* row_position;  // [rows]
  const int64_t* row_source;    // [rows] index into the packed input
  const float* cos;             // [rows, rotary_dim / 2]
  const float* sin;             // [rows, rotary_dim / 2]
  const float* cos_local;       // the same, of layers with rope table 1; null without them
  const float* sin_local;
  CacheAddress address;
};

// Fills the tables of a Batch.
struct PlaceRowsParams {
  const Segment* segments;  // host; they cover every row once
  int64_t num_segments;
  int64_t sequences;
  CacheAddress address;   // host
  int64_t* row_sequence;  // [rows]
  int64_t* row_position;  // [rows]
  int64_t* row_source;    // [rows]
  int64_t* start;         // [sequences]
  int32_t* slot_table;    // [sequences, address.slot_table_stride], or null without one
};

struct EmbedParams {
  DType dtype;
  int64_t rows, width;
  int64_t vocab_size;
  const int64_t* ids;         // [packed rows], or null when `table` is the input embeddings themselves
  const int64_t* row_source;  // [rows]
  const void* table;          // [vocab_size, width], or [packed rows, width] without ids
  int64_t table_stride;
  void* out;           // [rows, width]
  float scale = 1.0f;  // out = table * scale
};

// out += the row's feature; rows without one stay as they are.
struct AddFeaturesParams {
  DType dtype;
  int64_t rows, width;
  const int64_t* row_source;  // [rows]
  const int64_t* index;       // [packed rows] row of `features`, or -1
  int64_t num_features;       // indices beyond are taken for -1
  const void* features;       // [num_features, width]
  int64_t features_stride;
  void* out;  // [rows, width]
};

struct RmsNormParams {
  DType dtype;
  int64_t rows, width;
  void* x;  // [rows, width] residual stream; updated in place when `delta` is given
  int64_t x_stride;
  const void* delta = nullptr;  // [rows, width] or null: x += delta + delta_bias comes first
  int64_t delta_stride = 0;
  const void* delta_bias = nullptr;  // [width] or null
  const void* delta_norm = nullptr;  // [width] or null, with delta: delta + delta_bias is RMS-normalised, then added
  const void* weight = nullptr;      // [width] or null: out = x * rstd
  float weight_offset = 0.0f;        // added to delta_norm and weight
  float eps;
  void* out;  // [rows, width] or null; may be x, without delta
  int64_t out_stride;
  float* rstd = nullptr;  // [rows] or null
};

// Rows in 8-bit floats (e4m3), each by a scale of its own: x = out * scale, the largest magnitude of a row 448.
struct QuantizeRowsParams {
  DType dtype;
  int64_t rows, width;
  const void* x;  // [rows, width]
  int64_t x_stride;
  uint8_t* out;  // [rows, width]
  int64_t out_stride;
  float* scale;  // [rows]
};

// n and k of products of e4m3 are multiples of it.
inline constexpr int64_t kFp8Multiple = 16;

// Rows of an MLP's intermediate activations held at a time.
inline constexpr int64_t kMlpChunkRows = 2048;

// A weight in a layout of a backend's own, for products of many rows: memory beside that of the plain one.
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

// out = a . w^T; with scales a and w are e4m3, and out = (a . w^T) * a_scale * w_scale^T.
struct GemmParams {
  DType dtype;
  int64_t m, n, k;
  const void* a;  // [m, k]
  int64_t a_stride;
  const void* w;  // [n, k]
  int64_t w_stride;
  void* out;  // [m, n]
  int64_t out_stride;
  const float* a_scale = nullptr;        // [m], or null
  const float* w_scale = nullptr;        // [n], with a_scale
  const PackedWeight* packed = nullptr;  // w again, where it is prepacked
};

// K and V of one layer. Element [sequence, head, slot, channel]; channels are contiguous.
struct LayerCache {
  void* key;
  void* value;
  CacheStrides key_strides;
  CacheStrides value_strides;
};

// q, k, v += bias; q and k RMS-normalised per head; q and k turned by RoPE; k and v to the cache.
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
  int64_t rope_table = 0;    // 1: the batch's cos_local and sin_local
  const float* row_scale;    // [rows] or null: k and v are multiplied by it before the bias
  const Batch* batch;
  LayerCache cache;
};

// The independent KV projection of a run: for every layer j of the run
// [k_j | v_j] = rstd(x) * (x . weight_j^T), then bias, k_norm, RoPE and the cache write.
struct KvProjectParams {
  DType dtype;
  int64_t first_row, rows;  // rows of the batch; row 0 of x and rstd is `first_row`
  int64_t hidden_size;
  int64_t kv_heads, head_dim, rotary_dim;
  const void* x;  // [rows, hidden_size]
  int64_t x_stride;
  bool normalise = true;  // false: rstd(x) is 1, whatever x holds
  const float* rstd;      // [rows], or null: taken from x
  int64_t layers;
  const void* weight;         // [layers * 2 * kv_dim, hidden_size], input norm folded in
  const void* const* k_bias;  // host [layers] of [kv_dim] or null
  const void* const* v_bias;  // host [layers] of [kv_dim] or null
  const void* const* k_norm;  // host [layers] of [head_dim] or null
  float eps;
  float norm_offset = 0.0f;             // added to k_norm; `weight` has it folded in
  bool norm_over_heads = false;         // k_norm is [kv_dim], over all heads of a row: without biases and normalise
  const int64_t* rope_table = nullptr;  // host [layers] of 0 and 1, or null: 0 in all
  const Batch* batch;
  const LayerCache* caches;  // host [layers]
  void* workspace;           // kv_project_workspace(...) bytes
};

// Causal attention of packed rows over the cache: a row at position p sees positions
// max(0, p - window + 1) ... max(p, its segment's sees_to) of its sequence (window 0: all up to there).
struct AttentionParams {
  DType dtype;
  int64_t heads, kv_heads, head_dim;
  float scale;
  float softcap = 0.0f;  // scores become softcap * tanh(score / softcap); 0: as they are
  int64_t window;
  const Segment* segments;  // host; rows outside are left alone
  int64_t num_segments;
  int64_t first_row;  // row 0 of q and out is this row of the batch
  const void* q;      // [rows, heads * head_dim]
  int64_t q_stride;
  void* out;  // [rows, heads * head_dim]
  int64_t out_stride;
  LayerCache cache;
  CacheAddress address;
};

// gate = act(gate + gate_bias) * (up + up_bias)
struct GatedActParams {
  DType dtype;
  Activation activation;
  int64_t rows, width;
  void* gate;  // [rows, width] in place
  int64_t gate_stride;
  const void* up;  // [rows, width]
  int64_t up_stride;
  const void *gate_bias, *up_bias;  // [width] or null
};

// Which experts a row goes to: those of its experts_per_row largest logits, the largest first, of equal ones the lower
// expert. Its weights are their probabilities, softmax over all experts; with `normalise`, shares of their sum.
struct RouteParams {
  DType dtype;
  int64_t rows, experts, experts_per_row;
  bool normalise;
  const void* logits;  // [rows, experts]
  int32_t* expert;     // [rows, experts_per_row]
  float* weight;       // [rows, experts_per_row]
};

// Puts pairs of a row and an expert in the order of experts, those of one expert in the order of rows.
struct GroupRowsParams {
  int64_t rows, experts, experts_per_row;
  const int32_t* expert;  // [rows, experts_per_row]
  int32_t* place;         // [rows, experts_per_row] of each pair in that order
  int64_t* row;           // [rows * experts_per_row] of the pair at each place
  int64_t* begin;         // [experts + 1] the first place of each expert, and the number of pairs
  int64_t* host_begin;    // host [experts + 1]: the same
};

// out = sum over a row's pairs of weight * x at their places
struct CombineRowsParams {
  DType dtype;
  int64_t rows, width, experts_per_row;
  const void* x;         // [rows * experts_per_row, width]
  const int32_t* place;  // [rows, experts_per_row]
  const float* weight;   // [rows, experts_per_row]
  void* out;             // [rows, width]
  int64_t out_stride;
};

// Memory that the caller hands out begins at, and is cut in, multiples of this: a cache line, and
// what the widest access wants.
inline constexpr size_t kAlignment = 64;

constexpr size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// The calls of one prefill run in the order in which they are made.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual void place_rows(const PlaceRowsParams&) = 0;
  virtual void embed(const EmbedParams&) = 0;
  virtual void add_features(const AddFeaturesParams&) = 0;
  virtual void rms_norm(const RmsNormParams&) = 0;
  virtual void quantize_rows(const QuantizeRowsParams&) = 0;
  // Why products of e4m3 with results of `dtype` cannot be computed here; empty if they can.
  virtual std::string fp8_missing(DType dtype) const = 0;
  // Why weights of `dtype` cannot be prepacked here; empty if they can.
  virtual std::string prepack_missing(DType dtype) const = 0;
  // Only where nothing is missing.
  virtual std::unique_ptr<PackedWeight> prepack(const PrepackParams&) const = 0;
  // The most rows of a dense MLP that its products are best given at once; more than kMlpChunkRows are not.
  virtual int64_t mlp_rows(DType /*dtype*/) const { return kMlpChunkRows; }
  // Products that do not depend on each other: those of few rows may share a launch.
  virtual void gemm(const GemmParams* products, int64_t count) = 0;
  virtual void rope_cache_write(const RopeCacheWriteParams&) = 0;
  virtual void kv_project(const KvProjectParams&) = 0;
  virtual void attention(const AttentionParams&) = 0;
  virtual void gated_act(const GatedActParams&) = 0;
  virtual void route(const RouteParams&) = 0;
  virtual void group_rows(const GroupRowsParams&) = 0;  // host_begin is there when it returns: a device is waited for
  virtual void combine_rows(const CombineRowsParams&) = 0;

  // Bytes of KvProjectParams::workspace for a call of at most `rows` rows.
  virtual size_t kv_project_workspace(DType dtype, int64_t rows, int64_t hidden_size, int64_t layers,
                                      int64_t kv_dim) const = 0;

  // Copies rows of `row_bytes` each, strides in bytes; used to put a cache back, so that it throws nothing.
  virtual void copy_rows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t row_bytes,
                         int64_t rows) noexcept = 0;
};

}  // namespace pop
