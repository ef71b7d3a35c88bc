// Shared by both paths of attention.cpp: block sizes, the rows and keys of a task, and the softmax of a tile.
#pragma once

#include "attention_math.h"
#include "backend/params.h"
#include "core/math.h"
#include "kernels.h"

namespace pop::cpu::POP_ISA {
namespace {

struct TileConfig {
  // Products keep kRows x kVecs sums in registers, beside kVecs loaded vectors and a broadcast one:
  // 24 + 3 + 1 of 32 registers (AVX-512), 12 + 3 + 1 of 16 (AVX2), 8 + 2 + 1 (SSE). kRows divides
  // head_dim, a multiple of 8.
#if defined(__AVX512F__)
  static constexpr int kRows = 8, kVecs = 3;
#elif defined(__AVX__)
  static constexpr int kRows = 4, kVecs = 3;
#else
  static constexpr int kRows = 4, kVecs = 2;
#endif
  // A block is kWidth (query row, head) pairs, one per lane.
  static constexpr int kWidth = kVecs * kLanes;
  // Keys per tile: its scores (12 KiB; 24 KiB with AMX, whose processors have larger caches, and whose products take
  // less time than moving O between tiles of keys) stay in the L1 cache through product, softmax and product.
#if defined(POP_AMX)
  static constexpr int kKeys = 128;
#else
  static constexpr int kKeys = 64;
#endif
  // Lanes per task, a multiple of every kWidth. Packing K and V once per task then costs about 5 %, and Q and O of a
  // task, 144 KiB with head_dim 64 and 576 KiB with 256, fit in the L2 cache.
  static constexpr int kTaskLanes = 384;
  // Scores may exceed the maximum that probabilities refer to by a factor of 2^kSlack before the sums are rescaled.
  // That is far below the range of float32.
  static constexpr float kSlack = 8.0f;
};

constexpr float kLowest = -3.0e38f;
constexpr float kLog2E = 1.44269504f;

// How products q.k become exponents of two.
struct ScoreScale {
  float log2_scale;
  float cap;  // of scaled scores, in powers of two; 0: none
};

// A tile of keys, as a block of lanes sees it.
struct TileView {
  int64_t first_key;  // position of the tile's key 0
  int begin, end;     // keys that at least one lane sees, rounded to multiples of 8
  bool edge;          // at least one of them is hidden from a lane
  int64_t window;
  int64_t visible_end;  // Segment::visible_end
};

// The addresses of a task's rows in q, out and the cache. Its lanes are (query row, head) pairs, the heads of a row
// next to each other, so that adjacent lanes see nearly the same keys.
template <class T>
class TaskGeometry {
 public:
  TaskGeometry(const AttentionParams& params, const AttentionTask& task)
      : p_(params),
        segment_(params.segments[task.segment]),
        kv_head_(task.kv_head),
        row_(task.row),
        group_(params.heads / params.kv_heads),
        lanes_(task.rows * group_),
        keys_(last_visible(segment_.first_position + task.row + task.rows - 1) + 1),
        lowest_key_(first_visible(segment_.first_position + task.row)) {}

  int64_t lanes() const { return lanes_; }

  // Keys [lowest_key(), keys()) are visible to at least one lane. No other key is read.
  int64_t lowest_key() const { return lowest_key_; }
  int64_t keys() const { return keys_; }

  int64_t position(int64_t lane) const { return segment_.first_position + row_ + lane / group_; }

  const T* q(int64_t lane) const { return static_cast<const T*>(p_.q) + row_offset(lane, p_.q_stride); }
  T* out(int64_t lane) const { return static_cast<T*>(p_.out) + row_offset(lane, p_.out_stride); }

  // The maximum, in powers of two, and the sum of a lane's softmax before its first key: those of the sink, if any.
  void start_softmax(int64_t lane, float& max, float& sum) const {
    const T* sinks = static_cast<const T*>(p_.sinks);
    const float sink = sinks == nullptr ? kLowest : float_of(sinks[head(lane)]) * kLog2E;
    const bool counts = !(sink <= kLowest);  // a NaN does
    max = counts ? sink : kLowest;
    sum = counts ? 1.0f : 0.0f;
  }

  // head_dim elements; zeros for a key that no lane sees.
  const T* key_row(int64_t key) const { return cache_row(p_.cache.key, p_.cache.key_strides, key); }
  const T* value_row(int64_t key) const { return cache_row(p_.cache.value, p_.cache.value_strides, key); }

  // Forced inline: g++ treats a function of prefetches as one without effect and drops its calls.
  POP_INLINE void prefetch(int64_t key) const {
    const T* k = key_row(key);
    const T* v = value_row(key);
    for (int64_t d = 0; d < p_.head_dim; d += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(k + d, 0, 2);
      __builtin_prefetch(v + d, 0, 2);
    }
  }

  // The tile that starts at position `first_key`, for lanes first to last, both included.
  TileView view(int64_t first_key, int64_t first, int64_t last) const {
    const int64_t low = first_visible(position(first)) - first_key;
    const int64_t high = last_visible(position(last)) + 1 - first_key;
    TileView tile;
    tile.first_key = first_key;
    tile.begin = static_cast<int>(low < 0 ? 0 : low < TileConfig::kKeys ? low / 8 * 8 : TileConfig::kKeys);
    tile.end = static_cast<int>(high < TileConfig::kKeys ? round_up(high, 8) : TileConfig::kKeys);
    tile.edge = first_key + tile.end - 1 > last_visible(position(first)) ||
                first_key + tile.begin < first_visible(position(last));
    tile.window = p_.window;
    tile.visible_end = segment_.visible_end;
    return tile;
  }

