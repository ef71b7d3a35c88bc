// The stream path of attention.cpp: a few lanes over a long cache, bound by the bytes of K and V, which are read once
// and without packing.
#pragma once

#include "attention_task.h"

namespace pop::cpu::POP_ISA {
namespace {

#if defined(__AVX512BF16__)

struct StreamConfig {
  // Up to this many lanes, reading the cache takes longer than one product per lane; with more the tile path is faster.
  static constexpr int64_t kMaxLanes = 8;
  // kStep lanes share a reduction of sums; a vector has kChannels channels.
  static constexpr int kStep = 4, kChannels = 32;
};

// Adds up the lanes of each of four vectors.
POP_INLINE void store_sums(float* to, Vec (&rows)[4]) {
  exchange(rows[0], rows[1], 1);
  exchange(rows[2], rows[3], 1);
  Vec even = rows[0] + rows[1];
  Vec odd = rows[2] + rows[3];
  exchange(even, odd, 2);
  const Vec sums = even + odd;  // of rows 0 1 2 3 0 1 2 3 ...
  const auto half = __builtin_shufflevector(sums, sums, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(sums, sums, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto quarter =
      __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
  __builtin_memcpy(to, &quarter, sizeof(quarter));
}

class StreamTask {
 public:
  static bool suits(const AttentionParams& params, const Segment& segment) {
    return params.dtype == DType::bf16 && params.head_dim % StreamConfig::kChannels == 0 &&
           segment.rows * (params.heads / params.kv_heads) <= StreamConfig::kMaxLanes;
  }

  StreamTask(const AttentionParams& params, const AttentionTask& task)
      : rows_(params, task), head_dim_(params.head_dim), negative_(params.scale < 0) {}

  void run() {
    load_queries();
    for (int64_t key = rows_.lowest_key() / T::kKeys * T::kKeys; key < rows_.keys(); key += T::kKeys) {
      const TileView tile = rows_.view(key, 0, rows_.lanes() - 1);
      score(tile);
      if (softmax<PairUnits, 1>(tile, rows_.score_scale(), position_, scores_, max_, sum_, factor_)) rescale();
      add_values(tile);
    }
    store_output();
  }

 private:
  using T = TileConfig;
  using S = StreamConfig;

  void load_queries() {
    const VecU32 flip = VecU32{} + (negative_ ? 0x80008000u : 0u);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t real = lane < rows_.lanes() ? lane : rows_.lanes() - 1;
      rows_.start_softmax(real, max_[lane], sum_[lane]);
      position_[lane] = static_cast<int32_t>(rows_.position(real));
      if (lane >= S::kMaxLanes) continue;
      const auto* from = reinterpret_cast<const float*>(rows_.q(real));
      for (int64_t u = 0; u < head_dim_ / 2; u += kLanes) {
        store(q_ + lane * head_dim_ / 2 + u, (Vec)((VecU32)load(from + u) ^ flip));
      }
    }
    __builtin_memset(o_, 0, sizeof(o_));
    // Lanes from kMaxLanes to kLanes take part in the arithmetic, but are never read.
    __builtin_memset(scores_, 0, sizeof(scores_));
  }

  void score(const TileView& tile) {
    for (int k = tile.begin; k < tile.end; ++k) {
      rows_.prefetch(tile.first_key + T::kKeys + k);
      const auto* key = reinterpret_cast<const float*>(rows_.key_row(tile.first_key + k));
      for (int64_t lane = 0; lane < rows_.lanes(); lane += S::kStep) {
        const float* q = q_ + lane * head_dim_ / 2;
        Vec sums[S::kStep] = {};
        for (int64_t u = 0; u < head_dim_ / 2; u += kLanes) {
          const Vec units = load(key + u);
#pragma GCC unroll 4
          for (int i = 0; i < S::kStep; ++i) {
            sums[i] = PairUnits::multiply_add(sums[i], units, load(q + i * head_dim_ / 2 + u));
          }
        }
        store_sums(scores_ + k * T::kWidth + lane, sums);
      }
    }
  }

  void rescale() {
    for (int64_t lane = 0; lane < rows_.lanes(); ++lane) {
      for (int64_t d = 0; d < head_dim_; d += kLanes) {
        store(o_ + lane * head_dim_ + d, load(o_ + lane * head_dim_ + d) * factor_[lane]);
      }
    }
  }

  void add_values(const TileView& tile) {
    const BFloat16* values[T::kKeys];
    for (int k = tile.begin; k < tile.end; ++k) values[k] = rows_.value_row(tile.first_key + k);
    for (int64_t lane = 0; lane < rows_.lanes(); lane += S::kStep) {
      for (int64_t d = 0; d < head_dim_; d += S::kChannels) {
        float* o = o_ + lane * head_dim_ + d;
        Vec low[S::kStep], high[S::kStep];
#pragma GCC unroll 4
        for (int i = 0; i < S::kStep; ++i) {
          low[i] = load(o + i * head_dim_);
          high[i] = load(o + i * head_dim_ + kLanes);
        }
        for (int k = tile.begin; k < tile.end; k += 2) {
          const Vec first = load(reinterpret_cast<const float*>(values[k] + d));
          const Vec second = load(reinterpret_cast<const float*>(values[k + 1] + d));
          const Vec low_units = PairUnits::interleave_low(first, second);
          const Vec high_units = PairUnits::interleave_high(first, second);
#pragma GCC unroll 4
          for (int i = 0; i < S::kStep; ++i) {
            const Vec probability = PairUnits::broadcast(scores_ + k / 2 * T::kWidth + lane + i);
            low[i] = PairUnits::multiply_add(low[i], probability, low_units);
            high[i] = PairUnits::multiply_add(high[i], probability, high_units);
          }
        }
#pragma GCC unroll 4
        for (int i = 0; i < S::kStep; ++i) {
          store(o + i * head_dim_, low[i]);
          store(o + i * head_dim_ + kLanes, high[i]);
        }
      }
    }
  }

  void store_output() {
    for (int64_t lane = 0; lane < rows_.lanes(); ++lane) {
      const float inverse = 1.0f / sum_[lane];
      for (int64_t d = 0; d < head_dim_; d += kLanes) {
        store(rows_.out(lane) + d, load(o_ + lane * head_dim_ + d) * inverse);
      }
    }
  }

  const TaskGeometry<BFloat16> rows_;
  const int64_t head_dim_;
  const bool negative_;
  float q_[S::kMaxLanes * kMaxHeadDim / 2];  // [lanes, head_dim / 2] pairs
  float o_[S::kMaxLanes * kMaxHeadDim];      // [lanes, head_dim] unnormalised output
  float scores_[T::kKeys * T::kWidth];       // [kKeys, kWidth], of which kLanes lanes are used
  float max_[kLanes], sum_[kLanes], factor_[kLanes];
  int32_t position_[kLanes];
};

#endif

}  // namespace
}  // namespace pop::cpu::POP_ISA
