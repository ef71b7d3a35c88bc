// Prepares q, k and v for attention, one head at a time: row scale, bias, RMSNorm per head, RoPE (or RoPE, RMSNorm). q
// is updated in place, k and v go to the cache. Values are fp32 until the single rounding at the end.
#include "cpu/row_kernels.h"
#include "cpu/vec.h"

namespace pop::cpu::POP_ISA {
namespace {

// One head of a projection's output. Its element i is (raw[i] * scale + bias[i]) * rstd * (norm[i] + offset).
template <class T>
struct Head {
  const T* raw;
  const T* bias;  // or null
  const T* norm;  // or null
  float offset;
  float scale;
  float rstd;

  POP_INLINE Vec projected(int64_t i, int64_t count) const {
    Vec value = load_upto(raw + i, count) * splat(scale);
    if (bias != nullptr) value += load_upto(bias + i, count);
    return value;
  }

  POP_INLINE Vec value(int64_t i, int64_t count) const {
    Vec value = projected(i, count);
    if (norm != nullptr) value *= splat(rstd) * (load_upto(norm + i, count) + offset);
    return value;
  }

  POP_INLINE float rms(int64_t head_dim, float eps) const {
    Vec sum = {};
    for (int64_t i = 0; i < head_dim; i += kLanes) {
      const Vec value = projected(i, head_dim - i);
      sum += value * value;
    }
    return rms_scale(sum_lanes(sum), head_dim, eps);
  }
};

// The angles of a row: [half] each.
struct Angles {
  const float *cos, *sin;
  int64_t half;

