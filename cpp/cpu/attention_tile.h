// The tile path of attention.cpp: scratch, products and packing of one task.
#pragma once

#include <type_traits>

#include "attention_amx.h"
#include "attention_task.h"

namespace pop::cpu::POP_ISA {
namespace {

// The scratch memory of a task. A unit is the 32 bits of PairUnits or FloatUnits, with type float in either case; D
// units are head_dim / kDepth.
struct TileScratch {
  float* q;           // [blocks, D units, kWidth]
  float* o;           // [blocks, head_dim, kWidth] unnormalised output
  float* max;         // [blocks, kWidth] maximum that probabilities refer to, in powers of two
  float* sum;         // [blocks, kWidth] of probabilities
  int32_t* position;  // [blocks, kWidth]
  float* k;           // [kKeys, D units]
  float* v;           // [kKeys / kDepth, head_dim]; with AMX [head_dim, kKeys / kDepth]
  float* scores;      // [kKeys, kWidth], overwritten by units of probabilities [kKeys / kDepth, kWidth]
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

// c[r, lane] (+)= sum over u of a(r, u) * b[u, lane] for kRows rows and at least one unit. Units of
// `a` lie along its rows (K: a_stride from row to row) or across them (V: a_stride from unit to unit).
// Not inlined: within a large function, g++ 12 keeps some of the sums in memory.
template <class Units, int kVecs, bool kAlongRows, bool kAdd>
__attribute__((noinline)) void multiply_rows(int64_t units, const float* a, int64_t a_stride, const float* b,
                                             float* c) {
  using C = TileConfig;
  Vec sums[C::kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < C::kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sums[r][v] = kAdd ? load(c + r * C::kWidth + v * kLanes) : Vec{};
  }
  do {
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
  } while (--units > 0);
#pragma GCC unroll 8
  for (int r = 0; r < C::kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(c + r * C::kWidth + v * kLanes, sums[r][v]);
  }
}

// Scores of the keys that the tile's lanes see.
template <class Units, int kVecs>
void multiply_keys(const TileView& tile, int64_t units, const float* k, const float* q, float* scores) {
  using C = TileConfig;
#if defined(POP_AMX)
  if constexpr (Units::kTiles) {
    const int64_t begin = tile.begin / Units::kRows * Units::kRows, end = round_up(tile.end, Units::kRows);
    return multiply_tiles<kVecs, false>(end - begin, units, k + begin * units, units, q, scores + begin * C::kWidth);
  }
#endif
  for (int key = tile.begin; key < tile.end; key += C::kRows) {
    multiply_rows<Units, kVecs, true, false>(units, k + key * units, units, q, scores + key * C::kWidth);
  }
}

// Adds to o [head_dim, kWidth] the values of keys, times their probabilities.
template <class Units, int kVecs>
void add_values(const TileView& tile, int64_t head_dim, const float* v, float* probabilities, float* o) {
  using C = TileConfig;
  int64_t first = tile.begin / Units::kDepth, end = tile.end / Units::kDepth;
#if defined(POP_AMX)
  if constexpr (Units::kTiles) {
    // Probabilities of other keys of a tile's units are zero.
    const auto clear = [&](int64_t begin, int64_t count) {
      __builtin_memset(probabilities + begin * C::kWidth, 0, static_cast<size_t>(count * C::kWidth) * sizeof(float));
    };
    clear(first / Units::kUnits * Units::kUnits, first % Units::kUnits);
    clear(end, round_up(end, Units::kUnits) - end);
    first = first / Units::kUnits * Units::kUnits;
    end = round_up(end, Units::kUnits);
    return multiply_tiles<kVecs, true>(head_dim, end - first, v + first, C::kKeys / Units::kDepth,
                                       probabilities + first * C::kWidth, o);
  }
#endif
  for (int64_t d = 0; d < head_dim; d += C::kRows) {
    multiply_rows<Units, kVecs, false, true>(end - first, v + first * head_dim + d, head_dim,
                                             probabilities + first * C::kWidth, o + d * C::kWidth);
  }
}

// Attention of one block of kVecs vectors of lanes over one tile of keys.
template <class Units, int kVecs>
void attend(const TileView& tile, ScoreScale scale, int64_t head_dim, const TileScratch& s, int64_t block) {
  using C = TileConfig;
  const int64_t units = head_dim / Units::kDepth;
  const float* q = s.q + block * units * C::kWidth;
  float* o = s.o + block * head_dim * C::kWidth;
  multiply_keys<Units, kVecs>(tile, units, s.k, q, s.scores);
  float factor[C::kWidth];
  if (softmax<Units, kVecs>(tile, scale, s.position + block * C::kWidth, s.scores, s.max + block * C::kWidth,
                            s.sum + block * C::kWidth, factor)) {
    for (int64_t d = 0; d < head_dim; ++d) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        float* at = o + d * C::kWidth + v * kLanes;
        store(at, load(at) * load(factor + v * kLanes));
      }
    }
  }
  add_values<Units, kVecs>(tile, head_dim, s.v, s.scores, o);
}

// ---- Task ----------------------------------------------------------------------------------

template <class T, class Units>
class TileTask {
 public:
  TileTask(const AttentionParams& params, const AttentionTask& task, void* scratch)
      : rows_(params, task),
        head_dim_(params.head_dim),
        units_(params.head_dim / Units::kDepth),
        flip_(params.scale < 0 ? (Units::kDepth == 1 ? 0x80000000u : 0x80008000u) : 0u),
        width_(round_up(rows_.lanes(), C::kWidth)),
        s_(scratch, width_, params.head_dim, Units::kDepth) {}

