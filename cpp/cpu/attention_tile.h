// The tile path of attention.cpp: scratch layout, packing, products and softmax of one task.
#pragma once

#include "attention_math.h"
#include "backend.h"
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
  // A block is kWidth (query row, head) pairs, one a lane.
  static constexpr int kWidth = kVecs * kLanes;
  // Keys of a tile: its scores (12 KiB) stay in the L1 cache from product to softmax to product.
  static constexpr int kKeys = 64;
  // Lanes of a task, a multiple of all kWidths: packing K and V once a task costs little from four
  // blocks on, and a task's Q and O (72 KiB with head_dim 64) leave the L2 cache room.
  static constexpr int kTaskLanes = 384;
  // Scores grow by up to 2^kSlack beyond the maximum that probabilities refer to before the sums
  // so far are rescaled. Far below what a float32 holds.
  static constexpr float kSlack = 8.0f;
};

constexpr float kLowest = -3.0e38f;
constexpr int64_t kMaxHeadDim = 256;

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Where a task keeps its operands. A unit is PairUnits' or FloatUnits' 32 bits,
// whatever they hold; D units are head_dim / kDepth.
struct TileScratch {
  float* q;          // [blocks, D units, kWidth]
  float* o;          // [blocks, head_dim, kWidth] unnormalised output
  float* max;        // [blocks, kWidth] what probabilities refer to, in powers of two
  float* sum;        // [blocks, kWidth] of probabilities
  int32_t* position; // [blocks, kWidth]
  float* k;          // [kKeys, D units]
  float* v;          // [kKeys / kDepth, head_dim]
  float* scores;     // [kKeys, kWidth], overwritten by units of probabilities [kKeys / kDepth, kWidth]
  size_t bytes;

  TileScratch(void* base, int64_t lanes, int64_t head_dim, int depth) {
    using C = TileConfig;
    const int64_t width = round_up(lanes, C::kWidth);
    auto* at = static_cast<float*>(base);
    int64_t used = 0;
    const auto take = [&](int64_t count) {
      const int64_t offset = used;
      used += round_up(count, 16);  // 64 bytes
      return base == nullptr ? nullptr : at + offset;
    };
    q = take(width * head_dim / depth);
    o = take(width * head_dim);
    max = take(width);
    sum = take(width);
    position = reinterpret_cast<int32_t*>(take(width));
    k = take(C::kKeys * head_dim / depth);
    v = take(C::kKeys / depth * head_dim);
    scores = take(C::kKeys * C::kWidth);
    bytes = static_cast<size_t>(used) * sizeof(float);
  }
};

// ---- Products ------------------------------------------------------------------------------

// c[r, lane] (+)= sum over u of a(r, u) * b[u, lane] for kRows rows. Units of `a` lie along its
// rows (K: a_stride from row to row) or across them (V: a_stride from unit to unit).
template <class Units, int kVecs, bool kAlongRows, bool kAdd>
POP_INLINE void multiply_rows(int64_t units, const float* a, int64_t a_stride, const float* b, float* c) {
  using C = TileConfig;
  Vec sums[C::kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < C::kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sums[r][v] = kAdd ? load(c + r * C::kWidth + v * kLanes) : Vec{};
  }
  for (int64_t u = 0; u < units; ++u) {
    Vec lanes[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) lanes[v] = load(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < C::kRows; ++r) {
      const Vec unit = Units::broadcast(kAlongRows ? a + r * a_stride : a + r);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[r][v] = Units::multiply_add(sums[r][v], unit, lanes[v]);
    }
    a += kAlongRows ? 1 : a_stride;
    b += C::kWidth;
  }
#pragma GCC unroll 8
  for (int r = 0; r < C::kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(c + r * C::kWidth + v * kLanes, sums[r][v]);
  }
}

// ---- Softmax -------------------------------------------------------------------------------

