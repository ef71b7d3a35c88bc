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

}  // namespace

void CudaBackend::check_reported_ids(int device) {
  const DeviceScope scope(device);
  if (cuda::take_bad_id()) {
    throw std::runtime_error(
        "pop::prefill: input: expected ids of the vocabulary, got others in an earlier call on this device "
        "(it used the nearest id; its results are void)");
  }
}

std::string CudaBackend::device_missing(int device) { return cuda::device_missing(device); }

CudaBackend::CudaBackend(int device)
    : options_(thread_options()), device_(device), scope_(device), stream_(current_stream(device)) {}

// This kernel waits for everything in the stream, including weights that were just written. Later kernels of the call
// need not, so they may launch early.
void CudaBackend::build_row_tables(const RowTablesParams& p) {
  cuda::launch_build_row_tables(p, stream_);
  if (options_.early_launch != 0 && cuda::device_facts().code >= 90) early_launches_.emplace();
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
  if (p.host_begin == nullptr) return;
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
  enum class Kernel { library, skinny_gemm, skinny_mma };
  const auto kernel_of = [this](const GemmParams& p) {
    if (p.a_scale != nullptr || p.w_transposed || p.accumulate) return Kernel::library;
    if (p.m >= 2 && p.m <= options_.skinny_mma_rows && cuda::skinny_mma_fits(p)) return Kernel::skinny_mma;
    return p.m <= options_.skinny_rows ? Kernel::skinny_gemm : Kernel::library;
  };
  for (int64_t i = 0; i < count;) {
    const Kernel kernel = kernel_of(products[i]);
    if (kernel == Kernel::library) {
      library_gemm(products[i++]);
      continue;
    }
    // Consecutive products that share `a` go into one launch.
    const int64_t first = i;
    const auto shares = [&](const GemmParams& other) {
      const GemmParams& p = products[first];
      return other.a == p.a && other.a_stride == p.a_stride && other.m == p.m && other.k == p.k &&
             other.dtype == p.dtype && kernel_of(other) == kernel;
    };
    while (i < count && i - first < 3 && shares(products[i])) ++i;
    const auto launch = kernel == Kernel::skinny_mma ? cuda::launch_skinny_mma : cuda::launch_skinny_gemm;
    launch(products + first, i - first, stream_);
  }
}

// A product of few rows would gain nothing: it streams its weight, beside which a row of the residual stream is small.
bool CudaBackend::accumulates(DType, int64_t rows) const {
  return options_.residual_in_product != 0 && rows > std::max(options_.skinny_rows, options_.skinny_mma_rows) &&
         addmm_out() != nullptr && foreign::variant_of("aten::addmm.out") >= 0;
}

void CudaBackend::library_gemm(const GemmParams& p) {
  if (p.m == 0 || p.n == 0) return;
  const torch::stable::Device device = torch_device();
  if (!p.accumulate) return aten::matmul(p, device);
  const aten::MatmulOperands operands(p, device);
  foreign::require("aten::addmm.out");
  const AtenTensorHandle out = operands.out.get();  // out and self in one: torch then copies nothing
  if (addmm_out()(out, out, operands.a.get(), operands.w.get(), 1.0, 1.0) != 0) {
    throw std::runtime_error(std::string("aten::addmm.out: ") + aten::last_error());
  }
}

torch::stable::Device CudaBackend::torch_device() const {
  return {kDeviceType, kDeviceType == torch::headeronly::DeviceType::CPU ? -1 : device_};
}

// torch's kernel for groups is for bfloat16 on Hopper and data-centre Blackwell, with 16-byte rows. Elsewhere torch
// reads the offsets on the host and multiplies group by group. Under the shim it does so, too.
bool CudaBackend::groups_products(const GroupedGemmParams& p) const {
  if (options_.grouped_experts == 0 || p.dtype != DType::bf16) return false;
  const int major = cuda::device_facts().major;
  if (kDeviceType == torch::headeronly::DeviceType::CUDA && major != 9 && major != 10) return false;
  const auto aligned = [](const void* base, int64_t stride) {
    return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride % 8 == 0;
  };
  return aligned(p.a, p.a_stride) && aligned(p.w, p.w_stride) && p.w_matrix_stride % 8 == 0 && p.n % 8 == 0 &&
         p.k % 8 == 0 && foreign::variant_of("aten::_grouped_mm") >= 0;
}

