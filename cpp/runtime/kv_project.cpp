#include "runtime/kv_project.h"

#include <algorithm>

#include "runtime/arena.h"
#include "runtime/norm_over_heads.h"

namespace pop {

namespace {

// The scale rstd of a row commutes with the product, which therefore reads x itself and leaves the scale to the write
// step. In float16 such products can overflow, so the rows are normalised first.
bool normalises_first(DType dtype) { return dtype == DType::f16; }

struct KvProjectWorkspace {
  KvProjectWorkspace(void* base, DType dtype, int64_t rows, int64_t hidden_size, int64_t columns) {
    const int64_t element = element_size(dtype);
    Arena arena(base);
    if (normalises_first(dtype)) {
      normalised = arena.take(rows * hidden_size * element);
    } else {
      rstd = arena.take_array<float>(rows);
    }
    kv = arena.take(rows * columns * element);
    bytes = arena.used();
  }

  float* rstd = nullptr;       // [rows]
  void* normalised = nullptr;  // [rows, hidden_size]
  void* kv;                    // [rows, layers * 2 * kv_dim]
  size_t bytes;
};

// The same call for rows [begin, begin + rows).
KvProjectParams rows_of(const KvProjectParams& p, int64_t begin, int64_t rows) {
  KvProjectParams part = p;
  part.first_row = p.first_row + begin;
  part.rows = rows;
  part.x = static_cast<const char*>(p.x) + begin * p.x_stride * element_size(p.dtype);
  part.rstd = p.rstd == nullptr ? nullptr : p.rstd + begin;
  return part;
}

// The same call for layers [first, first + count) of its run.
KvProjectParams layers_of(const KvProjectParams& p, int64_t first, int64_t count) {
  const auto from = [first](const auto* list) { return list == nullptr ? nullptr : list + first; };
  KvProjectParams part = p;
  part.layers = count;
  part.weight =
      static_cast<const char*>(p.weight) + first * 2 * p.kv_heads * p.head_dim * p.hidden_size * element_size(p.dtype);
  part.k_bias = from(p.k_bias);
  part.v_bias = from(p.v_bias);
  part.k_norm = from(p.k_norm);
  part.rope_table = from(p.rope_table);
  part.caches = from(p.caches);
  return part;
}

// Normalises the rows, or computes their scale unless the caller has; `part` then says what the product reads and which
// scale is left for the write step.
void apply_input_norm(Backend& backend, KvProjectParams& part, const KvProjectWorkspace& work) {
  const bool first = part.normalise && normalises_first(part.dtype);
  if (part.normalise && (first || part.rstd == nullptr)) {
    backend.rms_norm({.dtype = part.dtype,
                      .rows = part.rows,
                      .width = part.hidden_size,
                      .x = const_cast<void*>(part.x),  // only read: there is no delta
                      .x_stride = part.x_stride,
                      .eps = part.eps,
                      .out = first ? work.normalised : nullptr,
                      .out_stride = part.hidden_size,
                      .rstd = first ? nullptr : work.rstd});
  }
  if (first) {
    part.x = work.normalised;
    part.x_stride = part.hidden_size;
  }
  if (first || !part.normalise) {
    part.rstd = nullptr;
  } else if (part.rstd == nullptr) {
    part.rstd = work.rstd;
  }
}

// RMSNorm over all heads of the K of every layer.
void norm_keys_over_heads(Backend& backend, const KvProjectParams& p, void* kv) {
  const int64_t kv_dim = p.kv_heads * p.head_dim;
  for (int64_t layer = 0; layer < p.layers; ++layer) {
    void* k = static_cast<char*>(kv) + layer * 2 * kv_dim * element_size(p.dtype);
    norm_over_heads(backend, p.dtype, k, p.rows, kv_dim, p.layers * 2 * kv_dim, p.k_norm[layer], p.norm_offset, p.eps);
  }
}

void project(Backend& backend, const KvProjectParams& p, void* kv) {
  const int64_t columns = p.layers * 2 * p.kv_heads * p.head_dim;
  const GemmParams product{.dtype = p.dtype,
                           .m = p.rows,
                           .n = columns,
                           .k = p.hidden_size,
                           .a = p.x,
                           .a_stride = p.x_stride,
                           .w = p.weight,
                           .w_stride = p.hidden_size,
                           .out = kv,
                           .out_stride = columns};
  backend.gemm(&product, 1);
  if (p.norm_over_heads) norm_keys_over_heads(backend, p, kv);
}

}  // namespace

size_t kv_project_bytes(DType dtype, int64_t rows, int64_t hidden_size, int64_t layers, int64_t kv_dim) {
  return KvProjectWorkspace(nullptr, dtype, rows, hidden_size, layers * 2 * kv_dim).bytes;
}

void kv_project_in_chunks(Backend& backend, const KvProjectParams& params, const KvProjectChunks& chunks,
                          const KvWrite& write) {
  const int64_t columns = params.layers * 2 * params.kv_heads * params.head_dim;
  for (int64_t begin = 0; begin < params.rows; begin += chunks.rows) {
    const int64_t rows = std::min(chunks.rows, params.rows - begin);
    const KvProjectWorkspace work(params.workspace, params.dtype, rows, params.hidden_size, columns);
    KvProjectParams chunk = rows_of(params, begin, rows);
    apply_input_norm(backend, chunk, work);
    const int64_t layers_at_once = chunks.layers(rows);
    for (int64_t first = 0; first < params.layers; first += layers_at_once) {
      const KvProjectParams part = layers_of(chunk, first, std::min(layers_at_once, params.layers - first));
      project(backend, part, work.kv);
      write(part, work.kv);
    }
  }
}

}  // namespace pop