// What a tile is to a block of lanes.
struct TileView {
  int64_t first_key;   // position of the tile's key 0
  int begin, end;      // keys that any lane sees, rounded to multiples of 8
  bool edge;           // some of them are hidden from some lane
  int64_t window;
};

// Turns scores into units of probabilities, and keeps maxima and sums. Returns whether any maximum
// moved; o must then be multiplied by `factor`.
template <class Units, int kVecs>
POP_INLINE bool softmax(const TileView& tile, float log2_scale, const int32_t* position, float* scores, float* max_so_far,
                        float* sum_so_far, float* factor) {
  using C = TileConfig;
  Vec top[kVecs];
  for (int v = 0; v < kVecs; ++v) top[v] = splat(-__builtin_inff());
  if (tile.edge) {
    for (int v = 0; v < kVecs; ++v) {
      VecI32 last;
      __builtin_memcpy(&last, position + v * kLanes, sizeof(last));
      const VecI32 first = tile.window > 0 ? last - static_cast<int32_t>(tile.window) : last - last - 1;
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
    const Vec scale = rises ? exp2<5>(before - now) : splat(1.0f);
    sum[v] = load(sum_so_far + v * kLanes) * scale;
    store(max_so_far + v * kLanes, reference[v]);
    store(factor + v * kLanes, scale);
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

// One tile of keys for one block of kVecs vectors of lanes.
template <class Units, int kVecs>
void attend(const TileView& tile, float log2_scale, int64_t head_dim, const TileScratch& s, int64_t block) {
  using C = TileConfig;
  const int64_t units = head_dim / Units::kDepth;
  const float* q = s.q + block * units * C::kWidth;
  float* o = s.o + block * head_dim * C::kWidth;
  for (int k = tile.begin; k < tile.end; k += C::kRows) {
    multiply_rows<Units, kVecs, true, false>(units, s.k + k * units, units, q, s.scores + k * C::kWidth);
  }
  float factor[C::kWidth];
  if (softmax<Units, kVecs>(tile, log2_scale, s.position + block * C::kWidth, s.scores, s.max + block * C::kWidth,
                            s.sum + block * C::kWidth, factor)) {
    for (int64_t d = 0; d < head_dim; ++d) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        float* at = o + d * C::kWidth + v * kLanes;
        store(at, load(at) * load(factor + v * kLanes));
      }
    }
  }
  const int64_t first = tile.begin / Units::kDepth;
  const int64_t count = (tile.end - tile.begin) / Units::kDepth;
  for (int64_t d = 0; d < head_dim; d += C::kRows) {
    multiply_rows<Units, kVecs, false, true>(count, s.v + first * head_dim + d, head_dim,
                                             s.scores + first * C::kWidth, o + d * C::kWidth);
  }
}

// ---- Task ----------------------------------------------------------------------------------

template <class T, class Units>
class TileTask {
 public:
  TileTask(const AttentionParams& params, const AttentionTask& task, void* scratch)
      : p_(params),
        segment_(params.segments[task.segment]),
        task_(task),
        group_(params.heads / params.kv_heads),
        lanes_(task.rows * group_),
        width_(round_up(lanes_, C::kWidth)),
        units_(params.head_dim / Units::kDepth),
        first_position_(segment_.first_position + task.row),
        s_(scratch, lanes_, params.head_dim, Units::kDepth) {}

  void run() {
    load_queries();
    // Keys are cut into tiles at multiples of kKeys, wherever the task begins: a row meets the same
    // tiles in any task.
    const int64_t keys = first_position_ + task_.rows;
    const int64_t lowest = first_visible(first_position_);
    for (int64_t key = lowest / C::kKeys * C::kKeys; key < keys; key += C::kKeys) {
      load_keys(key, key > lowest ? key : lowest, key + C::kKeys < keys ? key + C::kKeys : keys);
      for (int64_t lane = 0; lane < lanes_; lane += C::kWidth) {
        // The next tile comes to the L2 cache a part at a time, while the products keep busy.
        const int64_t next = key + C::kKeys;
        prefetch_keys(next + lane * C::kKeys / width_, next + (lane + C::kWidth) * C::kKeys / width_, keys);
        attend_block(key, lane);
      }
    }
    store_output();
  }

 private:
  using C = TileConfig;

  int64_t position(int64_t lane) const { return first_position_ + lane / group_; }
  int64_t first_visible(int64_t position) const {
    return p_.window > 0 && position >= p_.window ? position - p_.window + 1 : 0;
  }

  // Element offset of channel 0 of the lane's head.
  int64_t row_offset(int64_t lane, int64_t stride) const {
    const int64_t row = segment_.first_row - p_.first_row + task_.row + lane / group_;
    return row * stride + (task_.kv_head * group_ + lane % group_) * p_.head_dim;
  }

  void load_queries() {
    __builtin_memset(s_.o, 0, static_cast<size_t>(width_ * p_.head_dim) * sizeof(float));
    for (int64_t lane = 0; lane < width_; ++lane) {
      s_.max[lane] = kLowest;
      s_.sum[lane] = 0;
      s_.position[lane] = static_cast<int32_t>(position(real_lane(lane)));
    }
    // A negative scale moves into Q's signs, so that the largest score has the largest product.
    const VecU32 flip = VecU32{} + (p_.scale < 0 ? (Units::kDepth == 1 ? 0x80000000u : 0x80008000u) : 0u);
    for (int64_t lane = 0; lane < width_; lane += kLanes) {
      const T* from[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        from[i] = static_cast<const T*>(p_.q) + row_offset(real_lane(lane + i), p_.q_stride);
      }
      float* to = s_.q + lane / C::kWidth * units_ * C::kWidth + lane % C::kWidth;
      for (int64_t u = 0; u < units_; u += kLanes) {
        Vec tile[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) tile[i] = (Vec)((VecU32)load_units(from[i], u) ^ flip);
        transpose(tile);
        for (int i = 0; i < kLanes && u + i < units_; ++i) store(to + (u + i) * C::kWidth, tile[i]);
      }
    }
  }

  // Lanes beyond the last one compute the last one again; nobody reads them.
  int64_t real_lane(int64_t lane) const { return lane < lanes_ ? lane : lanes_ - 1; }

  // Units [unit, unit + kLanes) of a row, as far as it goes.
  Vec load_units(const T* row, int64_t unit) const {
    if constexpr (Units::kDepth == 1) {
      return load_upto(row + unit, units_ - unit);
    } else {
      return load_upto(reinterpret_cast<const float*>(row) + unit, units_ - unit);
    }
  }

  // head_dim elements as units along the row.
  void load_row(float* to, const T* row) const {
    for (int64_t u = 0; u < units_; u += kLanes) store_upto(to + u, load_units(row, u), units_ - u);
  }

  const T* cache_row(const void* cache, const CacheStrides& strides, int64_t key) const {
    return static_cast<const T*>(cache) + cache_offset(strides, p_.address, segment_.sequence, task_.kv_head, key);
  }

  // K and V of keys [begin, end), which lie in the tile that starts at position `tile`; zeros for
  // the rest of the tile, which is never read from the cache.
  void load_keys(int64_t tile, int64_t begin, int64_t end) {
    static const T zeros[kMaxHeadDim] = {};
    const auto row = [&](const void* cache, const CacheStrides& strides, int64_t key) {
      return key < begin || key >= end ? zeros : cache_row(cache, strides, key);
    };
    for (int64_t i = 0; i < C::kKeys; ++i) {
      load_row(s_.k + i * units_, row(p_.cache.key, p_.cache.key_strides, tile + i));
    }
    for (int64_t i = 0; i < C::kKeys; i += Units::kDepth) {
      float* to = s_.v + i / Units::kDepth * p_.head_dim;
      const T* first = row(p_.cache.value, p_.cache.value_strides, tile + i);
      if constexpr (Units::kDepth == 1) {
        load_row(to, first);
      } else {
        const T* second = row(p_.cache.value, p_.cache.value_strides, tile + i + 1);
        for (int64_t d = 0; d < p_.head_dim; d += kLanes) {
          const int64_t left = p_.head_dim - d;
          const VecU32 low = (VecU32)load_upto(first + d, left) >> 16;
          store_upto(to + d, (Vec)(low | (VecU32)load_upto(second + d, left)), left);
        }
      }
    }
  }

  // Inlined by force: g++ takes a function of prefetches for one without effect and drops its calls.
  POP_INLINE void prefetch_keys(int64_t begin, int64_t end, int64_t keys) const {
    for (int64_t key = begin; key < end && key < keys; ++key) {
      const T* k = cache_row(p_.cache.key, p_.cache.key_strides, key);
      const T* v = cache_row(p_.cache.value, p_.cache.value_strides, key);
      for (int64_t d = 0; d < p_.head_dim; d += 64 / static_cast<int64_t>(sizeof(T))) {
        __builtin_prefetch(k + d, 0, 2);
        __builtin_prefetch(v + d, 0, 2);
      }
    }
  }

  void attend_block(int64_t tile_key, int64_t lane) {
    const int64_t last_lane = (lane + C::kWidth < lanes_ ? lane + C::kWidth : lanes_) - 1;
    const int64_t low = first_visible(position(lane)) - tile_key;
    const int64_t high = position(last_lane) + 1 - tile_key;
    TileView tile;
    tile.first_key = tile_key;
    tile.window = p_.window;
    tile.begin = low > 0 ? static_cast<int>(low < C::kKeys ? low / 8 * 8 : C::kKeys) : 0;
    tile.end = static_cast<int>(high < C::kKeys ? round_up(high, 8) : C::kKeys);
    if (tile.begin >= tile.end) return;
    tile.edge = tile_key + tile.end - 1 > position(lane) || tile_key + tile.begin < first_visible(position(last_lane));
    const int64_t block = lane / C::kWidth;
    const auto vecs = (last_lane - lane) / kLanes + 1;
    if (vecs == 1) {
      attend<Units, 1>(tile, log2_scale(), p_.head_dim, s_, block);
    } else if (vecs == 2) {
      attend<Units, 2>(tile, log2_scale(), p_.head_dim, s_, block);
    } else {
      attend<Units, C::kVecs>(tile, log2_scale(), p_.head_dim, s_, block);
    }
  }

  // Not zero, which a hidden score of minus infinity could not be multiplied by.
  float log2_scale() const {
    const float scale = __builtin_fabsf(p_.scale) * 1.44269504f;
    return scale < 1e-37f ? 1e-37f : scale;
  }

  void store_output() {
    for (int64_t lane = 0; lane < lanes_; lane += kLanes) {
      const float* from = s_.o + lane / C::kWidth * p_.head_dim * C::kWidth + lane % C::kWidth;
      const Vec inverse = splat(1.0f) / load(s_.sum + lane);
      for (int64_t d = 0; d < p_.head_dim; d += kLanes) {
        const int64_t left = p_.head_dim - d;
        Vec tile[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) tile[i] = load(from + (i < left ? d + i : d) * C::kWidth) * inverse;
        transpose(tile);
        for (int i = 0; i < kLanes && lane + i < lanes_; ++i) {
          store_upto(static_cast<T*>(p_.out) + row_offset(lane + i, p_.out_stride) + d, tile[i], left);
        }
      }
    }
  }

  const AttentionParams& p_;
  const Segment& segment_;
  const AttentionTask& task_;
  const int64_t group_, lanes_, width_, units_, first_position_;
  TileScratch s_;
};

}  // namespace
}  // namespace pop::cpu::POP_ISA