  void run() {
    [[maybe_unused]] const std::conditional_t<Units::kTiles, AmxTiles, NoTiles> tiles{};
    load_queries();
    // Tiles start at multiples of kKeys, whatever the task: a row has the same tiles in any task.
    for (int64_t key = rows_.lowest_key() / C::kKeys * C::kKeys; key < rows_.keys(); key += C::kKeys) {
      load_keys(key);
      for (int64_t lane = 0; lane < width_; lane += C::kWidth) {
        // Prefetches the next tile to the L2 cache in parts, during the products.
        for (int64_t i = lane * C::kKeys / width_; i < (lane + C::kWidth) * C::kKeys / width_; ++i) {
          rows_.prefetch(key + C::kKeys + i);
        }
        attend_block(key, lane);
      }
    }
    store_output();
  }

 private:
  using C = TileConfig;

  // Lanes beyond the last one repeat it; their results are not stored.
  int64_t real_lane(int64_t lane) const { return lane < rows_.lanes() ? lane : rows_.lanes() - 1; }

  void load_queries() {
    __builtin_memset(s_.o, 0, static_cast<size_t>(width_ * head_dim_) * sizeof(float));
    for (int64_t lane = 0; lane < width_; ++lane) {
      rows_.start_softmax(real_lane(lane), s_.max[lane], s_.sum[lane]);
      s_.position[lane] = static_cast<int32_t>(rows_.position(real_lane(lane)));
    }
    const VecU32 flip = VecU32{} + flip_;
    for (int64_t lane = 0; lane < width_; lane += kLanes) {
      const T* from[kLanes];
      for (int i = 0; i < kLanes; ++i) from[i] = rows_.q(real_lane(lane + i));
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

  // Units [unit, unit + kLanes) of a row, up to its end.
  Vec load_units(const T* row, int64_t unit) const {
    if constexpr (Units::kDepth == 1) {
      return load_upto(row + unit, units_ - unit);
    } else {
      return load_upto(reinterpret_cast<const float*>(row) + unit, units_ - unit);
    }
  }

  // Copies head_dim elements as units along the row.
  void load_row(float* to, const T* row) const {
    for (int64_t u = 0; u < units_; u += kLanes) store_upto(to + u, load_units(row, u), units_ - u);
  }

  void load_keys(int64_t first_key) {
    for (int64_t i = 0; i < C::kKeys; ++i) load_row(s_.k + i * units_, rows_.key_row(first_key + i));
    if constexpr (Units::kTiles) {
      load_channels(first_key);
    } else {
      load_values(first_key);
    }
  }

  // Channels [d, d + kLanes), up to head_dim, of the keys of a unit.
  Vec value_units(int64_t key, int64_t d) const {
    const Vec values = load_upto(rows_.value_row(key) + d, head_dim_ - d);
    if constexpr (Units::kDepth == 1) return values;
    return (Vec)((VecU32)values >> 16 | (VecU32)load_upto(rows_.value_row(key + 1) + d, head_dim_ - d));
  }

  void load_values(int64_t first_key) {
    for (int64_t i = 0; i < C::kKeys; i += Units::kDepth) {
      float* to = s_.v + i / Units::kDepth * head_dim_;
      for (int64_t d = 0; d < head_dim_; d += kLanes) {
        store_upto(to + d, value_units(first_key + i, d), head_dim_ - d);
      }
    }
  }

  // The same with channels as rows.
  void load_channels(int64_t first_key) {
    constexpr int64_t kUnits = C::kKeys / Units::kDepth;
    for (int64_t unit = 0; unit < kUnits; unit += kLanes) {
      for (int64_t d = 0; d < head_dim_; d += kLanes) {
        Vec tile[kLanes];
        for (int i = 0; i < kLanes; ++i) tile[i] = value_units(first_key + (unit + i) * Units::kDepth, d);
        transpose(tile);
        for (int i = 0; i < kLanes; ++i) store(s_.v + (d + i) * kUnits + unit, tile[i]);
      }
    }
  }

  void attend_block(int64_t first_key, int64_t lane) {
    const int64_t last = real_lane(lane + C::kWidth - 1);
    const TileView tile = rows_.view(first_key, lane, last);
    if (tile.begin >= tile.end) return;
    const int64_t block = lane / C::kWidth;
    const int64_t vecs = (last - lane) / kLanes + 1;
    if (vecs == 1) {
      attend<Units, 1>(tile, rows_.score_scale(), head_dim_, s_, block);
    } else if (vecs == 2) {
      attend<Units, 2>(tile, rows_.score_scale(), head_dim_, s_, block);
    } else {
      attend<Units, C::kVecs>(tile, rows_.score_scale(), head_dim_, s_, block);
    }
  }

  void store_output() {
    for (int64_t lane = 0; lane < rows_.lanes(); lane += kLanes) {
      const float* from = s_.o + lane / C::kWidth * head_dim_ * C::kWidth + lane % C::kWidth;
      const Vec inverse = splat(1.0f) / load(s_.sum + lane);
      for (int64_t d = 0; d < head_dim_; d += kLanes) {
        const int64_t left = head_dim_ - d;
        Vec tile[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) tile[i] = load(from + (i < left ? d + i : d) * C::kWidth) * inverse;
        transpose(tile);
        for (int i = 0; i < kLanes && lane + i < rows_.lanes(); ++i) store_upto(rows_.out(lane + i) + d, tile[i], left);
      }
    }
  }

  const TaskGeometry<T> rows_;
  const int64_t head_dim_, units_;
  const uint32_t flip_;  // flips the signs of a unit if the scale is negative
  const int64_t width_;
  const TileScratch s_;
};

}  // namespace
}  // namespace pop::cpu::POP_ISA