  POP_INLINE void rotate(Vec& first, Vec& second, int64_t i) const {
    rope_rotate(first, second, load_upto(cos + i, half - i), load_upto(sin + i, half - i));
  }
};

POP_INLINE Angles angles_of(const Batch& batch, int64_t table, int64_t row, int64_t half) {
  return {(table == 0 ? batch.cos : batch.cos_local) + row * half,
          (table == 0 ? batch.sin : batch.sin_local) + row * half, half};
}

// Lane l of the result is lane first + step * l of (low, high).
POP_INLINE Vec pick(Vec low, Vec high, int first, int step) {
  VecI32 from;
  for (int lane = 0; lane < kLanes; ++lane) from[lane] = first + step * lane;
  return __builtin_shuffle(low, high, from);
}

// Lane 2l of the result is lane first + l of `even`, lane 2l + 1 that of `odd`.
POP_INLINE Vec weave(Vec even, Vec odd, int first) {
  VecI32 from;
  for (int lane = 0; lane < kLanes; ++lane) from[lane] = first + lane / 2 + lane % 2 * kLanes;
  return __builtin_shuffle(even, odd, from);
}

// Calls visit(i, values, count) with channels [i, i + min(count, kLanes)) of the head, all of them in turn, after RoPE
// of the first 2 * half. Both channels of a pair are read before either is visited. Lanes from `count` on are zero.
template <bool interleaved, class T, class Visit>
POP_INLINE void visit_rotated(const Head<T>& head, int64_t head_dim, const Angles& angles, const Visit& visit) {
  const int64_t half = angles.half;
  for (int64_t i = 0; i < half; i += kLanes) {
    if constexpr (interleaved) {
      const int64_t low = 2 * i, high = low + kLanes;  // two vectors hold kLanes pairs
      const Vec a = head.value(low, 2 * half - low), b = high < 2 * half ? head.value(high, 2 * half - high) : Vec{};
      Vec even = pick(a, b, 0, 2), odd = pick(a, b, 1, 2);
      angles.rotate(even, odd, i);
      visit(low, weave(even, odd, 0), 2 * half - low);
      if (high < 2 * half) visit(high, weave(even, odd, kLanes / 2), 2 * half - high);
    } else {
      Vec first = head.value(i, half - i), second = head.value(i + half, half - i);
      angles.rotate(first, second, i);
      visit(i, first, half - i);
      visit(i + half, second, half - i);
    }
  }
  for (int64_t i = 2 * half; i < head_dim; i += kLanes) visit(i, head.value(i, head_dim - i), head_dim - i);
}

// Writes the head to `out`, which may be `raw`.
template <bool interleaved, class T>
POP_INLINE void norm_and_rotate(Head<T> head, const RopeCacheWriteParams& p, const Angles& angles, T* out) {
  const T* norm_after = p.rope.norm_after ? head.norm : nullptr;
  if (norm_after == nullptr) {
    if (head.norm != nullptr) head.rstd = head.rms(p.head_dim, p.norm_eps);
    visit_rotated<interleaved>(head, p.head_dim, angles,
                               [&](int64_t i, Vec value, int64_t count) { store_upto(out + i, value, count); });
    return;
  }
  head.norm = nullptr;
  Vec squares = {};  // of the turned channels: cos and sin may carry a factor (YaRN)
  visit_rotated<interleaved>(head, p.head_dim, angles, [&](int64_t, Vec value, int64_t) { squares += value * value; });
  const Vec rstd = splat(rms_scale(sum_lanes(squares), p.head_dim, p.norm_eps));
  visit_rotated<interleaved>(head, p.head_dim, angles, [&](int64_t i, Vec value, int64_t count) {
    store_upto(out + i, value * rstd * (load_upto(norm_after + i, count) + head.offset), count);
  });
}

template <class T>
POP_INLINE const T* at_head(const void* base, int64_t head, int64_t head_dim) {
  return base == nullptr ? nullptr : static_cast<const T*>(base) + head * head_dim;
}

template <bool interleaved, class T>
void rope_cache_write_rows(const RopeCacheWriteParams& p, int64_t begin, int64_t end) {
  const int64_t half = p.rotary_dim / 2;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t batch_row = p.first_row + row;
    if (p.q != nullptr) {
      T* q = static_cast<T*>(p.q) + row * p.q_stride;
      const Angles angles = angles_of(*p.batch, p.q_rope_table, batch_row, half);
      for (int64_t h = 0; h < p.heads; ++h) {
        T* out = q + h * p.head_dim;
        const Head<T> head = {
            out, at_head<T>(p.q_bias, h, p.head_dim), static_cast<const T*>(p.q_norm), p.norm_offset, 1.0f, 1.0f};
        norm_and_rotate<interleaved>(head, p, angles, out);
      }
    }
    const T* k = static_cast<const T*>(p.k) + row * p.kv_stride;
    const T* v = static_cast<const T*>(p.v) + row * p.kv_stride;
    const float scale = p.row_scale == nullptr ? 1.0f : p.row_scale[row];
    const int64_t sequence = p.batch->row_sequence[batch_row];
    const int64_t position = p.batch->row_position[batch_row];
    const Angles angles = angles_of(*p.batch, p.rope_table, batch_row, half);
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      T* key =
          static_cast<T*>(p.cache.key) + cache_offset(p.cache.key_strides, p.batch->address, sequence, h, position);
      T* value =
          static_cast<T*>(p.cache.value) + cache_offset(p.cache.value_strides, p.batch->address, sequence, h, position);
      const Head<T> k_head = {k + h * p.head_dim,
                              at_head<T>(p.k_bias, h, p.head_dim),
                              static_cast<const T*>(p.k_norm),
                              p.norm_offset,
                              scale,
                              1.0f};
      norm_and_rotate<interleaved>(k_head, p, angles, key);
      const Head<T> v_head = {v + h * p.head_dim, at_head<T>(p.v_bias, h, p.head_dim), nullptr, 0.0f, scale, 1.0f};
      for (int64_t i = 0; i < p.head_dim; i += kLanes)
        store_upto(value + i, v_head.value(i, p.head_dim - i), p.head_dim - i);
    }
  }
}

}  // namespace

void rope_cache_write(const RopeCacheWriteParams& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.rope.interleaved ? rope_cache_write_rows<true, T>(p, begin, end) : rope_cache_write_rows<false, T>(p, begin, end);
  });
}

}  // namespace pop::cpu::POP_ISA
