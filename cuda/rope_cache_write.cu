// Prepares q, k and v for attention: row scale, bias, RMSNorm per head, RoPE (or RoPE, RMSNorm). q is updated in place,
// k and v go to the cache. One launch serves one layer with its q, or the k and v of every layer of a run. Values are
// fp32 until the single rounding at the end.
//
// Floor: q, k and v read once and written once, (heads + 2 * kv_heads) * head_dim elements per row each way; for a run
// layers * 2 * kv_heads * head_dim. In addition cos and sin, rotary_dim floats per row, and the row tables are read.
//
// A group of lanes computes a head. A lane holds two ranges of `count` channels, which in the rotary part are RoPE
// partners (rotary_dim / 2 apart; interleaved: 2 * count channels in a row), and keeps their cos and sin from one head
// of the row to the next.
#include <algorithm>
#include <bit>

#include "cuda/elements.cuh"
#include "cuda/launch.cuh"

namespace pop::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kBlocksToFit = 8;    // per multiprocessor, limited by registers
constexpr int kLayersAtOnce = 32;  // keeps the kernel parameters under 4 KiB, which every driver accepts
constexpr int kMostHeadsAGroup = 4;

struct LayerHeads {
  const void *k_bias, *v_bias, *k_norm;  // or null
  LayerCache cache;
};

// The heads of a row in the order in which groups process them: `heads` of q, then for each layer `kv_heads` of k and
// as many of v.
template <int max_layers>
struct HeadsWork {
  int heads, kv_heads, layers, head_dim, half;  // half: rotary_dim / 2
  bool any_norm;
  RopeForm rope;
  int64_t first_row;
  void* q;
  int64_t q_stride;
  const void* q_bias;
  const void* q_norm;
  const void *k, *v;  // of the first layer; the next layer's are 2 * kv_heads * head_dim elements further
  int64_t kv_stride;
  float norm_eps, norm_offset;
  const float* row_scale;
  const int64_t *row_sequence, *row_position;
  const float *cos, *sin;
  CacheAddress address;
  LayerHeads layer[max_layers];
};

template <class T>
struct Head {
  const T* raw;
  const T* bias;  // or null
  const T* norm;  // or null
  T* out;
  float scale;
  bool turns;
};

template <class T>
__device__ __forceinline__ const T* at(const void* base, int64_t offset) {
  return base == nullptr ? nullptr : static_cast<const T*>(base) + offset;
}

// The values that all heads of a row share.
struct Place {
  int64_t row;  // of q, k and v
  int64_t sequence, slot;
  float scale;

  template <int max_layers>
  __device__ __forceinline__ Place(const HeadsWork<max_layers>& p, int64_t row_) : row(row_) {
    sequence = p.row_sequence[p.first_row + row];
    slot = cache_slot(p.address, sequence, p.row_position[p.first_row + row]);
    scale = p.row_scale == nullptr ? 1.0f : p.row_scale[row];
  }
};

// The source and destination of head `h` of the row.
template <class T, int max_layers>
__device__ __forceinline__ Head<T> head_of(const HeadsWork<max_layers>& p, const Place& place, int h) {
  if (h < p.heads) {
    const int channel = h * p.head_dim;
    T* q = static_cast<T*>(p.q) + (place.row * p.q_stride + channel);
    return {q, at<T>(p.q_bias, channel), static_cast<const T*>(p.q_norm), q, 1.0f, true};
  }
  const int kv = h - p.heads;
  const int j = max_layers == 1 ? 0 : kv / (2 * p.kv_heads), of_layer = kv - j * 2 * p.kv_heads;
  const bool is_k = of_layer < p.kv_heads;
  const int head = is_k ? of_layer : of_layer - p.kv_heads, channel = head * p.head_dim;
  const LayerHeads& layer = p.layer[j];
  const T* raw = static_cast<const T*>(is_k ? p.k : p.v);
  T* cache = static_cast<T*>(is_k ? layer.cache.key : layer.cache.value);
  const CacheStrides& strides = is_k ? layer.cache.key_strides : layer.cache.value_strides;
  return {raw + (place.row * p.kv_stride + j * 2 * p.kv_heads * p.head_dim + channel),
          at<T>(is_k ? layer.k_bias : layer.v_bias, channel),
          is_k ? static_cast<const T*>(layer.k_norm) : nullptr,
          cache + slot_offset(strides, place.sequence, head, place.slot),
          place.scale,
          is_k};
}