void CudaBackend::grouped_gemm(const GroupedGemmParams& p) {
  if (p.rows == 0) return;
  const torch::stable::Device device = torch_device();
  const auto dtype = aten::scalar_type(p.dtype);
  const torch::stable::Tensor a = aten::matrix_view(p.a, p.rows, p.k, p.a_stride, 1, device, dtype);
  const torch::stable::Tensor w = torch::stable::from_blob(
      const_cast<void*>(p.w), {p.groups, p.k, p.n},
      {p.w_matrix_stride, p.w_transposed ? p.w_stride : 1, p.w_transposed ? 1 : p.w_stride}, device, dtype);
  const torch::stable::Tensor ends =
      torch::stable::to(torch::stable::from_blob(const_cast<int64_t*>(p.begin + 1), {p.groups}, {1}, device,
                                                 torch::headeronly::ScalarType::Long),
                        torch::headeronly::ScalarType::Int);
  torch::stable::Tensor out = aten::matrix_view(p.out, p.rows, p.n, p.out_stride, 1, device, dtype);
  torch::stable::copy_(out, aten::grouped_mm(a, w, ends));
}

// ---- The projection of a run ---------------------------------------------------------------

namespace {

int64_t kv_project_rows(DType dtype, int64_t rows, int64_t columns) {
  const int64_t fitting = kKvProjectBytes / (columns * element_size(dtype));
  // Whole tiles, so that the last one of a chunk is not mostly empty.
  return std::min(rows, std::max(kKvProjectMinRows, fitting / kKvProjectMinRows * kKvProjectMinRows));
}

// Layers of one product: few enough that the epilogue can find its result in the L2 cache.
// `most`: bytes, or 0 for all layers.
int64_t layers_at_once(const KvProjectParams& p, int64_t rows, int64_t most) {
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

// In a prefill the pass that adds the pending update computes rstd. Where no pass has, the kernel sums the squares
// itself, or, with fused_kv_project = 2, gets rstd from a pass of its own, like the library's product.
void CudaBackend::fused_kv_project(KvProjectParams p) {
  if (options_.fused_kv_project == 2 && p.rstd == nullptr) {
    auto* rstd = static_cast<float*>(p.workspace);  // free: only the library's product uses it
    rms_norm({.dtype = p.dtype,
              .rows = p.rows,
              .width = p.hidden_size,
              .x = const_cast<void*>(p.x),  // only read: there is no delta
              .x_stride = p.x_stride,
              .eps = p.eps,
              .out = nullptr,
              .out_stride = p.hidden_size,
              .rstd = rstd});
    p.rstd = rstd;
  }
  cuda::launch_kv_project_sm90(p, options_.kv_project_halves != 0, stream_);
}

void CudaBackend::kv_project(const KvProjectParams& p) {
  if (options_.fused_kv_project != 0 && p.rows > options_.skinny_rows && cuda::kv_project_sm90_supports(p)) {
    return fused_kv_project(p);
  }
  const int64_t columns = p.layers * 2 * p.kv_heads * p.head_dim;
  const KvProjectChunks chunks{
      .rows = std::max<int64_t>(1, kv_project_rows(p.dtype, p.rows, columns)),
      .layers = [&](int64_t rows) { return layers_at_once(p, rows, options_.kv_project_kib << 10); }};
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
    const bool to_library = first.rows > kFewRows && options_.library_attention != 0;
    if (to_library && library_attention(part, device_, capability, options_.sdpa_rows)) continue;
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
  const torch::stable::Tensor workspace =
      torch::stable::empty({bytes}, torch::headeronly::ScalarType::Byte, std::nullopt, torch_device());
  cuda::launch_attention(part, workspace.mutable_data_ptr(), stream_);
}

void CudaBackend::copy_rows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t row_bytes,
                            int64_t rows) noexcept {
  cuda::copy_rows(to, to_stride, from, from_stride, row_bytes, rows, stream_);
}

}  // namespace pop
