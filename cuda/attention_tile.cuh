// One block of attention.cu: its share of the work, and the steps from a tile of keys to the output.
#pragma once

#include <cuda_pipeline.h>

#include <algorithm>

#include "cuda/elements.cuh"
#include "cuda/launch.cuh"

namespace pop::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kSide = 4;  // queries per thread
constexpr float kLog2E = 1.44269504f;
constexpr int kKeyStep = 64;      // ranges of keys are multiples of this
constexpr int kPartsAtOnce = 48;  // keeps the kernel parameters under 4 KiB

// Blocks per SM for tiles of `queries`.
constexpr int blocks_an_sm(int queries) { return queries < 16 ? 3 : 2; }

// Keys are not cut for more SMs than this, which bounds shared memory and workspace.
constexpr int kMostSms = 256;
constexpr int kMaxSplits = kMostSms * blocks_an_sm(4);
// Per launch: 16.2 MiB of workspace with head_dim 256. A segment of its own always fits: its ranges of keys number at
// most as many as there are blocks, with up to 32 pairs of row and head each.
constexpr int kMaxPartials = 32 * kMostSms * blocks_an_sm(32);
static_assert(8 * kMostSms * blocks_an_sm(8) <= kMaxPartials);

// A segment of a launch.
struct Part {
  int64_t sequence;
  int64_t row;  // of q and out
  int rows;
  int first_position;
  int visible_end;    // Segment::visible_end
  int tiles;          // of queries: row-major (row, head of the group) pairs
  int splits;         // ranges of keys of a tile
  int split_keys;     // keys of a range
  int end_block;      // end of this segment's blocks
  int end_merge;      // end of its (row, head) pairs to merge
  int first_partial;  // index [row, head, split] follows
};

struct AttentionLaunch {
  const void* q;
  void* out;
  int64_t q_stride, out_stride;
  const void* sinks;  // AttentionParams::sinks
  LayerCache cache;
  CacheAddress address;
  float* partial_out;      // [partials, head_dim]
  float* partial_max_sum;  // [partials, 2], maxima in powers of two
  float scale;             // of scores, to powers of two
  float softcap;           // of scaled scores, in powers of two; 0: none
  int window;              // INT32_MAX for none
  int heads, kv_heads, group, head_dim;
  bool is_wide;    // K and V allow 16-byte accesses
  int pitch;       // elements from key to key in shared memory
  int key_shares;  // threads that share the keys of an output
  int queries;     // of a tile
  int count;
  int partials;
  Part parts[kPartsAtOnce];
};

// ---- Geometry ------------------------------------------------------------------------------

// The keys that at least one query of a tile sees.
struct Keys {
  int begin, end;
};

__device__ __forceinline__ Keys keys_of_tile(const AttentionLaunch& p, const Part& part, int tile) {
  const int first_row = tile * p.queries / p.group;
  const int last_row = min((tile + 1) * p.queries - 1, part.rows * p.group - 1) / p.group;
  return {max(0, part.first_position + first_row - p.window + 1),
          max(part.first_position + last_row + 1, part.visible_end)};
}

// The work of one block. It is in shared memory, to leave the registers to the sums.
struct alignas(64) Work {
  int64_t sequence, row;  // row of q and out of the segment
  int first_position;     // of the segment
  int last_in_block;      // Segment::visible_end - 1: rows see keys up to it, or up to themselves if that is further
  int kv_head;
  int first_query, queries;  // of the segment's (row, head of the group) pairs
  int begin, end;            // the range of keys
  int split, splits;         // index and number of the ranges
  int first_partial;         // index [row, head, split] follows
};

__device__ __forceinline__ Work work_of(const AttentionLaunch& p, int block) {
  int which = 0;
  while (block >= p.parts[which].end_block) ++which;
  if (which > 0) block -= p.parts[which - 1].end_block;
  const Part& part = p.parts[which];
  const int kv_head = block % p.kv_heads, split = block / p.kv_heads % part.splits;
  // The last rows see the most keys, so they start first.
  const int tile = part.tiles - 1 - block / p.kv_heads / part.splits;
  const Keys keys = keys_of_tile(p, part, tile);
  const int begin = keys.begin + split * part.split_keys;
  return {.sequence = part.sequence,
          .row = part.row,
          .first_position = part.first_position,
          .last_in_block = part.visible_end - 1,
          .kv_head = kv_head,
          .first_query = tile * p.queries,
          .queries = min(p.queries, part.rows * p.group - tile * p.queries),
          .begin = begin,
          .end = min(keys.end, begin + part.split_keys),
          .split = split,
          .splits = part.splits,
          .first_partial = part.first_partial};
}

