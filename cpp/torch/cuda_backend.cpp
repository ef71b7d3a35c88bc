#include "torch/cuda_backend.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <string>

#include "core/text.h"
#include "norm_over_heads.h"
#include "torch/aten.h"
#include "torch/cuda_attention.h"

namespace pop {

namespace {

#if defined(POP_CUDA_SHIM)
constexpr auto kDeviceType = torch::headeronly::DeviceType::CPU;
#else
constexpr auto kDeviceType = torch::headeronly::DeviceType::CUDA;
#endif

// Bytes of [k | v] of a run that are in flight at once; they bound kv_project's workspace.
constexpr int64_t kKvProjectBytes = 96 << 20;
constexpr int64_t kKvProjectMinRows = 256;

// Segments of so few rows go to the kernel that cuts along the keys.
constexpr int64_t kFewRows = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Settings for measuring, by name.
struct Options {
  std::atomic<int64_t> skinny_rows{8};        // products of up to so many rows take cuda/skinny_gemm.cu
  std::atomic<int64_t> library_attention{1};  // 0: all attention by cuda/attention.cu
  std::atomic<int64_t> early_launch{0};       // kernels start before those in front have ended (cuda/launch.cuh)
  std::atomic<int64_t> fused{0};              // runs by cuda/kv_project_sm90.cu, where it serves them
  std::atomic<int64_t> kv_project_kib{0};     // a run's [k | v] of so many layers at once; 0: of all
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
      option);
}

void CudaBackend::check_reported_ids(int device) {
  const DeviceScope scope(device);
  if (cuda::take_bad_id()) {
    throw std::runtime_error(
        "pop::prefill: input: expected ids of the vocabulary, got others in an earlier call on this device "
        "(it used the nearest id; its results are void)");
  }
}

CudaBackend::CudaBackend(int device) : device_(device), scope_(device), stream_(current_stream(device)) {}

// It waits for all that is in the stream, weights that were just written as well; what follows need not.
void CudaBackend::place_rows(const PlaceRowsParams& p) {
  cuda::launch_place_rows(p, stream_);
  if (options().early_launch != 0 && cuda::device_facts().code >= 90) early_launches_.emplace();
}

void CudaBackend::embed(const EmbedParams& p) { cuda::launch_embed(p, cuda::bad_id_flag(), stream_); }

void CudaBackend::add_features(const AddFeaturesParams& p) { cuda::launch_add_features(p, stream_); }

void CudaBackend::rms_norm(const RmsNormParams& p) { cuda::launch_rms_norm(p, stream_); }

void CudaBackend::rope_cache_write(const RopeCacheWriteParams& p) { cuda::launch_rope_cache_write(p, stream_); }

void CudaBackend::gated_act(const GatedActParams& p) { cuda::launch_gated_act(p, stream_); }

void CudaBackend::route(const RouteParams& p) { cuda::launch_route(p, stream_); }

void CudaBackend::combine_rows(const CombineRowsParams& p) { cuda::launch_combine_rows(p, stream_); }

// The one place that waits for the device: how many rows each expert has decides which products there are.
void CudaBackend::group_rows(const GroupRowsParams& p) {
  cuda::launch_group_rows(p, stream_);
  cuda::copy_to_host(p.host_begin, p.begin, (p.experts + 1) * sizeof(int64_t), stream_,
                     "pop::prefill: a model with experts waits for its router in every sparse layer");
}

void CudaBackend::quantize_rows(const QuantizeRowsParams& p) { cuda::launch_quantize_rows(p, stream_); }

// What aten::_scaled_mm asks for where every row has its scale.
std::string CudaBackend::fp8_missing(DType dtype) const {
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
    if (products[i].m > options().skinny_rows || products[i].a_scale != nullptr) {
      library_gemm(products[i++]);
      continue;
    }
    // Neighbours that share their rows go together.
    const int64_t first = i;
    const auto shares = [&](const GemmParams& other) {
      const GemmParams& p = products[first];
      return other.a == p.a && other.a_stride == p.a_stride && other.m == p.m && other.k == p.k &&
             other.dtype == p.dtype;
    };
    while (i < count && i - first < 3 && shares(products[i])) ++i;
    cuda::launch_skinny_gemm(products + first, i - first, stream_);
  }
}

void CudaBackend::library_gemm(const GemmParams& p) {
  if (p.m == 0 || p.n == 0) return;
  aten::matmul_nt(p,
                  torch::stable::Device(kDeviceType, kDeviceType == torch::headeronly::DeviceType::CPU ? -1 : device_));
}

// ---- The projection of a run ---------------------------------------------------------------

