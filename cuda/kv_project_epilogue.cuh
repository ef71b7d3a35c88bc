// Writes the accumulators of a tile to the KV cache, without leaving registers: row scale, bias, norm per head, RoPE,
// and 16-byte stores. A quad of threads holds a row (kv_project_tile.h): thread q of the quad has channels 8 g + 2 q
// and 8 g + 2 q + 1 of every group g of 8 channels. Both channels of a RoPE pair are then in one thread, and data moves
// only within the quad.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/kv_project_tile.h"

namespace pop::cuda {

inline constexpr int kRunLayers = 32;  // layers per launch; keeps the kernel parameters under 4 KiB

struct KvProjectLayer {
  const BFloat16* k_bias;  // [kv_dim] or null
  const BFloat16* v_bias;  // [kv_dim] or null
  const BFloat16* k_norm;  // [head_dim] or null
  LayerCache cache;
};

// The parameters of a launch, apart from the tensor maps of x and W.
struct KvProjectRun {
  kv_tile::TileOrder order;
  int whole;  // units whose tiles are computed whole (kv_tile::whole_units)
  int rows;
  int hidden;
  int kv_heads;
  int heads;  // layers * 2 * kv_heads
  float eps;
  const float* rstd;  // [rows], or null to compute it from x
  int64_t first_row;
  Batch batch;
  KvProjectLayer layers[kRunLayers];
};

// One of the two rows of a thread.
struct KvRow {
  int64_t batch_row, sequence, slot;
  bool inside;  // false: it repeats the last row, and is not stored
};

__device__ __forceinline__ KvRow kv_row(const KvProjectRun& run, int row) {
  const bool inside = row < run.rows;
  const int64_t batch_row = run.first_row + (inside ? row : run.rows - 1);
  const int64_t sequence = run.batch.row_sequence[batch_row];
  const int64_t slot = cache_slot(run.batch.address, sequence, run.batch.row_position[batch_row]);
  return {batch_row, sequence, slot, inside};
}

// ---- One row of one head, spread over a quad -----------------------------------------------

// This thread's part, in place in the accumulators. All indices are constants after loop unrolling.
template <int kHeadDim>
struct HeadPart {
  static constexpr int kGroups = kHeadDim / 8;

  float (&sums)[kv_tile::kAccumulators];
  int first_group;  // of the tile's columns
  int half;         // which of the thread's two rows

  // Channel 8 * group + 2 * q + odd.
  __device__ __forceinline__ float& at(int group, int odd) const {
    return sums[kv_tile::accumulator_index(first_group + group, half, odd)];
  }
};

// head = head * scale + bias; `bias` is [kHeadDim], offset by 2 q, or null.
template <int kHeadDim>
__device__ __forceinline__ void scale_and_add(const HeadPart<kHeadDim>& head, float scale, const BFloat16* bias) {
#pragma unroll
  for (int g = 0; g < head.kGroups; ++g) {
    float pair[2] = {};
    if (bias != nullptr) load(bias + 8 * g, pair);
    head.at(g, 0) = head.at(g, 0) * scale + pair[0];
    head.at(g, 1) = head.at(g, 1) * scale + pair[1];
  }
}

// RMS-normalises the head and multiplies it by `weight`, [kHeadDim], offset by 2 q.
template <int kHeadDim>
__device__ __forceinline__ void normalise(const HeadPart<kHeadDim>& head, const BFloat16* weight, float eps) {
  float squares = 0.0f;
#pragma unroll
  for (int g = 0; g < head.kGroups; ++g) squares += head.at(g, 0) * head.at(g, 0) + head.at(g, 1) * head.at(g, 1);
  const float rstd = rms_scale(warp_sum<4>(squares), kHeadDim, eps);
#pragma unroll
  for (int g = 0; g < head.kGroups; ++g) {
    float pair[2];
    load(weight + 8 * g, pair);
    head.at(g, 0) *= rstd * pair[0];
    head.at(g, 1) *= rstd * pair[1];
  }
}

// Applies RoPE to the pairs (channel, channel + kHeadDim / 2) of one group of 8 of the first half; `cos` and `sin` are
// [kHeadDim / 2], offset by 2 q.
template <int kHeadDim>
__device__ __forceinline__ void rotate(const HeadPart<kHeadDim>& head, int group, const float* cos, const float* sin) {
  float c[2], s[2];
  load(cos + 8 * group, c);
  load(sin + 8 * group, s);
#pragma unroll
  for (int i = 0; i < 2; ++i) rope_rotate(head.at(group, i), head.at(group + head.kGroups / 2, i), c[i], s[i]);
}

// Transposes the 4 x 4 words of a quad: thread q gets word q of each thread, in the order of the threads. First within
// 2 x 2 blocks, then the blocks.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4], int q) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = (q & distance) != 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int low = distance == 1 ? 2 * i : i;
      const uint32_t sent = upper ? words[low] : words[low + distance];
      const uint32_t received = __shfl_xor_sync(kAllLanes, sent, distance);
      words[low] = upper ? received : words[low];
      words[low + distance] = upper ? words[low + distance] : received;
    }
  }
}

