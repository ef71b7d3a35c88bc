// Causal attention of packed query rows over the KV cache: any dtype, stride, window and slot table.
//
// For the boundary step, where the floor is the bytes of K and V: a sequence's keys are cut into splits, so that
// one row of one sequence puts hundreds of blocks on the machine, and a second kernel merges the splits' results in
// their order. The number of splits depends on the sequence alone, never on what else is in the batch. The same
// kernel, without splits, is the correct and slower way for what no library serves (float32, slot tables).
//
// A block takes a few queries (a row and head each) that share a KV head, and a range of keys. Eight lanes hold a key:
// a warp looks at four keys at a time, a block at sixteen, and each group of eight lanes keeps a running softmax of
// its own; they are merged at the end. All arithmetic is float32.
#include <algorithm>

#include "cuda/elements.cuh"
#include "cuda/launch.cuh"

namespace pop::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kLanesPerKey = 8;
constexpr int kKeysPerWarp = kWarp / kLanesPerKey;
constexpr int kKeysPerBlock = kWarps * kKeysPerWarp;

constexpr int kSegmentsAtOnce = 40;      // whose descriptions stay, with the rest, below 4 KiB of parameters
constexpr int64_t kMinSplitKeys = 64;    // fewer are not worth a block
constexpr int64_t kBlocksPerHead = 128;  // of a segment, where it has the keys for so many
constexpr float kLog2e = 1.44269504f;

// Queries of a block: a thread holds this many sums of kChannels floats.
template <int kChannels>
inline constexpr int kQueries = kChannels <= 16 ? 4 : 2;

struct Part {
  Segment segment;
  int64_t splits, split_keys;
  int64_t end_block;      // the first block past its own, counted over the parts of a launch
  int64_t first_partial;  // of its results in the workspace, in queries times splits of a KV head
};

struct Params {
  AttentionParams attention;
  int64_t group;  // query heads of a KV head
  int64_t num_parts;
  int64_t partials;  // of a KV head, over all segments of the call
  float* workspace;  // [kv_heads, partials, head_dim + 2]: maximum, sum, weighted values
  bool aligned_cache;
  Part parts[kSegmentsAtOnce];
};

// Channels i of a key or value: the lane's share, zero past head_dim.
template <class T, int kChannels>
__device__ __forceinline__ void load_share(const T* row, int lane, int head_dim, bool aligned, float (&to)[kChannels]) {
#pragma unroll
  for (int pack = 0; pack < kChannels / kPack<T>; ++pack) {
    const int channel = (pack * kLanesPerKey + lane) * kPack<T>;
    float values[kPack<T>] = {};
    if (channel < head_dim) {
      if (aligned) {
        load<kPack<T>>(row + channel, values);
      } else {
#pragma unroll
        for (int e = 0; e < kPack<T>; ++e) values[e] = to_float(row[channel + e]);
      }
    }
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) to[pack * kPack<T> + e] = values[e];
  }
}

// The running softmax of one query over the keys that a group of lanes has seen.
template <int kChannels>
struct Softmax {
  float maximum = -INFINITY;  // of scores times log2(e)
  float sum = 0.0f;
  float values[kChannels] = {};

  __device__ __forceinline__ void add(float score, const float (&value)[kChannels]) {
    const float before = maximum;
    maximum = fmaxf(before, score);
    const float keep = exp2f(before - maximum), weight = exp2f(score - maximum);
    sum = sum * keep + weight;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) values[i] = values[i] * keep + weight * value[i];
  }

  // With that of the lane `mask` away; both end up with the same.
  __device__ __forceinline__ void merge_lanes(int mask) {
    const float other = __shfl_xor_sync(kAllLanes, maximum, mask);
    const float both = fmaxf(maximum, other);
    const float keep = both == -INFINITY ? 0.0f : exp2f(maximum - both);
    const float take = both == -INFINITY ? 0.0f : exp2f(other - both);
    sum = sum * keep + __shfl_xor_sync(kAllLanes, sum, mask) * take;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      values[i] = values[i] * keep + __shfl_xor_sync(kAllLanes, values[i], mask) * take;
    }
    maximum = both;
  }
};

struct Range {
  int64_t begin, end;
};

