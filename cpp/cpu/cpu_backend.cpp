// Cuts each call into pieces for torch's threads and runs the kernels of the table (cpu/kernels.h) on them. No result
// depends on the number of threads: one thread alone computes a row, a column or a task.
#include "cpu/cpu_backend.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "core/math.h"
#include "cpu/gemm.h"
#include "cpu/int8.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/torch_calls.h"
#include "runtime/kv_project.h"

namespace pop {
namespace {

// Rows of a run's KV projection at a time; they bound its workspace.
constexpr int64_t kKvProjectRows = 1024;

// Runs kernel(params, begin, end) over `rows` rows of `width` elements each.
template <class Params>
void parallel_rows(void (*kernel)(const Params&, int64_t, int64_t), const Params& params, int64_t rows, int64_t width) {
  if (rows == 0) return;
  const int64_t grain = std::max<int64_t>(1, cpu::kGrainElements / std::max<int64_t>(1, width));
  cpu::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

class CpuBackend final : public Backend {
 public:
  void build_row_tables(const RowTablesParams& p) override {
    for (const Segment& segment : std::span(p.segments, p.num_segments)) {
      for (int64_t i = 0; i < segment.rows; ++i) {
        p.row_sequence[segment.first_row + i] = segment.sequence;
        p.row_position[segment.first_row + i] = segment.first_position + i;
        p.row_source[segment.first_row + i] = segment.first_source + i;
      }
    }
    std::copy_n(p.address.start, p.sequences, p.start);
    if (p.slot_table != nullptr) {
      std::copy_n(p.address.slot_table, p.sequences * p.address.slot_table_stride, p.slot_table);
    }
  }

  void embed(const EmbedParams& p) override { parallel_rows(table_.embed, p, p.rows, p.width); }

  void add_features(const AddFeaturesParams& p) override { parallel_rows(table_.add_features, p, p.rows, p.width); }

  void rms_norm(const RmsNormParams& p) override { parallel_rows(table_.rms_norm, p, p.rows, p.width); }

  void gated_act(const GatedActParams& p) override { parallel_rows(table_.gated_act, p, p.rows, p.width); }

  void rope_cache_write(const RopeCacheWriteParams& p) override {
    const int64_t heads = (p.q == nullptr ? 0 : p.heads) + 2 * p.kv_heads;
    parallel_rows(table_.rope_cache_write, p, p.rows, heads * p.head_dim);
  }

  void quantize_rows(const QuantizeRowsParams& p) override { parallel_rows(table_.quantize_rows, p, p.rows, p.width); }

  // Products of e4m3 go through float32: correct, but no faster than without.
  std::string products_missing(Products, DType) const override { return ""; }

  void gated_gemm(const GatedGemmParams& p) override {
    return p.gate.products == Products::int8 ? cpu::int8_gated_gemm(p) : Backend::gated_gemm(p);
  }

  void to_float32(const ToFloat32Params& p) override { parallel_rows(table_.to_float32, p, p.rows, p.width); }

  void route(const RouteParams& p) override { parallel_rows(table_.route, p, p.rows, p.experts * p.experts_per_row); }

  void combine_rows(const CombineRowsParams& p) override {
    parallel_rows(table_.combine_rows, p, p.rows, p.width * p.experts_per_row);
  }

  void group_rows(const GroupRowsParams& p) override {
    const int64_t pairs = p.rows * p.experts_per_row;
    std::fill_n(p.host_begin, p.experts + 1, 0);
    for (int64_t i = 0; i < pairs; ++i) ++p.host_begin[p.expert[i] + 1];
    std::partial_sum(p.host_begin, p.host_begin + p.experts + 1, p.host_begin);
    std::copy_n(p.host_begin, p.experts, p.begin);  // index of each expert's next pair
    for (int64_t i = 0; i < pairs; ++i) {
      const int64_t place = p.begin[p.expert[i]]++;
      p.place[i] = static_cast<int32_t>(place);
      p.row[place] = i / p.experts_per_row;
    }
    std::copy_n(p.host_begin, p.experts + 1, p.begin);
  }

  std::string prepack_missing(DType dtype) const override { return cpu::prepack_missing(dtype); }

  std::unique_ptr<PackedWeight> prepack(const PrepackParams& p) const override { return cpu::prepack(p); }

  int64_t mlp_rows(DType dtype, Products products) const override { return cpu::mlp_rows(dtype, products); }

  void gemm(const GemmParams* products, int64_t count) override { cpu::gemm(products, count); }

  void copy_rows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t row_bytes,
                 int64_t rows) noexcept override {
    for (int64_t row = 0; row < rows; ++row) {
      std::memcpy(static_cast<char*>(to) + row * to_stride, static_cast<const char*>(from) + row * from_stride,
                  row_bytes);
    }
  }

  void attention(const AttentionParams& p) override {
    const std::vector<cpu::AttentionTask> tasks = attention_tasks(p);
    if (tasks.empty()) return;
    const size_t scratch_bytes = aligned(table_.attention_scratch(p));
    const auto count = static_cast<int64_t>(tasks.size());
    const cpu::Scratch scratch = cpu::allocate(cpu::workers_for(count) * scratch_bytes);
    cpu::parallel_tasks(count, [&](int64_t i, int64_t worker) {
      table_.attention(p, tasks[i], scratch.get() + worker * scratch_bytes);
    });
  }

  void kv_project(const KvProjectParams& p) override {
    const KvProjectChunks chunks{.rows = kKvProjectRows, .layers = [&](int64_t) { return p.layers; }};
    kv_project_in_chunks(*this, p, chunks, [&](const KvProjectParams& part, const void* kv) { write_kv(part, kv); });
  }

  size_t kv_project_workspace(DType dtype, int64_t rows, int64_t hidden_size, int64_t layers,
                              int64_t kv_dim) const override {
    return kv_project_bytes(dtype, std::min(rows, kKvProjectRows), hidden_size, layers, kv_dim);
  }

 private:
  // See KvWrite in runtime/kv_project.h.
  void write_kv(const KvProjectParams& p, const void* kv) {
    const int64_t kv_dim = p.kv_heads * p.head_dim, element = element_size(p.dtype);
    for (int64_t layer = 0; layer < p.layers; ++layer) {
      const char* k = static_cast<const char*>(kv) + layer * 2 * kv_dim * element;
      rope_cache_write({.dtype = p.dtype,
                        .heads = 0,
                        .kv_heads = p.kv_heads,
                        .head_dim = p.head_dim,
                        .rotary_dim = p.rotary_dim,
                        .first_row = p.first_row,
                        .rows = p.rows,
                        .q = nullptr,
                        .q_stride = 0,
                        .k = k,
                        .v = k + kv_dim * element,
                        .kv_stride = p.layers * 2 * kv_dim,
                        .q_bias = nullptr,
                        .k_bias = p.k_bias == nullptr ? nullptr : p.k_bias[layer],
                        .v_bias = p.v_bias == nullptr ? nullptr : p.v_bias[layer],
                        .q_norm = nullptr,
                        .k_norm = p.k_norm == nullptr || p.norm_over_heads ? nullptr : p.k_norm[layer],
                        .norm_eps = p.eps,
                        .norm_offset = p.norm_offset,
                        .rope_table = p.rope_table == nullptr ? 0 : p.rope_table[layer],
                        .rope = p.rope,
                        .row_scale = p.rstd,
                        .batch = p.batch,
                        .cache = p.caches[layer]});
    }
  }

  // The most expensive tasks first, so that threads finish together; the KV heads of a range of rows next to each
  // other, since they share cache lines of q.
  std::vector<cpu::AttentionTask> attention_tasks(const AttentionParams& p) const {
    const int64_t task_rows = table_.attention_task_rows(p);
    std::vector<cpu::AttentionTask> tasks;
    for (int64_t s = 0; s < p.num_segments; ++s) {
      for (int64_t range = ceil_div(p.segments[s].rows, task_rows) - 1; range >= 0; --range) {
        const int64_t row = range * task_rows;
        const int64_t rows = std::min(task_rows, p.segments[s].rows - row);
        for (int64_t head = 0; head < p.kv_heads; ++head) {
          tasks.push_back({.segment = s, .kv_head = head, .row = row, .rows = rows});
        }
      }
    }
    const auto cost = [&](const cpu::AttentionTask& task) {
      const Segment& segment = p.segments[task.segment];
      const int64_t positions = std::max(segment.first_position + task.row + task.rows, segment.visible_end);
      return task.rows * (p.window == 0 ? positions : std::min(positions, p.window + task.rows));
    };
    std::stable_sort(tasks.begin(), tasks.end(), [&](const auto& a, const auto& b) { return cost(a) > cost(b); });
    return tasks;
  }

  const cpu::Kernels& table_ = cpu::kernels();
};

}  // namespace

Backend& cpu_backend() {
  static CpuBackend backend;
  return backend;
}

}  // namespace pop