// Stores four groups of 8 channels; `to` is channel 0 of the head. Each thread of a quad stores one group, together 64
// consecutive bytes. All lanes of the warp take part.
template <int kHeadDim>
__device__ __forceinline__ void store_groups(const HeadPart<kHeadDim>& head, int group, int q, bool inside,
                                             BFloat16* to) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = pair_bits<BFloat16>(head.at(group + i, 0), head.at(group + i, 1));
  transpose_quad(words, q);
  if (inside) store_pack(to + 8 * (group + q), {{words[0], words[1], words[2], words[3]}});
}

// ---- A tile --------------------------------------------------------------------------------

// Everything of a head but its store, for one row: in place, in the accumulators.
template <int kHeadDim>
__device__ __forceinline__ void transform_head(const KvProjectRun& run, const kv_tile::StackedHead& at,
                                               const HeadPart<kHeadDim>& head, const KvRow& row, float scale) {
  const int q = static_cast<int>(threadIdx.x) % 4;
  const KvProjectLayer& layer = run.layers[at.layer];
  const BFloat16* bias = at.is_value ? layer.v_bias : layer.k_bias;
  scale_and_add(head, scale, bias == nullptr ? nullptr : bias + at.head * kHeadDim + 2 * q);
  if (at.is_value) return;
  if (layer.k_norm != nullptr) normalise(head, layer.k_norm + 2 * q, run.eps);
  const int64_t angles = row.batch_row * (kHeadDim / 2) + 2 * q;
#pragma unroll
  for (int g = 0; g < head.kGroups / 2; ++g) rotate(head, g, run.batch.cos + angles, run.batch.sin + angles);
}

template <int kHeadDim>
__device__ __forceinline__ void store_head(const KvProjectRun& run, const kv_tile::StackedHead& at,
                                           const HeadPart<kHeadDim>& head, const KvRow& row) {
  const int q = static_cast<int>(threadIdx.x) % 4;
  const LayerCache& cache = run.layers[at.layer].cache;
  const CacheStrides& strides = at.is_value ? cache.value_strides : cache.key_strides;
  BFloat16* to = static_cast<BFloat16*>(at.is_value ? cache.value : cache.key) +
                 slot_offset(strides, row.sequence, at.head, row.slot);
#pragma unroll
  for (int g = 0; g < head.kGroups; g += 4) store_groups(head, g, q, row.inside, to);
}

// Runs `call(heads[h], head part)` for each head of a tile's columns and each of the thread's two rows.
template <int kHeadDim, class Call>
__device__ __forceinline__ void for_heads(const KvProjectRun& run, int column_tile,
                                          float (&sums)[kv_tile::kAccumulators], const Call& call) {
  constexpr int kHeads = kv_tile::kColumns / kHeadDim;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const int index = column_tile * kHeads + h;
    if (index >= run.heads) return;  // W ends within the tile
    const kv_tile::StackedHead at = kv_tile::stacked_head(index, run.kv_heads);
#pragma unroll
    for (int half = 0; half < 2; ++half) call(at, HeadPart<kHeadDim>{sums, h * kHeadDim / 8, half}, half);
  }
}

// Writes every head of a tile's columns, for the two rows of the thread and their rstd. Overwrites the accumulators.
// All loads come before the first store, which the compiler would not move them across: it has to take the cache for
// memory that a later load may read.
template <int kHeadDim>
__device__ __forceinline__ void write_tile(const KvProjectRun& run, int column_tile,
                                           float (&sums)[kv_tile::kAccumulators], const KvRow (&rows)[2],
                                           const float (&scale)[2]) {
  using Head = HeadPart<kHeadDim>;
  using kv_tile::StackedHead;
  for_heads<kHeadDim>(run, column_tile, sums, [&](const StackedHead& at, const Head& head, int half) {
    transform_head(run, at, head, rows[half], scale[half]);
  });
  for_heads<kHeadDim>(run, column_tile, sums, [&](const StackedHead& at, const Head& head, int half) {
    store_head(run, at, head, rows[half]);
  });
}

}  // namespace pop::cuda