// Keys of split `split` that some query from row `first` to row `last` of the segment sees.
__device__ __forceinline__ Range keys_of(const Params& p, const Part& part, int64_t first, int64_t last,
                                         int64_t split) {
  const int64_t window = p.attention.window, position = part.segment.first_position;
  const int64_t seen_from = window == 0 || position + first < window ? 0 : position + first - window + 1;
  const int64_t split_begin = split * part.split_keys, split_end = split_begin + part.split_keys;
  const int64_t end = position + last + 1;
  return {seen_from > split_begin ? seen_from : split_begin, end < split_end ? end : split_end};
}

// Scores of `queries` queries against the range's keys, and the softmax over them, by this thread's group of lanes.
template <class T, int kChannels>
__device__ __forceinline__ void attend(const Params& p, const Part& part, Range keys, int64_t kv_head, const float* q,
                                       const int64_t* positions, int queries,
                                       Softmax<kChannels> (&states)[kQueries<kChannels>]) {
  const AttentionParams& a = p.attention;
  const int lane = threadIdx.x % kLanesPerKey, head_dim = static_cast<int>(a.head_dim);
  // All lanes of a warp go round equally often: they take part in each other's sums.
  for (int64_t first = keys.begin; first < keys.end; first += kKeysPerBlock) {
    const int64_t key = first + threadIdx.x / kLanesPerKey;
    const bool there = key < keys.end;
    const int64_t place = there ? key : keys.begin;
    const T* k = static_cast<const T*>(a.cache.key) +
                 cache_offset(a.cache.key_strides, a.address, part.segment.sequence, kv_head, place);
    const T* v = static_cast<const T*>(a.cache.value) +
                 cache_offset(a.cache.value_strides, a.address, part.segment.sequence, kv_head, place);
    float key_share[kChannels], value_share[kChannels];
    load_share(k, lane, head_dim, p.aligned_cache, key_share);
    load_share(v, lane, head_dim, p.aligned_cache, value_share);
#pragma unroll
    for (int i = 0; i < kQueries<kChannels>; ++i) {
      if (i >= queries) break;
      float score = 0.0f;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) score += key_share[c] * q[(i * kChannels + c) * kLanesPerKey + lane];
      score = warp_sum<kLanesPerKey>(score);
      const bool visible = there && key <= positions[i] && (a.window == 0 || key > positions[i] - a.window);
      if (visible) states[i].add(score, value_share);
    }
  }
}

// Writes what the block's warps found for its queries: results, or partial ones where the keys are split.
template <class T, int kChannels>
__device__ __forceinline__ void finish(const Params& p, const Part& part, int64_t kv_head, int64_t first_query,
                                       int queries, int64_t split, float* shared,
                                       Softmax<kChannels> (&states)[kQueries<kChannels>]) {
  const AttentionParams& a = p.attention;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, head_dim = static_cast<int>(a.head_dim);
  const int width = head_dim + 2;
#pragma unroll
  for (int i = 0; i < kQueries<kChannels>; ++i) {
#pragma unroll
    for (int mask = kLanesPerKey; mask < kWarp; mask *= 2) states[i].merge_lanes(mask);
    float* row = shared + (warp * kQueries<kChannels> + i) * width;
    if (lane == 0) {
      row[0] = states[i].maximum;
      row[1] = states[i].sum;
    }
    if (lane < kLanesPerKey) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const int channel = (c / kPack<T> * kLanesPerKey + lane) * kPack<T> + c % kPack<T>;
        if (channel < head_dim) row[2 + channel] = states[i].values[c];
      }
    }
  }
  __syncthreads();
  for (int index = threadIdx.x; index < queries * head_dim; index += kThreads) {
    const int i = index / head_dim, channel = index % head_dim;
    const auto of_warp = [&](int w) { return shared + (w * kQueries<kChannels> + i) * width; };
    float maximum = -INFINITY, sum = 0.0f, value = 0.0f;
    for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, of_warp(w)[0]);
    for (int w = 0; w < kWarps; ++w) {
      const float weight = of_warp(w)[0] == -INFINITY ? 0.0f : exp2f(of_warp(w)[0] - maximum);
      sum += of_warp(w)[1] * weight;
      value += of_warp(w)[2 + channel] * weight;
    }
    const int64_t query = first_query + i;
    if (part.splits == 1) {
      const int64_t row = part.segment.first_row + query / p.group - a.first_row;
      const int64_t head = kv_head * p.group + query % p.group;
      static_cast<T*>(a.out)[row * a.out_stride + head * a.head_dim + channel] = from_float<T>(value / sum);
      continue;
    }
    float* partial = p.workspace + (kv_head * p.partials + part.first_partial + query * part.splits + split) * width;
    partial[2 + channel] = value;
    if (channel == 0) {
      partial[0] = maximum;
      partial[1] = sum;
    }
  }
}