// Tells the compiler that a pointer which was chosen among several is to global memory.
template <class T>
__device__ __forceinline__ T* global(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// Loads 16 bytes at a time: the tables of cos and sin have no larger alignment.
template <int count>
__device__ __forceinline__ void load_angles(const float* from, float (&to)[count]) {
  constexpr int step = count < 4 ? count : 4;
#pragma unroll
  for (int first = 0; first < count; first += step) {
    float four[step];
    load(from + first, four);
#pragma unroll
    for (int e = 0; e < step; ++e) to[first + e] = four[e];
  }
}

// The two ranges of channels of a head that a lane holds, before or after RoPE.
template <int count>
struct Runs {
  float first[count], second[count];
};

// Item `i` of a row's heads: its two ranges of channels and their angles.
template <int count>
struct Item {
  int first, second;  // first channel of each range
  bool turns, has_second, interleaved;
  float cos[count], sin[count];

  template <int max_layers>
  __device__ __forceinline__ Item(const HeadsWork<max_layers>& p, int64_t row, int i) : cos{}, sin{} {
    turns = i * count < p.half;
    interleaved = p.rope.interleaved;
    const bool apart = turns && !interleaved;
    first = apart ? i * count : 2 * i * count;
    second = apart ? first + p.half : first + count;
    has_second = second < p.head_dim;
    if (!turns) return;
    const int64_t angle = (p.first_row + row) * p.half + i * count;
    load_angles(p.cos + angle, cos);
    load_angles(p.sin + angle, sin);
  }

  // raw * scale + bias.
  template <class T>
  __device__ __forceinline__ void load_projected(const Head<T>& head, Runs<count>& runs) const {
    load(global(head.raw) + first, runs.first);
    if (has_second) load(global(head.raw) + second, runs.second);
#pragma unroll
    for (int e = 0; e < count; ++e) {
      runs.first[e] *= head.scale;
      runs.second[e] *= head.scale;
    }
    if (head.bias == nullptr) return;
    float first_bias[count], second_bias[count] = {};
    load(global(head.bias) + first, first_bias);
    if (has_second) load(global(head.bias) + second, second_bias);
#pragma unroll
    for (int e = 0; e < count; ++e) {
      runs.first[e] += first_bias[e];
      runs.second[e] += second_bias[e];
    }
  }

  __device__ __forceinline__ void rotate(Runs<count>& runs) const {
    if (!interleaved) {
#pragma unroll
      for (int e = 0; e < count; ++e) rope_rotate(runs.first[e], runs.second[e], cos[e], sin[e]);
    } else if constexpr (count == 1) {
      rope_rotate(runs.first[0], runs.second[0], cos[0], sin[0]);
    } else {
      constexpr int half = count / 2;
#pragma unroll
      for (int e = 0; e < half; ++e) {
        rope_rotate(runs.first[2 * e], runs.first[2 * e + 1], cos[e], sin[e]);
        rope_rotate(runs.second[2 * e], runs.second[2 * e + 1], cos[half + e], sin[half + e]);
      }
    }
  }

  // What RMSNorm reads.
  template <class T>
  __device__ __forceinline__ void load_for_norm(const Head<T>& head, bool norm_after, Runs<count>& runs) const {
    load_projected(head, runs);
    if (norm_after && turns && head.turns) rotate(runs);
  }

  template <class T>
  __device__ __forceinline__ void finish(const Head<T>& head, float rstd, float offset, bool norm_after,
                                         Runs<count>& runs) const {
    if (head.norm != nullptr) {
      float first_norm[count], second_norm[count] = {};
      load(global(head.norm) + first, first_norm);
      if (has_second) load(global(head.norm) + second, second_norm);
#pragma unroll
      for (int e = 0; e < count; ++e) {
        runs.first[e] *= rstd * (first_norm[e] + offset);
        runs.second[e] *= rstd * (second_norm[e] + offset);
      }
    }
    if (!norm_after && turns && head.turns) rotate(runs);
    store(global(head.out) + first, runs.first);
    if (has_second) store(global(head.out) + second, runs.second);
  }
};

template <int count>
__device__ __forceinline__ float squares(const Runs<count>& runs) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < count; ++e) sum += runs.first[e] * runs.first[e] + runs.second[e] * runs.second[e];
  return sum;
}