// How kThreads share a tile of kQueries x kKeys scores, and the shared memory of a block.
template <class T, int kQueries>
struct Tile {
  static constexpr int kKeys = 128 / static_cast<int>(sizeof(T));
  static constexpr int kSides = kQueries / kSide;
  static constexpr int kThreadKeys = std::max(1, kSides* kKeys / kThreads);
  static constexpr int kKeyThreads = kKeys / kThreadKeys;
  static constexpr int kShares =
      kThreads / (kSides * kKeyThreads);                       // adjacent threads that share the channels of a score
  static constexpr int kChannels = kQueries < 16 ? 4 : 8;      // of the output, per thread
  static constexpr int kLoad = std::min(kChannels, kPack<T>);  // of these, per access
  static constexpr int kLanes = std::min(kWarp, kThreads / kQueries);  // lanes that share the softmax of a query

  // Distance of keys in shared memory, in elements, chosen so that the 16-byte accesses of 8 lanes (kShares along a
  // key) use all banks.
  static int pitch(int head_dim) {
    constexpr int kLine = 128 / static_cast<int>(sizeof(T)), kOffset = kShares * kPack<T> % kLine;
    return round_up(head_dim - kOffset, kLine) + kOffset;
  }

  Work* work;
  float* factor;       // [kQueries] rescales the output so far
  float* max;          // [kQueries]
  float* sum;          // [kQueries]
  int* position;       // [kQueries]
  float* probability;  // [kSides, kKeys, kSide]; holds the scores first
  float* q;            // [kQueries, head_dim], scaled
  T* k;                // [kKeys, pitch]
  T* v;                // [kKeys, pitch]
  float* thread_sums;  // [parts of the keys, kQueries, head_dim], at most kThreads * kSide * kChannels, over k and v
  size_t bytes;

  // `pitch` as above
  __host__ __device__ Tile(void* base, int head_dim, int pitch) {
    work = static_cast<Work*>(base);
    factor = reinterpret_cast<float*>(work + 1);
    max = factor + kQueries;
    sum = max + kQueries;
    position = reinterpret_cast<int*>(sum + kQueries);
    probability = sum + 2 * kQueries;
    q = probability + kQueries * kKeys;
    thread_sums = q + kQueries * head_dim;
    k = reinterpret_cast<T*>(thread_sums);
    v = k + kKeys * pitch;
    const size_t tiles = 2 * kKeys * pitch * sizeof(T);
    constexpr size_t kSums = kThreads * kSide * kChannels * sizeof(float);
    bytes = sizeof(Work) + (kQueries * (head_dim + kKeys + 4)) * sizeof(float) + (tiles > kSums ? tiles : kSums);
  }
};

// ---- Steps of a block ----------------------------------------------------------------------

// The keys to read of the tile that starts at `start`.
template <class T, int kKeys>
__device__ __forceinline__ void copy_keys(const AttentionLaunch& p, const Work& work, const void* cache,
                                          const CacheStrides& strides, int start, T* to) {
  constexpr int kLanes = kThreads / kKeys;
  const int key = start + static_cast<int>(threadIdx.x) / kLanes;
  if (key >= work.end) return;
  const T* from = static_cast<const T*>(cache) + cache_offset(strides, p.address, work.sequence, work.kv_head, key);
  to += (key - start) * p.pitch;
#pragma unroll 1
  for (int d = threadIdx.x % kLanes * kPack<T>; d < p.head_dim; d += kLanes * kPack<T>) {
    if (p.is_wide) {
      __pipeline_memcpy_async(to + d, from + d, 16);
    } else {
#pragma unroll 1
      for (int i = 0; i < kPack<T>; ++i) to[d + i] = from[d + i];
    }
  }
}