// blockIdx.x: part, tile of queries, split; blockIdx.y: KV head.
template <class T, int kChannels>
__global__ void __launch_bounds__(kThreads) attention_kernel(const __grid_constant__ Params p) {
  constexpr int kTile = kQueries<kChannels>;
  const AttentionParams& a = p.attention;
  float* const shared = dynamic_shared<float>();  // the queries, then the warps' results
  __shared__ int64_t positions[kTile];
  int which = 0;
  while (static_cast<int64_t>(blockIdx.x) >= p.parts[which].end_block) ++which;
  const Part& part = p.parts[which];
  const int64_t block = blockIdx.x - (which == 0 ? 0 : p.parts[which - 1].end_block);
  const int64_t split = block % part.splits, first_query = block / part.splits * kTile;
  const int64_t left = part.segment.rows * p.group - first_query, kv_head = blockIdx.y;
  const int queries = left < kTile ? static_cast<int>(left) : kTile;

  // A lane's channels of a query lie kLanesPerKey apart, so that eight lanes read eight banks.
  for (int index = threadIdx.x; index < queries * kChannels * kLanesPerKey; index += kThreads) {
    const int i = index / (kChannels * kLanesPerKey), c = index / kLanesPerKey % kChannels;
    const int channel = (c / kPack<T> * kLanesPerKey + index % kLanesPerKey) * kPack<T> + c % kPack<T>;
    const int64_t query = first_query + i;
    const T* q = static_cast<const T*>(a.q) + (part.segment.first_row + query / p.group - a.first_row) * a.q_stride +
                 (kv_head * p.group + query % p.group) * a.head_dim;
    shared[index] = channel < a.head_dim ? to_float(q[channel]) * (a.scale * kLog2e) : 0.0f;
  }
  if (static_cast<int>(threadIdx.x) < queries) {
    positions[threadIdx.x] = part.segment.first_position + (first_query + threadIdx.x) / p.group;
  }
  __syncthreads();
  const Range keys = keys_of(p, part, first_query / p.group, (first_query + queries - 1) / p.group, split);
  Softmax<kChannels> states[kTile];
  attend<T, kChannels>(p, part, keys, kv_head, shared, positions, queries, states);
  __syncthreads();  // the queries are done with
  finish<T, kChannels>(p, part, kv_head, first_query, queries, split, shared, states);
}

// Merges the splits of a query, in their order. blockIdx.x: query of a part; blockIdx.y: KV head.
template <class T>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ Params p) {
  const AttentionParams& a = p.attention;
  int which = 0;
  int64_t query = blockIdx.x;
  for (; query >= p.parts[which].segment.rows * p.group; ++which) query -= p.parts[which].segment.rows * p.group;
  const Part& part = p.parts[which];
  if (part.splits == 1) return;
  const int64_t kv_head = blockIdx.y, width = a.head_dim + 2;
  const float* partials = p.workspace + (kv_head * p.partials + part.first_partial + query * part.splits) * width;
  float maximum = -INFINITY;
  for (int64_t s = 0; s < part.splits; ++s) maximum = fmaxf(maximum, partials[s * width]);
  const int64_t row = part.segment.first_row + query / p.group - a.first_row;
  T* out = static_cast<T*>(a.out) + row * a.out_stride + (kv_head * p.group + query % p.group) * a.head_dim;
  for (int64_t channel = threadIdx.x; channel < a.head_dim; channel += kThreads) {
    float sum = 0.0f, value = 0.0f;
    for (int64_t s = 0; s < part.splits; ++s) {
      const float* partial = partials + s * width;
      const float weight = partial[0] == -INFINITY ? 0.0f : exp2f(partial[0] - maximum);
      sum += partial[1] * weight;
      value += partial[2 + channel] * weight;
    }
    out[channel] = from_float<T>(value / sum);
  }
}