// One row per blockIdx.x; threadIdx.x counts the lanes of a group (a power of two, within a warp), threadIdx.y the
// groups. Every lane runs every step, since a sum over a group needs whole warps.
template <class T, int count, int max_layers>
__global__ void __launch_bounds__(kThreads, kBlocksToFit)
    heads_kernel(const __grid_constant__ HeadsWork<max_layers> p) {
  wait_for_kernels_in_front();
  let_kernel_behind_start();
  const int total = p.heads + p.layers * 2 * p.kv_heads;
  const int items = (p.head_dim + 2 * count - 1) / (2 * count);
  const int lane = threadIdx.x, lanes = blockDim.x, groups = blockDim.y;
  const Item<count> item(p, blockIdx.x, lane);
  const Place place(p, blockIdx.x);
  for (int first = blockIdx.y * groups; first < total; first += gridDim.y * groups) {
    const int h = first + threadIdx.y;
    const int end = h < total ? items : 0;  // items of this group's head
    const Head<T> head = head_of<T>(p, place, h < total ? h : first);
    Runs<count> runs{};
    if (lane < end) item.load_for_norm(head, p.rope.norm_after, runs);
    float rstd = 1.0f;
    if (p.any_norm) {
      float sum = squares(runs);
      if constexpr (count == 1) {  // a wide head: more items than lanes
        for (int i = lane + lanes; i < end; i += lanes) {
          Runs<count> more{};
          Item<count>(p, blockIdx.x, i).load_for_norm(head, p.rope.norm_after, more);
          sum += squares(more);
        }
      }
      for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
      rstd = rms_scale(sum, p.head_dim, p.norm_eps);
    }
    if (lane < end) item.finish(head, rstd, p.norm_offset, p.rope.norm_after, runs);
    if constexpr (count == 1) {
      for (int i = lane + lanes; i < end; i += lanes) {
        Runs<count> more{};
        const Item<count> wide(p, blockIdx.x, i);
        wide.load_for_norm(head, p.rope.norm_after, more);
        wide.finish(head, rstd, p.norm_offset, p.rope.norm_after, more);
      }
    }
  }
}

// True if heads can be moved with 16-byte accesses, one item per lane.
template <class T, int max_layers>
bool in_packs(const HeadsWork<max_layers>& w) {
  const int count = kPack<T>;
  const auto aligned = [](const void* base, int64_t stride = 0) { return is_aligned(base, stride, sizeof(T)); };
  const auto cache_aligned = [&](const void* base, const CacheStrides& strides) {
    return aligned(base, strides.batch) && aligned(base, strides.head) && aligned(base, strides.slot);
  };
  bool all = w.head_dim % count == 0 && w.half % count == 0 && w.head_dim <= kWarp * 2 * count && aligned(w.cos) &&
             aligned(w.sin) && aligned(w.q_bias) && aligned(w.q_norm);
  if (w.heads > 0) all = all && aligned(w.q, w.q_stride);
  if (w.layers > 0) all = all && aligned(w.k, w.kv_stride) && aligned(w.v, w.kv_stride);
  for (int j = 0; j < w.layers; ++j) {
    const LayerHeads& layer = w.layer[j];
    all = all && aligned(layer.k_bias) && aligned(layer.v_bias) && aligned(layer.k_norm) &&
          cache_aligned(layer.cache.key, layer.cache.key_strides) &&
          cache_aligned(layer.cache.value, layer.cache.value_strides);
  }
  return all;
}

// Few rows are spread over as many threads as possible. If the rows alone fill the device, a group processes a few
// heads of its row one after the other.
template <class T, int count, int max_layers>
void launch_with(HeadsWork<max_layers> work, int64_t rows, Stream stream) {
  const int64_t items = ceil_div(work.head_dim, 2 * count);
  const int64_t group = std::bit_ceil(static_cast<uint64_t>(std::min<int64_t>(items, kWarp)));
  const int64_t lanes = (work.heads + static_cast<int64_t>(work.layers) * 2 * work.kv_heads) * group;
  if (lanes == 0) return;
  const DeviceFacts& device = device_facts();
  const int64_t at_once = static_cast<int64_t>(device.sm_count) * device.sm_threads;
  const int64_t in_turn = std::clamp<int64_t>(rows * lanes / at_once, 1, kMostHeadsAGroup);
  const int64_t threads = std::min<int64_t>(ceil_div(ceil_div(lanes, in_turn), kWarp) * kWarp, kThreads);
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(ceil_div(lanes, in_turn * threads)));
  const dim3 block(static_cast<unsigned>(group), static_cast<unsigned>(threads / group));
  launch_early("rope_cache_write", heads_kernel<T, count, max_layers>, grid, block, 0, stream, work);
}