namespace {

int64_t kv_project_rows(DType dtype, int64_t rows, int64_t columns) {
  const int64_t at_once = kKvProjectBytes / (columns * element_size(dtype));
  // Whole tiles, so that the last one of a chunk is not mostly empty.
  return std::min(rows, std::max(kKvProjectMinRows, at_once / kKvProjectMinRows * kKvProjectMinRows));
}

// Layers of one product: what it writes can still be in the L2 cache when the epilogue reads it.
int64_t layers_at_once(const KvProjectParams& p, int64_t rows) {
  const int64_t most = options().kv_project_kib << 10;
  if (most == 0) return p.layers;
  const int64_t bytes_a_layer = rows * 2 * p.kv_heads * p.head_dim * element_size(p.dtype);
  const int64_t parts = ceil_div(p.layers, std::clamp<int64_t>(most / bytes_a_layer, 1, p.layers));
  return ceil_div(p.layers, parts);
}

// The same call for layers [first, first + count) of its run.
KvProjectParams part_of(const KvProjectParams& p, int64_t first, int64_t count) {
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

// Where the parts of its workspace begin, in bytes.
struct KvProjectLayout {
  size_t rstd, normalised, kv, bytes;

  KvProjectLayout(DType dtype, int64_t rows, int64_t hidden_size, int64_t columns) {
    const bool normalise = dtype == DType::f16;
    rstd = 0;
    normalised = rstd + aligned(normalise ? 0 : rows * sizeof(float));
    kv = normalised + aligned(normalise ? rows * hidden_size * element_size(dtype) : 0);
    bytes = kv + aligned(rows * columns * element_size(dtype));
  }
};

}  // namespace

size_t CudaBackend::kv_project_workspace(DType dtype, int64_t rows, int64_t hidden_size, int64_t layers,
                                         int64_t kv_dim) const {
  const int64_t columns = layers * 2 * kv_dim;
  return KvProjectLayout(dtype, kv_project_rows(dtype, rows, columns), hidden_size, columns).bytes;
}

void CudaBackend::kv_project(const KvProjectParams& p) {
  if (options().fused != 0 && p.rows > options().skinny_rows && cuda::kv_project_sm90_supports(p)) {
    cuda::launch_kv_project_sm90(p, stream_);
    return;
  }
  const int64_t columns = p.layers * 2 * p.kv_heads * p.head_dim;
  const int64_t at_once = std::max<int64_t>(1, kv_project_rows(p.dtype, p.rows, columns));
  for (int64_t begin = 0; begin < p.rows; begin += at_once) {
    kv_project_chunk(p, begin, std::min(at_once, p.rows - begin));
  }
}

// Rows [begin, begin + rows) of the call. The scale rstd commutes with the GEMM, which therefore takes
// the rows as they are; in float16, where such products can overflow, they are scaled first.
void CudaBackend::kv_project_chunk(const KvProjectParams& p, int64_t begin, int64_t rows) {
  const int64_t columns = p.layers * 2 * p.kv_heads * p.head_dim;
  const KvProjectLayout layout(p.dtype, rows, p.hidden_size, columns);
  char* workspace = static_cast<char*>(p.workspace);
  const bool normalise = p.normalise && p.dtype == DType::f16;
  float* own_rstd = normalise ? nullptr : reinterpret_cast<float*>(workspace + layout.rstd);
  void* normalised = normalise ? workspace + layout.normalised : nullptr;
  const void* x = static_cast<const char*>(p.x) + begin * p.x_stride * element_size(p.dtype);
  if (p.normalise && (normalise || p.rstd == nullptr)) {
    rms_norm({.dtype = p.dtype,
              .rows = rows,
              .width = p.hidden_size,
              .x = const_cast<void*>(x),  // only read: there is no delta
              .x_stride = p.x_stride,
              .eps = p.eps,
              .out = normalised,
              .out_stride = p.hidden_size,
              .rstd = own_rstd});
  }
  KvProjectParams rest = p;
  rest.first_row = p.first_row + begin;
  rest.rows = rows;
  rest.x = normalise ? normalised : x;
  rest.x_stride = normalise ? p.hidden_size : p.x_stride;
  const float* rstd = p.rstd == nullptr ? own_rstd : p.rstd + begin;
  rest.rstd = normalise || !p.normalise ? nullptr : rstd;
  const int64_t at_once = layers_at_once(p, rows);
  for (int64_t first = 0; first < p.layers; first += at_once) {
    project_and_write(part_of(rest, first, std::min(at_once, p.layers - first)), workspace + layout.kv);
  }
}

// Rows and their scale as they are; `kv` is [rows, layers * 2 * kv_dim].
void CudaBackend::project_and_write(const KvProjectParams& p, void* kv) {
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
  gemm(&product, 1);
  if (p.norm_over_heads) norm_stacked_keys(*this, p, kv, p.rows);
  cuda::launch_kv_epilogue({.dtype = p.dtype,
                            .first_row = p.first_row,
                            .rows = p.rows,
                            .kv_heads = p.kv_heads,
                            .head_dim = p.head_dim,
                            .rotary_dim = p.rotary_dim,
                            .layers = p.layers,
                            .kv = kv,
                            .kv_stride = columns,
                            .rstd = p.rstd,
                            .k_bias = p.k_bias,
                            .v_bias = p.v_bias,
                            .k_norm = p.norm_over_heads ? nullptr : p.k_norm,
                            .eps = p.eps,
                            .norm_offset = p.norm_offset,
                            .rope_table = p.rope_table,
                            .batch = p.batch,
                            .caches = p.caches},
                           stream_);
}

// ---- Attention -----------------------------------------------------------------------------

// A library takes segments of one shape in one call: those of a batch of equal prompts.
void CudaBackend::attention(const AttentionParams& p) {
  std::vector<Segment> own;
  const int capability = cuda::device_facts().major * 10 + cuda::device_facts().minor;
  for (int64_t begin = 0, end = 0; begin < p.num_segments; begin = end) {
    const Segment& first = p.segments[begin];
    const auto continues = [&](const Segment& segment, int64_t index) {
      return segment.sequence == first.sequence + index && segment.first_row == first.first_row + index * first.rows &&
             segment.rows == first.rows && segment.first_position == first.first_position &&
             segment.cache_start == first.cache_start && segment.sees_to == first.sees_to;
    };
    for (end = begin + 1; end < p.num_segments && continues(p.segments[end], end - begin);) ++end;
    AttentionParams part = p;
    part.segments = p.segments + begin;
    part.num_segments = end - begin;
    if (part.window >= first.first_position + first.rows) part.window = 0;  // nothing lies behind it
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
  // Freed when this returns, for use by what comes later on the same stream.
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