  // Scales scores to exponents of two. Never zero, since a hidden score of minus infinity times zero is a NaN. A
  // negative scale flips the signs of Q instead, so that the largest score is always the largest product.
  ScoreScale score_scale() const {
    const float scale = __builtin_fabsf(p_.scale) * kLog2E;
    return {.log2_scale = scale < 1e-37f ? 1e-37f : scale, .cap = p_.softcap * kLog2E};
  }

 private:
  int64_t first_visible(int64_t position) const {
    return p_.window > 0 && position >= p_.window ? position - p_.window + 1 : 0;
  }

  int64_t last_visible(int64_t position) const {
    return position + 1 > segment_.visible_end ? position : segment_.visible_end - 1;
  }

  int64_t head(int64_t lane) const { return kv_head_ * group_ + lane % group_; }

  int64_t row_offset(int64_t lane, int64_t stride) const {
    const int64_t row = segment_.first_row - p_.first_row + row_ + lane / group_;
    return row * stride + head(lane) * p_.head_dim;
  }

  const T* cache_row(const void* cache, const CacheStrides& strides, int64_t key) const {
    static const T zeros[kMaxHeadDim] = {};
    if (key < lowest_key_ || key >= keys_) return zeros;
    return static_cast<const T*>(cache) + cache_offset(strides, p_.address, segment_.sequence, kv_head_, key);
  }

  const AttentionParams& p_;
  const Segment& segment_;
  const int64_t kv_head_, row_, group_, lanes_, keys_, lowest_key_;
};

// Applies the soft cap. The results are in the unit of the products again, since the softmax scales them.
template <int kVecs>
__attribute__((noinline)) void cap_scores(const TileView& tile, ScoreScale scale, float* scores) {
  using C = TileConfig;
  const float back = 1.0f / scale.log2_scale;
  for (int k = tile.begin; k < tile.end; ++k) {
    for (int v = 0; v < kVecs; ++v) {
      float* at = scores + k * C::kWidth + v * kLanes;
      store(at, softcapped(load(at) * scale.log2_scale, scale.cap) * back);
    }
  }
}

// Turns scores into units of probabilities and updates maxima and sums. Returns true if a maximum changed; the caller
// must then multiply o by `factor`.
template <class Units, int kVecs>
__attribute__((noinline)) bool softmax(const TileView& tile, ScoreScale scale, const int32_t* position, float* scores,
                                       float* max_so_far, float* sum_so_far, float* factor) {
  using C = TileConfig;
  const float log2_scale = scale.log2_scale;
  if (scale.cap > 0) cap_scores<kVecs>(tile, scale, scores);
  Vec top[kVecs];
  for (int v = 0; v < kVecs; ++v) top[v] = splat(-__builtin_inff());
  if (tile.edge) {
    for (int v = 0; v < kVecs; ++v) {
      VecI32 own;
      __builtin_memcpy(&own, position + v * kLanes, sizeof(own));
      const VecI32 first = tile.window > 0 ? own - static_cast<int32_t>(tile.window) : own - own - 1;
      const VecI32 last_in_block = own - own + static_cast<int32_t>(tile.visible_end - 1);
      const VecI32 last = own > last_in_block ? own : last_in_block;
      for (int k = tile.begin; k < tile.end; ++k) {
        float* at = scores + k * C::kWidth + v * kLanes;
        const int32_t key = static_cast<int32_t>(tile.first_key + k);
        const VecI32 hidden = (last < key) | (first >= key);
        store(at, hidden ? splat(-__builtin_inff()) : load(at));
      }
    }
  }
  for (int k = tile.begin; k < tile.end; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) top[v] = max(load(scores + k * C::kWidth + v * kLanes), top[v]);
  }

  bool moved = false;
  Vec reference[kVecs], sum[kVecs];
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    const Vec before = load(max_so_far + v * kLanes);
    const Vec now = top[v] * log2_scale;
    const auto rises = now > before + C::kSlack;
    reference[v] = rises ? now : before;
    const Vec shrink = rises ? exp2<5>(before - now) : splat(1.0f);
    sum[v] = load(sum_so_far + v * kLanes) * shrink;
    store(max_so_far + v * kLanes, reference[v]);
    store(factor + v * kLanes, shrink);
  }
  for (int i = 0; i < kVecs * kLanes; ++i) moved |= factor[i] != 1.0f;

  float* to = scores + tile.begin / Units::kDepth * C::kWidth;
  for (int k = tile.begin; k < tile.end; k += Units::kDepth) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      Vec keys[Units::kDepth];
#pragma GCC unroll 2
      for (int i = 0; i < Units::kDepth; ++i) {
        const Vec score = load(scores + (k + i) * C::kWidth + v * kLanes);
        keys[i] = exp2<Units::kExpDegree>(score * log2_scale - reference[v]);
        sum[v] += keys[i];
      }
      Units::store_units(to + v * kLanes, keys);
    }
    to += C::kWidth;
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) store(sum_so_far + v * kLanes, sum[v]);
  return moved;
}

}  // namespace
}  // namespace pop::cpu::POP_ISA