template <int max_layers>
void launch_heads(DType dtype, const HeadsWork<max_layers>& work, int64_t rows, Stream stream) {
  static_assert(sizeof(work) <= 4096);
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    if (in_packs<T>(work)) return launch_with<T, kPack<T>>(work, rows, stream);
    launch_with<T, 1>(work, rows, stream);
  });
}

// The fields that the parameters of both launchers share.
template <int max_layers, class Params>
HeadsWork<max_layers> work_of(const Params& p, int64_t rope_table) {
  HeadsWork<max_layers> work{};
  work.kv_heads = static_cast<int>(p.kv_heads);
  work.head_dim = static_cast<int>(p.head_dim);
  work.half = static_cast<int>(p.rotary_dim / 2);
  work.first_row = p.first_row;
  work.kv_stride = p.kv_stride;
  work.row_sequence = p.batch->row_sequence;
  work.row_position = p.batch->row_position;
  work.norm_offset = p.norm_offset;
  work.rope = p.rope;
  work.cos = rope_table == 0 ? p.batch->cos : p.batch->cos_local;
  work.sin = rope_table == 0 ? p.batch->sin : p.batch->sin_local;
  work.address = p.batch->address;
  return work;
}

const void* layer_or_null(const void* const* list, int64_t layer) { return list == nullptr ? nullptr : list[layer]; }

int64_t rope_table_of(const KvEpilogueParams& p, int64_t layer) {
  return p.rope_table == nullptr ? 0 : p.rope_table[layer];
}

// Layers [first, first + count) of a run, which share a table of cos and sin.
template <int max_layers>
void launch_layers(const KvEpilogueParams& p, int64_t first, int64_t count, Stream stream) {
  const int64_t element = p.dtype == DType::f32 ? 4 : 2, kv_bytes = p.kv_heads * p.head_dim * element;
  HeadsWork<max_layers> work = work_of<max_layers>(p, rope_table_of(p, first));
  work.layers = static_cast<int>(count);
  work.k = static_cast<const char*>(p.kv) + first * 2 * kv_bytes;
  work.v = static_cast<const char*>(work.k) + kv_bytes;
  work.norm_eps = p.eps;
  work.row_scale = p.rstd;
  for (int64_t j = 0; j < count; ++j) {
    work.layer[j] = {layer_or_null(p.k_bias, first + j), layer_or_null(p.v_bias, first + j),
                     layer_or_null(p.k_norm, first + j), p.caches[first + j]};
    work.any_norm |= work.layer[j].k_norm != nullptr;
  }
  launch_heads(p.dtype, work, p.rows, stream);
}

}  // namespace

void launch_rope_cache_write(const RopeCacheWriteParams& p, Stream stream) {
  if (p.rows == 0) return;
  if (p.q != nullptr && p.k != nullptr && p.q_rope_table != p.rope_table) {
    // A lane keeps the angles of its channels for all heads of a row, so q has a launch of its own.
    RopeCacheWriteParams q = p, kv = p;
    q.k = nullptr;
    q.rope_table = p.q_rope_table;
    kv.q = nullptr;
    launch_rope_cache_write(q, stream);
    launch_rope_cache_write(kv, stream);
    return;
  }
  HeadsWork<1> work = work_of<1>(p, p.rope_table);
  work.heads = p.q == nullptr ? 0 : static_cast<int>(p.heads);
  work.layers = p.k == nullptr ? 0 : 1;
  work.any_norm = (p.q != nullptr && p.q_norm != nullptr) || p.k_norm != nullptr;
  work.q = p.q;
  work.q_stride = p.q_stride;
  work.q_bias = p.q_bias;
  work.q_norm = p.q_norm;
  work.k = p.k;
  work.v = p.v;
  work.norm_eps = p.norm_eps;
  work.row_scale = p.row_scale;
  work.layer[0] = {p.k_bias, p.v_bias, p.k_norm, p.cache};
  launch_heads(p.dtype, work, p.rows, stream);
}

void launch_kv_epilogue(const KvEpilogueParams& p, Stream stream) {
  if (p.rows == 0) return;
  if (p.layers == 1) return launch_layers<1>(p, 0, 1, stream);
  for (int64_t first = 0, end; first < p.layers; first = end) {
    end = first + 1;
    while (end < std::min(p.layers, first + kLayersAtOnce) && rope_table_of(p, end) == rope_table_of(p, first)) ++end;
    launch_layers<kLayersAtOnce>(p, first, end - first, stream);
  }
}

}  // namespace pop::cuda