int64_t tile_of(const AttentionParams& p) { return p.head_dim <= 16 * kLanesPerKey ? 4 : 2; }

// How a segment's keys are cut: by its own rows and positions, whatever else is in the batch.
Part part_of(const AttentionParams& p, const Segment& segment) {
  const int64_t length = segment.first_position + segment.rows, group = p.heads / p.kv_heads;
  const int64_t tiles = ceil_div(segment.rows * group, tile_of(p));
  const int64_t wanted = std::min(ceil_div(length, kMinSplitKeys), std::max<int64_t>(1, kBlocksPerHead / tiles));
  const int64_t split_keys = ceil_div(ceil_div(length, wanted), kKeysPerBlock) * kKeysPerBlock;
  return {.segment = segment,
          .splits = ceil_div(length, split_keys),
          .split_keys = split_keys,
          .end_block = 0,
          .first_partial = 0};
}

int64_t partials_of(const AttentionParams& p, const Part& part) {
  return part.splits == 1 ? 0 : part.segment.rows * (p.heads / p.kv_heads) * part.splits;
}

template <class T, int kChannels>
void launch_parts(const Params& p, int64_t blocks, int64_t queries, bool split, Stream stream) {
  constexpr int64_t kTile = kQueries<kChannels>;
  const AttentionParams& a = p.attention;
  const int64_t floats = std::max(kTile * kChannels * kLanesPerKey, kWarps * kTile * (a.head_dim + 2));
  const auto heads = static_cast<unsigned>(a.kv_heads);
  launch("attention", attention_kernel<T, kChannels>, dim3(static_cast<unsigned>(blocks), heads), dim3(kThreads),
         floats * sizeof(float), stream, p);
  if (split) {
    launch("attention", combine_kernel<T>, dim3(static_cast<unsigned>(queries), heads), dim3(kThreads), 0, stream, p);
  }
}

}  // namespace

// At most about 2 * kBlocksPerHead * 4 * kv_heads results for each segment.
size_t attention_workspace(const AttentionParams& p) {
  int64_t partials = 0;
  for (int64_t i = 0; i < p.num_segments; ++i) partials += partials_of(p, part_of(p, p.segments[i]));
  return static_cast<size_t>(partials * p.kv_heads * (p.head_dim + 2)) * sizeof(float);
}

void launch_attention(const AttentionParams& a, void* workspace, Stream stream) {
  const int64_t element = element_size(a.dtype);
  Params p{};
  p.attention = a;
  p.group = a.heads / a.kv_heads;
  p.workspace = static_cast<float*>(workspace);
  p.partials = static_cast<int64_t>(attention_workspace(a) / sizeof(float)) / (a.kv_heads * (a.head_dim + 2));
  p.aligned_cache = true;
  for (const auto& [data, strides] :
       {std::pair{a.cache.key, a.cache.key_strides}, {a.cache.value, a.cache.value_strides}}) {
    for (const int64_t stride : {strides.batch, strides.head, strides.slot}) {
      p.aligned_cache = p.aligned_cache && is_aligned(data, stride, element);
    }
  }
  int64_t first_partial = 0;
  for (int64_t first = 0; first < a.num_segments; first += kSegmentsAtOnce) {
    p.num_parts = std::min<int64_t>(kSegmentsAtOnce, a.num_segments - first);
    int64_t blocks = 0, queries = 0;
    bool split = false;
    for (int64_t i = 0; i < p.num_parts; ++i) {
      Part part = part_of(a, a.segments[first + i]);
      part.first_partial = first_partial;
      first_partial += partials_of(a, part);
      queries += part.segment.rows * p.group;
      blocks += ceil_div(part.segment.rows * p.group, tile_of(a)) * part.splits;
      part.end_block = blocks;
      split = split || part.splits > 1;
      p.parts[i] = part;
    }
    with_element(a.dtype, [&](auto element_type) {
      using T = decltype(element_type);
      if (a.head_dim <= 8 * kLanesPerKey) {
        launch_parts<T, 8>(p, blocks, queries, split, stream);
      } else if (a.head_dim <= 16 * kLanesPerKey) {
        launch_parts<T, 16>(p, blocks, queries, split, stream);
      } else {
        launch_parts<T, 32>(p, blocks, queries, split, stream);
      }
    });
  }
}

}  // namespace pop::cuda