template <class T, int kQueries>
__device__ __forceinline__ void load_queries(const AttentionLaunch& p, const Tile<T, kQueries>& tile) {
  const Work& work = *tile.work;
#pragma unroll 1
  for (int i = threadIdx.x; i < kQueries * p.head_dim; i += kThreads) {
    const int query = work.first_query + i / p.head_dim, row = query / p.group;
    const int64_t head = work.kv_head * p.group + query % p.group;
    const T* q = static_cast<const T*>(p.q) + (work.row + row) * p.q_stride + head * p.head_dim;
    tile.q[i] = i / p.head_dim < work.queries ? to_float(q[i % p.head_dim]) * p.scale : 0.0f;
  }
  if (threadIdx.x < kQueries) {
    const int query = work.first_query + min(static_cast<int>(threadIdx.x), work.queries - 1);
    tile.position[threadIdx.x] = work.first_position + query / p.group;
    // The sink of a head is in the first range of keys, like a key whose value is zero.
    const bool has_sink = p.sinks != nullptr && work.split == 0;
    const int head = work.kv_head * p.group + query % p.group;
    tile.max[threadIdx.x] = has_sink ? to_float(static_cast<const T*>(p.sinks)[head]) * kLog2E : -INFINITY;
    tile.sum[threadIdx.x] = has_sink ? 1.0f : 0.0f;
  }
}

// Computes the scores of all queries and the keys from `start` on; minus infinity for keys that a query does not see.
template <class T, int kQueries>
__device__ __forceinline__ void score(const AttentionLaunch& p, const Tile<T, kQueries>& tile, int start) {
  using C = Tile<T, kQueries>;
  const int share = threadIdx.x % C::kShares;
  const int key = threadIdx.x / C::kShares % C::kKeyThreads;
  const int side = threadIdx.x / (C::kShares * C::kKeyThreads);
  const float* q = tile.q + side * kSide * p.head_dim;
  float sums[C::kThreadKeys][kSide] = {};
#pragma unroll 1
  for (int d = share * kPack<T>; d < p.head_dim; d += C::kShares * kPack<T>) {
    Operand<T, kPack<T>> k[C::kThreadKeys];
#pragma unroll
    for (int j = 0; j < C::kThreadKeys; ++j) k[j].load(tile.k + (key + j * C::kKeyThreads) * p.pitch + d);
#pragma unroll
    for (int half = 0; half < kPack<T>; half += 4) {
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
        float q_here[4];
        load<4>(q + i * p.head_dim + d + half, q_here);
#pragma unroll
        for (int j = 0; j < C::kThreadKeys; ++j) {
#pragma unroll
          for (int c = 0; c < 4; ++c) sums[j][i] = fmaf(q_here[c], k[j].value(half + c), sums[j][i]);
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < C::kThreadKeys; ++j) {
    const int slot = key + j * C::kKeyThreads, at = start + slot;
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      sums[j][i] = warp_sum<C::kShares>(sums[j][i]);
      if (p.softcap > 0.0f) sums[j][i] = softcapped(sums[j][i], p.softcap);
      const int position = tile.position[side * kSide + i];
      const bool is_visible = at <= max(position, tile.work->last_in_block) && position - at < p.window;
      sums[j][i] = is_visible ? sums[j][i] : -INFINITY;
    }
    if (share == 0) store<kSide>(tile.probability + (side * C::kKeys + slot) * kSide, sums[j]);
  }
}

// Turns scores into probabilities relative to the running maximum of their query.
template <class T, int kQueries>
__device__ __forceinline__ void softmax(const Tile<T, kQueries>& tile) {
  using C = Tile<T, kQueries>;
  const int query = threadIdx.x / C::kLanes;
  if (query >= kQueries) return;
  const int lane = threadIdx.x % C::kLanes;
  float* scores = tile.probability + (query / kSide * C::kKeys) * kSide + query % kSide;
  constexpr int kCount = C::kKeys / C::kLanes;
  const float before = tile.max[query];
  float values[kCount], top = before;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = scores[(lane + i * C::kLanes) * kSide];
    top = fmaxf(top, values[i]);
  }
  top = warp_max<C::kLanes>(top);
  const float reference = top == -INFINITY ? 0.0f : top;
  float added = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = exp2f(values[i] - reference);
    scores[(lane + i * C::kLanes) * kSide] = values[i];
    added += values[i];
  }
  added = warp_sum<C::kLanes>(added);
  __syncwarp();  // all lanes have read tile.max; a shuffle orders no memory
  if (lane > 0) return;
  const float factor = exp2f(before - reference);
  tile.factor[query] = factor;
  tile.max[query] = top;
  tile.sum[query] = tile.sum[query] * factor + added;
}

