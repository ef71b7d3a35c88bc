#include "cuda/host/cuda_backend.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <string>

#include "core/math.h"
#include "core/text.h"
#include "cuda/host/cuda_attention.h"
#include "runtime/kv_project.h"
#include "torch/aten.h"

namespace pop {

namespace {

#if defined(POP_CUDA_SHIM)
constexpr auto kDeviceType = torch::headeronly::DeviceType::CPU;
#else
constexpr auto kDeviceType = torch::headeronly::DeviceType::CUDA;
#endif

// Bytes of a run's [k | v] at a time; they bound kv_project's workspace.
constexpr int64_t kKvProjectBytes = 96 << 20;
constexpr int64_t kKvProjectMinRows = 256;

// Segments of up to so many rows go to cuda/attention.cu, which splits along the keys.
constexpr int64_t kFewRows = 64;

// Settings of torch.ops.pop.tune, for measuring (docs/ops.md).
struct Options {
  std::atomic<int64_t> skinny_rows{8};        // products of up to so many rows run in cuda/skinny_gemm.cu
  std::atomic<int64_t> library_attention{1};  // 0: all attention runs in cuda/attention.cu
  std::atomic<int64_t> early_launch{0};       // kernels start before the previous ones have ended (cuda/launch.cuh)
  std::atomic<int64_t> fused{0};              // runs are projected by cuda/kv_project_sm90.cu if it supports them
  std::atomic<int64_t> kv_project_kib{0};     // KiB of a run's [k | v] per product, at least one layer; 0: all layers
};

Options& options() {
  static Options instance;
  return instance;
}

}  // namespace

int64_t CudaBackend::tune(const std::string& option, int64_t value) {
  if (option == "skinny_rows") return options().skinny_rows.exchange(std::clamp<int64_t>(value, 0, cuda::kSkinnyRows));
  if (option == "library_attention") return options().library_attention.exchange(value);
  if (option == "sdpa_rows") return set_sdpa_rows(value);
  if (option == "early_launch") return options().early_launch.exchange(value);
  if (option == "fused_kv_project") return options().fused.exchange(value);
  if (option == "kv_project_kib") return options().kv_project_kib.exchange(std::clamp<int64_t>(value, 0, 1 << 20));
  throw std::runtime_error(
      "pop::tune: option: expected gemm_blocks, skinny_rows, library_attention, sdpa_rows, "
      "early_launch, fused_kv_project or kv_project_kib, got " +
      shortened(option));
}

void CudaBackend::check_reported_ids(int device) {
  const DeviceScope scope(device);
  if (cuda::take_bad_id()) {
    throw std::runtime_error(
        "pop::prefill: input: expected ids of the vocabulary, got others in an earlier call on this device "
        "(it used the nearest id; its results are void)");
  }
}

std::string CudaBackend::device_missing(int device) { return cuda::device_missing(device); }

CudaBackend::CudaBackend(int device) : device_(device), scope_(device), stream_(current_stream(device)) {}

// This kernel waits for everything in the stream, including weights that were just written. Later kernels of the call
// need not, so they may launch early.
void CudaBackend::build_row_tables(const RowTablesParams& p) {
  cuda::launch_build_row_tables(p, stream_);
  if (options().early_launch != 0 && cuda::device_facts().code >= 90) early_launches_.emplace();
}

void CudaBackend::embed(const EmbedParams& p) { cuda::launch_embed(p, cuda::bad_id_flag(), stream_); }

void CudaBackend::add_features(const AddFeaturesParams& p) { cuda::launch_add_features(p, stream_); }

void CudaBackend::rms_norm(const RmsNormParams& p) { cuda::launch_rms_norm(p, stream_); }

void CudaBackend::rope_cache_write(const RopeCacheWriteParams& p) { cuda::launch_rope_cache_write(p, stream_); }

void CudaBackend::gated_act(const GatedActParams& p) { cuda::launch_gated_act(p, stream_); }

void CudaBackend::to_float32(const ToFloat32Params& p) { cuda::launch_to_float32(p, stream_); }

void CudaBackend::route(const RouteParams& p) { cuda::launch_route(p, stream_); }

void CudaBackend::combine_rows(const CombineRowsParams& p) { cuda::launch_combine_rows(p, stream_); }

// The only wait for the device: the number of rows of each expert decides which products to launch.
void CudaBackend::group_rows(const GroupRowsParams& p) {
  cuda::launch_group_rows(p, stream_);
  cuda::copy_to_host(p.host_begin, p.begin, (p.experts + 1) * sizeof(int64_t), stream_,
                     "pop::prefill: a model with experts waits for its router in every sparse layer");
}

void CudaBackend::quantize_rows(const QuantizeRowsParams& p) { cuda::launch_quantize_rows(p, stream_); }

// For fp8, the conditions of aten::_scaled_mm with one scale per row.
std::string CudaBackend::products_missing(Products products, DType dtype) const {
  if (products == Products::int8) return "expected a model on a CPU, got one on a CUDA device";
  if (dtype != DType::bf16) return join("expected bfloat16 on a CUDA device, got ", to_string(dtype));
  const cuda::DeviceFacts& facts = cuda::device_facts();
  if (kDeviceType == torch::headeronly::DeviceType::CUDA && facts.major * 10 + facts.minor < 89) {
    return join("expected a device of compute capability 8.9 or more, got ", facts.major, ".", facts.minor);
  }
  const std::string reason = foreign::reason_against("aten::_scaled_mm.out");
  return reason.empty() ? "" : join("expected an aten::_scaled_mm.out of a known schema, got another ", reason);
}

void CudaBackend::gemm(const GemmParams* products, int64_t count) {
  for (int64_t i = 0; i < count;) {
    const GemmParams& product = products[i];
    if (product.m > options().skinny_rows || product.a_scale != nullptr || product.w_transposed) {
      library_gemm(products[i++]);
      continue;
    }
    // Consecutive products that share `a` go into one launch.
    const int64_t first = i;
    const auto shares = [&](const GemmParams& other) {
      const GemmParams& p = products[first];
      return other.a == p.a && other.a_stride == p.a_stride && other.m == p.m && other.k == p.k &&
             other.dtype == p.dtype;
    };
    while (i < count && i - first < 3 && !products[i].w_transposed && shares(products[i])) ++i;
    cuda::launch_skinny_gemm(products + first, i - first, stream_);
  }
}

void CudaBackend::library_gemm(const GemmParams& p) {
  if (p.m == 0 || p.n == 0) return;
  aten::matmul(p, torch::stable::Device(kDeviceType, kDeviceType == torch::headeronly::DeviceType::CPU ? -1 : device_));
}

// ---- The projection of a run ---------------------------------------------------------------

namespace {

int64_t kv_project_rows(DType dtype, int64_t rows, int64_t columns) {
  const int64_t fitting = kKvProjectBytes / (columns * element_size(dtype));
  // Whole tiles, so that the last one of a chunk is not mostly empty.
  return std::min(rows, std::max(kKvProjectMinRows, fitting / kKvProjectMinRows * kKvProjectMinRows));
}

// Layers of one product: few enough that the epilogue can find its result in the L2 cache.
int64_t layers_at_once(const KvProjectParams& p, int64_t rows) {
  const int64_t most = options().kv_project_kib << 10;
  if (most == 0) return p.layers;
  const int64_t bytes_per_layer = rows * 2 * p.kv_heads * p.head_dim * element_size(p.dtype);
  const int64_t parts = ceil_div(p.layers, std::clamp<int64_t>(most / bytes_per_layer, 1, p.layers));
  return ceil_div(p.layers, parts);
}

}  // namespace

size_t CudaBackend::kv_project_workspace(DType dtype, int64_t rows, int64_t hidden_size, int64_t layers,
                                         int64_t kv_dim) const {
  return kv_project_bytes(dtype, kv_project_rows(dtype, rows, layers * 2 * kv_dim), hidden_size, layers, kv_dim);
}

void CudaBackend::kv_project(const KvProjectParams& p) {
  if (options().fused != 0 && p.rows > options().skinny_rows && cuda::kv_project_sm90_supports(p)) {
    cuda::launch_kv_project_sm90(p, stream_);
    return;
  }
  const int64_t columns = p.layers * 2 * p.kv_heads * p.head_dim;
  const KvProjectChunks chunks{.rows = std::max<int64_t>(1, kv_project_rows(p.dtype, p.rows, columns)),
                               .layers = [&](int64_t rows) { return layers_at_once(p, rows); }};
  kv_project_in_chunks(*this, p, chunks, [&](const KvProjectParams& part, const void* kv) { write_kv(part, kv); });
}

// See KvWrite in runtime/kv_project.h.
void CudaBackend::write_kv(const KvProjectParams& p, const void* kv) {
  cuda::launch_kv_epilogue({.dtype = p.dtype,
                            .first_row = p.first_row,
                            .rows = p.rows,
                            .kv_heads = p.kv_heads,
                            .head_dim = p.head_dim,
                            .rotary_dim = p.rotary_dim,
                            .layers = p.layers,
                            .kv = kv,
                            .kv_stride = p.layers * 2 * p.kv_heads * p.head_dim,
                            .rstd = p.rstd,
                            .k_bias = p.k_bias,
                            .v_bias = p.v_bias,
                            .k_norm = p.norm_over_heads ? nullptr : p.k_norm,
                            .eps = p.eps,
                            .norm_offset = p.norm_offset,
                            .rope_table = p.rope_table,
                            .rope = p.rope,
                            .batch = p.batch,
                            .caches = p.caches},
                           stream_);
}

// ---- Attention -----------------------------------------------------------------------------

// A library takes segments of one shape in one call, such as a batch of prompts of equal length.
void CudaBackend::attention(const AttentionParams& p) {
  std::vector<Segment> own;
  const int capability = cuda::device_facts().major * 10 + cuda::device_facts().minor;
  for (int64_t begin = 0, end = 0; begin < p.num_segments; begin = end) {
    const Segment& first = p.segments[begin];
    const auto continues = [&](const Segment& segment, int64_t index) {
      return segment.sequence == first.sequence + index && segment.first_row == first.first_row + index * first.rows &&
             segment.rows == first.rows && segment.first_position == first.first_position &&
             segment.cache_start == first.cache_start && segment.visible_end == first.visible_end;
    };
    for (end = begin + 1; end < p.num_segments && continues(p.segments[end], end - begin);) ++end;
    AttentionParams part = p;
    part.segments = p.segments + begin;
    part.num_segments = end - begin;
    if (part.window >= first.first_position + first.rows) part.window = 0;  // the window covers everything
    const bool to_library = first.rows > kFewRows && options().library_attention != 0;
    if (to_library && library_attention(part, device_, capability)) continue;
    own.insert(own.end(), p.segments + begin, p.segments + end);
  }
  if (!own.empty()) own_attention(p, own);
}

void CudaBackend::own_attention(const AttentionParams& p, const std::vector<Segment>& segments) {
  AttentionParams part = p;
  part.segments = segments.data();
  part.num_segments = static_cast<int64_t>(segments.size());
  const auto bytes = static_cast<int64_t>(cuda::attention_workspace(part));
  // Freed on return: torch's allocator gives it only to later work on the same stream.
  const torch::stable::Tensor workspace = torch::stable::empty(
      {bytes}, torch::headeronly::ScalarType::Byte, std::nullopt,
      torch::stable::Device(kDeviceType, kDeviceType == torch::headeronly::DeviceType::CPU ? -1 : device_));
  cuda::launch_attention(part, workspace.mutable_data_ptr(), stream_);
}

void CudaBackend::copy_rows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t row_bytes,
                            int64_t rows) noexcept {
  cuda::copy_rows(to, to_stride, from, from_stride, row_bytes, rows, stream_);
}

}  // namespace pop
