// The backend over the kernel table: cuts a call into pieces for torch's threads. No result depends
// on the number of threads, since every row, column or task is computed by one of them alone.
#include "cpu/cpu_backend.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/prepacked.h"
#include "norm_over_heads.h"

namespace pop {
namespace {

using torch::stable::parallel_for;

// Rows of a run's KV projection that are in flight at once; they bound its workspace.
constexpr int64_t kKvProjectRows = 1024;

struct AlignedDelete {
  void operator()(char* memory) const { ::operator delete(memory, std::align_val_t(kAlignment)); }
};
using Scratch = std::unique_ptr<char, AlignedDelete>;

Scratch allocate(size_t bytes) {
  return Scratch(static_cast<char*>(::operator new(std::max<size_t>(bytes, 1), std::align_val_t(kAlignment))));
}

// Runs kernel(params, begin, end) over `rows` rows of `width` elements each.
template <class Params>
void over_rows(void (*kernel)(const Params&, int64_t, int64_t), const Params& params, int64_t rows, int64_t width) {
  if (rows == 0) return;
  const int64_t grain = std::max<int64_t>(1, cpu::kGrainElements / std::max<int64_t>(1, width));
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

class CpuBackend final : public Backend {
 public:
  void place_rows(const PlaceRowsParams& p) override {
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

  void embed(const EmbedParams& p) override { over_rows(table_.embed, p, p.rows, p.width); }

  void add_features(const AddFeaturesParams& p) override { over_rows(table_.add_features, p, p.rows, p.width); }

  void rms_norm(const RmsNormParams& p) override { over_rows(table_.rms_norm, p, p.rows, p.width); }

  void gated_act(const GatedActParams& p) override { over_rows(table_.gated_act, p, p.rows, p.width); }

  void rope_cache_write(const RopeCacheWriteParams& p) override {
    const int64_t heads = (p.q == nullptr ? 0 : p.heads) + 2 * p.kv_heads;
    over_rows(table_.rope_cache_write, p, p.rows, heads * p.head_dim);
  }

  void quantize_rows(const QuantizeRowsParams& p) override { over_rows(table_.quantize_rows, p, p.rows, p.width); }

  // Through float32: for checks, not for speed.
  std::string fp8_missing(DType) const override { return ""; }

  void route(const RouteParams& p) override { over_rows(table_.route, p, p.rows, p.experts * p.experts_per_row); }

  void combine_rows(const CombineRowsParams& p) override {
    over_rows(table_.combine_rows, p, p.rows, p.width * p.experts_per_row);
  }

  void group_rows(const GroupRowsParams& p) override {
    const int64_t pairs = p.rows * p.experts_per_row;
    std::fill_n(p.host_begin, p.experts + 1, 0);
    for (int64_t i = 0; i < pairs; ++i) ++p.host_begin[p.expert[i] + 1];
    std::partial_sum(p.host_begin, p.host_begin + p.experts + 1, p.host_begin);
    std::copy_n(p.host_begin, p.experts, p.begin);  // where the next pair of each expert goes
    for (int64_t i = 0; i < pairs; ++i) {
      const int64_t place = p.begin[p.expert[i]]++;
      p.place[i] = static_cast<int32_t>(place);
      p.row[place] = i / p.experts_per_row;
    }
    std::copy_n(p.host_begin, p.experts + 1, p.begin);
  }

  std::string prepack_missing(DType dtype) const override { return cpu::prepack_missing(dtype); }

  std::unique_ptr<PackedWeight> prepack(const PrepackParams& p) const override { return cpu::prepack(p); }

  int64_t mlp_rows(DType dtype) const override { return cpu::mlp_rows(dtype); }

  void gemm(const GemmParams* products, int64_t count) override {
    for (int64_t i = 0; i < count; ++i) cpu::gemm(products[i]);
  }

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
    const Scratch scratch = allocate(cpu::workers_for(count) * scratch_bytes);
    cpu::over_tasks(count, [&](int64_t i, int64_t worker) {
      table_.attention(p, tasks[i], scratch.get() + worker * scratch_bytes);
    });
  }

  void kv_project(const KvProjectParams& p) override {
    for (int64_t begin = 0; begin < p.rows; begin += kKvProjectRows) {
      kv_project_chunk(p, begin, std::min(kKvProjectRows, p.rows - begin));
    }
  }

  size_t kv_project_workspace(DType dtype, int64_t rows, int64_t hidden_size, int64_t layers,
                              int64_t kv_dim) const override {
    return KvProjectLayout(dtype, std::min(rows, kKvProjectRows), hidden_size, layers, kv_dim).bytes;
  }

 private:
  // Where the parts of kv_project's workspace begin, in bytes.
  struct KvProjectLayout {
    size_t rstd, normalised, kv, bytes;

    KvProjectLayout(DType dtype, int64_t rows, int64_t hidden_size, int64_t layers, int64_t kv_dim) {
      const bool normalise = dtype == DType::f16;
      rstd = 0;
      normalised = rstd + aligned(normalise ? 0 : rows * sizeof(float));
      kv = normalised + aligned(normalise ? rows * hidden_size * element_size(dtype) : 0);
      bytes = kv + aligned(rows * layers * 2 * kv_dim * element_size(dtype));
    }
  };

  // Rows [begin, begin + rows) of the call. The scale rstd commutes with the GEMM, which therefore
  // takes the rows as they are; in float16, where such products can overflow, they are scaled first.
  void kv_project_chunk(const KvProjectParams& p, int64_t begin, int64_t rows) {
    const int64_t kv_dim = p.kv_heads * p.head_dim;
    const int64_t columns = p.layers * 2 * kv_dim;
    const int64_t element = element_size(p.dtype);
    const KvProjectLayout layout(p.dtype, rows, p.hidden_size, p.layers, kv_dim);
    char* workspace = static_cast<char*>(p.workspace);
    float* own_rstd = reinterpret_cast<float*>(workspace + layout.rstd);
    const float* rstd = p.rstd == nullptr ? own_rstd : p.rstd + begin;
    char* kv = workspace + layout.kv;
    const bool normalise = p.normalise && p.dtype == DType::f16;
    const char* x = static_cast<const char*>(p.x) + begin * p.x_stride * element;

    if (p.normalise && (normalise || p.rstd == nullptr)) {
      rms_norm({.dtype = p.dtype,
                .rows = rows,
                .width = p.hidden_size,
                .x = const_cast<char*>(x),  // only read: there is no delta
                .x_stride = p.x_stride,
                .eps = p.eps,
                .out = normalise ? workspace + layout.normalised : nullptr,
                .out_stride = p.hidden_size,
                .rstd = normalise ? nullptr : own_rstd});
    }
    cpu::gemm({.dtype = p.dtype,
               .m = rows,
               .n = columns,
               .k = p.hidden_size,
               .a = normalise ? workspace + layout.normalised : x,
               .a_stride = normalise ? p.hidden_size : p.x_stride,
               .w = p.weight,
               .w_stride = p.hidden_size,
               .out = kv,
               .out_stride = columns});
    if (p.norm_over_heads) norm_stacked_keys(*this, p, kv, rows);
    for (int64_t layer = 0; layer < p.layers; ++layer) {
      const char* k = kv + layer * 2 * kv_dim * element;
      rope_cache_write({.dtype = p.dtype,
                        .heads = 0,
                        .kv_heads = p.kv_heads,
                        .head_dim = p.head_dim,
                        .rotary_dim = p.rotary_dim,
                        .first_row = p.first_row + begin,
                        .rows = rows,
                        .q = nullptr,
                        .q_stride = 0,
                        .k = k,
                        .v = k + kv_dim * element,
                        .kv_stride = columns,
                        .q_bias = nullptr,
                        .k_bias = p.k_bias == nullptr ? nullptr : p.k_bias[layer],
                        .v_bias = p.v_bias == nullptr ? nullptr : p.v_bias[layer],
                        .q_norm = nullptr,
                        .k_norm = p.k_norm == nullptr || p.norm_over_heads ? nullptr : p.k_norm[layer],
                        .norm_eps = p.eps,
                        .norm_offset = p.norm_offset,
                        .rope_table = p.rope_table == nullptr ? 0 : p.rope_table[layer],
                        .row_scale = normalise || !p.normalise ? nullptr : rstd,
                        .batch = p.batch,
                        .cache = p.caches[layer]});
    }
  }

  // The longest tasks first, so that threads finish together; the kv heads of a range of rows in a
  // row, since they share its lines of q.
  std::vector<cpu::AttentionTask> attention_tasks(const AttentionParams& p) const {
    const int64_t task_rows = table_.attention_task_rows(p);
    std::vector<cpu::AttentionTask> tasks;
    for (int64_t s = 0; s < p.num_segments; ++s) {
      for (int64_t range = cpu::ceil_div(p.segments[s].rows, task_rows) - 1; range >= 0; --range) {
        const int64_t row = range * task_rows;
        const int64_t rows = std::min(task_rows, p.segments[s].rows - row);
        for (int64_t head = 0; head < p.kv_heads; ++head) {
          tasks.push_back({.segment = s, .kv_head = head, .row = row, .rows = rows});
        }
      }
    }
    const auto cost = [&](const cpu::AttentionTask& task) {
      const Segment& segment = p.segments[task.segment];
      const int64_t positions = std::max(segment.first_position + task.row + task.rows, segment.sees_to + 1);
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
