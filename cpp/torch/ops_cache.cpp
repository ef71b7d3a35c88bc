// The building blocks around a KV cache as operators: one kernel call of the backend each.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "torch/backends.h"
#include "torch/caches.h"
#include "torch/checks.h"
#include "torch/device_keys.h"
#include "torch/forks.h"
#include "torch/geometry.h"
#include "torch/loaded_model.h"
#include "torch/negated.h"
#include "torch/schemas.h"

namespace pop {

namespace {

// Checks that the heads of a row are adjacent in [rows, heads, head_dim]; rows may have any stride.
void check_heads_contiguous(const Tensor& query, const std::string& name) {
  check_last_dim_contiguous(query, name);
  check(query.size(1) <= 1 || query.stride(1) == query.size(2), name,
        ": expected heads that follow one another (stride ", query.size(2), "), got stride ", query.stride(1));
}

// cos and sin in the form that the kernels read: contiguous float32 [rows, rotary_dim / 2].
struct RopeTables {
  RopeTables(const std::string& op, const Tensor& cos_rows, const Tensor& sin_rows, int64_t rows, int64_t head_dim,
             const Tensor& like) {
    check_same_device(cos_rows, like, op + ": cos");
    check_same_device(sin_rows, like, op + ": sin");
    check_shape(cos_rows, {rows, -1}, op + ": cos");
    rotary_dim = cos_rows.size(1);
    check(rotary_dim % 2 == 0 && rotary_dim <= head_dim, op, ": cos: expected shape [", rows,
          ", rotary_dim] with an even rotary_dim <= ", head_dim, ", got ", shape_of(cos_rows));
    check_shape(sin_rows, {rows, rotary_dim}, op + ": sin");
    cos = half_of(cos_rows);
    sin = half_of(sin_rows);
  }

  int64_t rotary_dim = 0;
  Tensor cos, sin;

 private:
  Tensor half_of(const Tensor& table) const {
    Tensor rows = table;
    return torch::stable::contiguous(
        torch::stable::to(torch::stable::narrow(rows, 1, 0, rotary_dim / 2), ScalarType::Float));
  }
};

// The row tables of a building block, in memory of the device of `like`.
class RowTables {
 public:
  RowTables(const Geometry& geometry, Backend& backend, const Tensor& like) {
    const BatchLayout& layout = geometry.layout();
    const CacheAddress address = geometry.address();
    const int64_t slots = address.slot_table == nullptr ? 0 : layout.sequences * address.slot_table_stride;
    tables_ = torch::stable::new_empty(like, {3 * layout.rows + layout.sequences + (slots + 1) / 2}, ScalarType::Long);
    int64_t* table = static_cast<int64_t*>(tables_.mutable_data_ptr());
    int64_t* start = table + 3 * layout.rows;
    const std::vector<Segment> segments = layout.segments(0, layout.rows);
    const RowTablesParams params{
        .segments = segments.data(),
        .num_segments = static_cast<int64_t>(segments.size()),
        .sequences = layout.sequences,
        .address = address,
        .row_sequence = table,
        .row_position = table + layout.rows,
        .row_source = table + 2 * layout.rows,
        .start = start,
        .slot_table = slots == 0 ? nullptr : reinterpret_cast<int32_t*>(start + layout.sequences)};
    backend.build_row_tables(params);
    batch_ = {
        .rows = layout.rows,
        .sequences = layout.sequences,
        .row_sequence = params.row_sequence,
        .row_position = params.row_position,
        .row_source = params.row_source,
        .cos = nullptr,
        .sin = nullptr,
        .cos_local = nullptr,
        .sin_local = nullptr,
        .address = {
            .start = params.start, .slot_table = params.slot_table, .slot_table_stride = address.slot_table_stride}};
  }

  // Valid as long as this object and `rope` are.
  Batch batch(const RopeTables& rope) const {
    Batch batch = batch_;
    batch.cos = static_cast<const float*>(rope.cos.const_data_ptr());
    batch.sin = static_cast<const float*>(rope.sin.const_data_ptr());
    return batch;
  }
  const CacheAddress& address() const { return batch_.address; }