// The output that a thread sums: queries [4 * side, ...) and channels [channel, ...) over every key_shares-th key from
// `first` on; none if first >= key_shares.
template <class T, int kQueries>
struct OutputShare {
  int channel, side, first;
  __device__ explicit OutputShare(int head_dim) {
    using C = Tile<T, kQueries>;
    const int groups = head_dim / C::kChannels, thread = static_cast<int>(threadIdx.x);
    channel = thread % groups * C::kChannels;
    side = thread / groups % C::kSides;
    first = thread / groups / C::kSides;
  }
};

// output += probabilities . V of the first `count` keys of a tile
template <class T, int kQueries>
__device__ __forceinline__ void add_values(const AttentionLaunch& p, const Tile<T, kQueries>& tile,
                                           const OutputShare<T, kQueries>& share, int count,
                                           float (&output)[kSide][Tile<T, kQueries>::kChannels]) {
  using C = Tile<T, kQueries>;
  constexpr int kChannels = C::kChannels, kLoad = C::kLoad;
  if (share.first >= p.key_shares) return;
  float factor[kSide];
  load<kSide>(tile.factor + share.side * kSide, factor);
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
    if (factor[i] == 1.0f) continue;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) output[i][c] *= factor[i];
  }
#pragma unroll 1
  for (int slot = share.first; slot < count; slot += p.key_shares) {
    float probability[kSide];
    load<kSide>(tile.probability + (share.side * C::kKeys + slot) * kSide, probability);
    Operand<T, kLoad> v[kChannels / kLoad];
#pragma unroll
    for (int j = 0; j < kChannels / kLoad; ++j) v[j].load(tile.v + slot * p.pitch + share.channel + j * kLoad);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const float value = v[c / kLoad].value(c % kLoad);
#pragma unroll
      for (int i = 0; i < kSide; ++i) output[i][c] = fmaf(probability[i], value, output[i][c]);
    }
  }
}

// Adds the outputs of the threads and writes them to `out`, or to the workspace if other blocks have further keys.
template <class T, int kQueries>
__device__ __forceinline__ void store_output(const AttentionLaunch& p, const Tile<T, kQueries>& tile,
                                             const OutputShare<T, kQueries>& share,
                                             const float (&output)[kSide][Tile<T, kQueries>::kChannels]) {
  if (share.first < p.key_shares) {
    float* to = tile.thread_sums + (share.first * kQueries + share.side * kSide) * p.head_dim + share.channel;
#pragma unroll
    for (int i = 0; i < kSide; ++i, to += p.head_dim) store<Tile<T, kQueries>::kChannels>(to, output[i]);
  }
  __syncthreads();
  const Work& work = *tile.work;
#pragma unroll 1
  for (int i = threadIdx.x; i < work.queries * p.head_dim; i += kThreads) {
    float total = 0.0f;
    for (int from = 0; from < p.key_shares; ++from) total += tile.thread_sums[from * kQueries * p.head_dim + i];
    const int query = i / p.head_dim, channel = i % p.head_dim;
    const int64_t row = (work.first_query + query) / p.group;
    const int64_t head = work.kv_head * p.group + (work.first_query + query) % p.group;
    if (work.splits == 1) {
      T* out = static_cast<T*>(p.out) + (work.row + row) * p.out_stride + head * p.head_dim;
      out[channel] = from_float<T>(total / tile.sum[query]);
      continue;
    }
    const int64_t partial = work.first_partial + (row * p.heads + head) * work.splits + work.split;
    p.partial_out[partial * p.head_dim + channel] = total;
    if (channel == 0) {
      p.partial_max_sum[2 * partial] = tile.max[query];
      p.partial_max_sum[2 * partial + 1] = tile.sum[query];
    }
  }
}

}  // namespace

}  // namespace pop::cuda