 private:
  Tensor tables_;
  Batch batch_{};
};

void rope_cache_write(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor cu_seqlens,
                      Tensor past_lens, Tensor cache_start, Tensor key_cache, Tensor value_cache,
                      std::optional<Tensor> q_norm, std::optional<Tensor> k_norm, double norm_eps,
                      std::optional<Tensor> slot_table, double norm_offset, bool interleaved, bool norm_after) {
  const std::string op = "pop::rope_cache_write";
  const DType dtype = dtype_of(query, op + ": query");
  check_shape(query, {-1, -1, -1}, op + ": query");
  const int64_t rows = query.size(0), heads = query.size(1), head_dim = query.size(2);
  check_shape(key, {rows, -1, head_dim}, op + ": key");
  const int64_t kv_heads = key.size(1);
  check_shape(value, {rows, kv_heads, head_dim}, op + ": value");
  check_like(key, query, op + ": key");
  check_like(value, query, op + ": value");
  check_heads_contiguous(query, op + ": query");
  const int64_t capacity = capacity_of(key_cache, op + ": key_cache");
  const Geometry geometry(op, {cu_seqlens, past_lens, cache_start, slot_table, capacity}, rows, nullptr, nullptr);
  const CacheForm form{.dtype = dtype, .kv_heads = kv_heads, .head_dim = head_dim};
  const RopeTables rope(op, cos, sin, rows, head_dim, query);
  const void* q_gamma = optional_vector(q_norm, query, head_dim, op + ": q_norm");
  const void* k_gamma = optional_vector(k_norm, query, head_dim, op + ": k_norm");
  OtherTensors others{.written = {{query, op + ": query"}},
                      .read = {{key, op + ": key"}, {value, op + ": value"}, {cos, op + ": cos"}, {sin, op + ": sin"}}};
  if (q_norm.has_value()) others.read.push_back({*q_norm, op + ": q_norm"});
  if (k_norm.has_value()) others.read.push_back({*k_norm, op + ": k_norm"});
  const LayerCache cache = check_caches(op, geometry, form, {key_cache}, {value_cache}, query, others).front();
  const BackendOfCall backend(query);
  const RowTables tables(geometry, *backend, query);
  const Batch batch = tables.batch(rope);
  const Tensor key_rows = torch::stable::contiguous(key), value_rows = torch::stable::contiguous(value);
  backend->rope_cache_write({.dtype = dtype,
                             .heads = heads,
                             .kv_heads = kv_heads,
                             .head_dim = head_dim,
                             .rotary_dim = rope.rotary_dim,
                             .first_row = 0,
                             .rows = rows,
                             .q = query.mutable_data_ptr(),
                             .q_stride = query.stride(0),
                             .k = key_rows.const_data_ptr(),
                             .v = value_rows.const_data_ptr(),
                             .kv_stride = kv_heads * head_dim,
                             .q_bias = nullptr,
                             .k_bias = nullptr,
                             .v_bias = nullptr,
                             .q_norm = q_gamma,
                             .k_norm = k_gamma,
                             .norm_eps = static_cast<float>(norm_eps),
                             .norm_offset = static_cast<float>(norm_offset),
                             .rope = {.interleaved = interleaved, .norm_after = norm_after},
                             .row_scale = nullptr,
                             .batch = &batch,
                             .cache = cache});
}

Tensor attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cu_seqlens, Tensor past_lens,
                 Tensor cache_start, double scale, int64_t window, std::optional<Tensor> slot_table, double softcap,
                 std::optional<Tensor> blocks, std::optional<Tensor> sinks) {
  const std::string op = "pop::attention";
  const DType dtype = dtype_of(query, op + ": query");
  check_shape(query, {-1, -1, -1}, op + ": query");
  const int64_t rows = query.size(0), heads = query.size(1), head_dim = query.size(2);
  check_heads_contiguous(query, op + ": query");
  check(window >= 0, op, ": window: expected >= 0 (0: no window), got ", window);
  check(window <= INT32_MAX, op, ": window: expected <= 2147483647, got ", window);
  check(softcap >= 0 && std::isfinite(softcap), op, ": softcap: expected a finite number >= 0 (0: none), got ",
        softcap);
  check_head_dim(head_dim, op + ": query");
  check_shape(key_cache, {-1, -1, -1, head_dim}, op + ": key_cache");
  const int64_t kv_heads = key_cache.size(1);
  check(kv_heads >= 1 && heads >= kv_heads && heads % kv_heads == 0, op, ": query: expected a multiple of ", kv_heads,
        " heads (those of key_cache), got ", heads);
  const Geometry geometry(op, {cu_seqlens, past_lens, cache_start, slot_table, key_cache.size(2)}, rows, nullptr,
                          nullptr, blocks);
  const CacheForm form{.dtype = dtype, .kv_heads = kv_heads, .head_dim = head_dim};
  const LayerCache cache = check_cache(op, geometry, form, key_cache, value_cache, query);
  Tensor out = torch::stable::new_empty(query, {rows, heads, head_dim});
  const std::vector<Segment> segments = geometry.layout().attention_segments(0, rows);
  const BackendOfCall backend(query);
  const RowTables tables(geometry, *backend, query);
  backend->attention({.dtype = dtype,
                      .heads = heads,
                      .kv_heads = kv_heads,
                      .head_dim = head_dim,
                      .scale = static_cast<float>(scale),
                      .softcap = static_cast<float>(softcap),
                      .window = window,
                      .sinks = optional_vector(sinks, query, heads, op + ": sinks"),
                      .segments = segments.data(),
                      .num_segments = static_cast<int64_t>(segments.size()),
                      .first_row = 0,
                      .q = query.const_data_ptr(),
                      .q_stride = query.stride(0),
                      .out = out.mutable_data_ptr(),
                      .out_stride = heads * head_dim,
                      .cache = cache,
                      .address = tables.address()});
  return out;
}

using TensorList = std::optional<std::vector<Tensor>>;

// The data of one vector per layer; empty if there are none. Adds the vectors to `read`.
std::vector<const void*> layer_vectors(const TensorList& tensors, size_t layers, const Tensor& like, int64_t width,
                                       const std::string& name, std::vector<NamedTensor>& read) {
  std::vector<const void*> data;
  if (!tensors.has_value()) return data;
  check(tensors->size() == layers, name, ": expected ", layers, " tensors (one a layer), got ", tensors->size());
  for (const Tensor& tensor : *tensors) {
    read.push_back({tensor, join(name, "[", data.size(), "]")});
    check_resolved(tensor, read.back().name);
    data.push_back(optional_vector(tensor, like, width, read.back().name));
  }
  return data;
}

void kv_project(Tensor hidden, Tensor weight, Tensor cos, Tensor sin, Tensor cu_seqlens, Tensor past_lens,
                Tensor cache_start, double eps, std::vector<Tensor> key_cache, std::vector<Tensor> value_cache,
                TensorList k_bias, TensorList v_bias, TensorList k_norm, std::optional<Tensor> slot_table,
                double norm_offset, bool interleaved, bool norm_after) {
  const std::string op = "pop::kv_project";
  const DType dtype = dtype_of(hidden, op + ": hidden");
  check_shape(hidden, {-1, -1}, op + ": hidden");
  check_last_dim_contiguous(hidden, op + ": hidden");
  const int64_t rows = hidden.size(0), hidden_size = hidden.size(1);
  const size_t layers = key_cache.size();
  check(layers >= 1 && value_cache.size() == layers, op, ": value_cache: expected ", layers,
        " tensors like key_cache (at least 1), got ", value_cache.size());
  check_shape(key_cache.front(), {-1, -1, -1, -1}, op + ": key_cache");
  const int64_t kv_heads = key_cache.front().size(1), head_dim = key_cache.front().size(3);
  const int64_t kv_dim = kv_heads * head_dim;
  check(hidden_size >= 1 && kv_dim >= 1, op, ": hidden, key_cache: expected at least 1 channel, got shapes ",
        shape_of(hidden), " and ", shape_of(key_cache.front()));
  check_like(weight, hidden, op + ": weight");
  check_shape(weight, {static_cast<int64_t>(layers) * 2 * kv_dim, hidden_size}, op + ": weight");
  check(weight.is_contiguous(), op, ": weight: expected a contiguous tensor");
  const int64_t capacity = key_cache.front().size(2);
  const Geometry geometry(op, {cu_seqlens, past_lens, cache_start, slot_table, capacity}, rows, nullptr, nullptr);
  const CacheForm form{.dtype = dtype, .kv_heads = kv_heads, .head_dim = head_dim};
  const RopeTables rope(op, cos, sin, rows, head_dim, hidden);
  OtherTensors others;
  others.read = {{hidden, op + ": hidden"}, {weight, op + ": weight"}, {cos, op + ": cos"}, {sin, op + ": sin"}};
  const auto k_biases = layer_vectors(k_bias, layers, hidden, kv_dim, op + ": k_bias", others.read);
  const auto v_biases = layer_vectors(v_bias, layers, hidden, kv_dim, op + ": v_bias", others.read);
  const auto k_norms = layer_vectors(k_norm, layers, hidden, head_dim, op + ": k_norm", others.read);
  const std::vector<LayerCache> caches = check_caches(op, geometry, form, key_cache, value_cache, hidden, others);
  const BackendOfCall backend(hidden);
  const RowTables tables(geometry, *backend, hidden);
  const Batch batch = tables.batch(rope);
  const size_t bytes = backend->kv_project_workspace(dtype, rows, hidden_size, static_cast<int64_t>(layers), kv_dim);
  const Tensor workspace = torch::stable::new_empty(hidden, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  backend->kv_project({.dtype = dtype,
                       .first_row = 0,
                       .rows = rows,
                       .hidden_size = hidden_size,
                       .kv_heads = kv_heads,
                       .head_dim = head_dim,
                       .rotary_dim = rope.rotary_dim,
                       .x = hidden.const_data_ptr(),
                       .x_stride = hidden.stride(0),
                       .rstd = nullptr,
                       .layers = static_cast<int64_t>(layers),
                       .weight = weight.const_data_ptr(),
                       .k_bias = k_biases.empty() ? nullptr : k_biases.data(),
                       .v_bias = v_biases.empty() ? nullptr : v_biases.data(),
                       .k_norm = k_norms.empty() ? nullptr : k_norms.data(),
                       .eps = static_cast<float>(eps),
                       .norm_offset = static_cast<float>(norm_offset),
                       .rope = {.interleaved = interleaved, .norm_after = norm_after},
                       .batch = &batch,
                       .caches = caches.data(),
                       .workspace = workspace.mutable_data_ptr()});
}

Tensor fold_kv_op(std::vector<Tensor> k_proj, std::vector<Tensor> v_proj, std::vector<Tensor> input_norm,
                  double norm_offset) {
  return fold_kv(k_proj, v_proj, input_norm, norm_offset);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pop, CompositeExplicitAutograd, m) {
  m.impl("fold_kv", TORCH_BOX(&ChecksThreads<&fold_kv_op>::call));
}

// The functions are the same for every device; only the backend differs.
static void implement(torch::stable::detail::StableLibrary& m) {  // no template: gcc 12 would not instantiate them
  m.impl("rope_cache_write", TORCH_BOX(&ChecksThreads<&rope_cache_write>::call));
  m.impl("attention", TORCH_BOX(&ChecksThreads<&attention>::call));
  m.impl("kv_project", TORCH_BOX(&ChecksThreads<&kv_project>::call));
}

POP_IMPL_ON_DEVICES(implement)

STABLE_TORCH_LIBRARY_IMPL(pop, Negative, m) {
  m.impl("rope_cache_write",
         TORCH_BOX((&ChecksThreads<&OfNegated<&rope_cache_write, kRopeCacheWriteSchema>::call>::call)));
  m.impl("kv_project", TORCH_BOX((&ChecksThreads<&OfNegated<&kv_project, kKvProjectSchema>::call>::call)));
}

}  // namespace pop
