// Prepares q, k and v for attention, one head at a time: row scale, bias, RMSNorm per head, RoPE. q is updated in
// place, k and v go to the cache. Values are fp32 until the single rounding at the end.
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

// Writes the head to `out`, with RoPE applied to its first 2 * half channels. `out` may be `raw`: both channels of a
// pair are read before either is written.
template <class T>
POP_INLINE void rotate_head(const Head<T>& head, int64_t head_dim, int64_t half, const float* cos, const float* sin,
                            T* out) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t count = half - i;
    Vec first = head.value(i, count);
    Vec second = head.value(i + half, count);
    rope_rotate(first, second, load_upto(cos + i, count), load_upto(sin + i, count));
    store_upto(out + i, first, count);
    store_upto(out + half + i, second, count);
  }
  for (int64_t i = 2 * half; i < head_dim; i += kLanes) store_upto(out + i, head.value(i, head_dim - i), head_dim - i);
}

template <class T>
POP_INLINE void norm_and_rotate(Head<T> head, const RopeCacheWriteParams& p, int64_t batch_row, T* out) {
  const int64_t half = p.rotary_dim / 2;
  const float* cos = (p.rope_table == 0 ? p.batch->cos : p.batch->cos_local) + batch_row * half;
  const float* sin = (p.rope_table == 0 ? p.batch->sin : p.batch->sin_local) + batch_row * half;
  if (head.norm != nullptr) head.rstd = head.rms(p.head_dim, p.norm_eps);
  rotate_head(head, p.head_dim, half, cos, sin, out);
}

template <class T>
POP_INLINE const T* at_head(const void* base, int64_t head, int64_t head_dim) {
  return base == nullptr ? nullptr : static_cast<const T*>(base) + head * head_dim;
}

template <class T>
void rope_cache_write_rows(const RopeCacheWriteParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t batch_row = p.first_row + row;
    if (p.q != nullptr) {
      T* q = static_cast<T*>(p.q) + row * p.q_stride;
      for (int64_t h = 0; h < p.heads; ++h) {
        T* out = q + h * p.head_dim;
        const Head<T> head = {
            out, at_head<T>(p.q_bias, h, p.head_dim), static_cast<const T*>(p.q_norm), p.norm_offset, 1.0f, 1.0f};
        norm_and_rotate(head, p, batch_row, out);
      }
    }
    const T* k = static_cast<const T*>(p.k) + row * p.kv_stride;
    const T* v = static_cast<const T*>(p.v) + row * p.kv_stride;
    const float scale = p.row_scale == nullptr ? 1.0f : p.row_scale[row];
    const int64_t sequence = p.batch->row_sequence[batch_row];
    const int64_t position = p.batch->row_position[batch_row];
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      T* key =
          static_cast<T*>(p.cache.key) + cache_offset(p.cache.key_strides, p.batch->address, sequence, h, position);
      T* value =
          static_cast<T*>(p.cache.value) + cache_offset(p.cache.value_strides, p.batch->address, sequence, h, position);
      norm_and_rotate<T>({k + h * p.head_dim, at_head<T>(p.k_bias, h, p.head_dim), static_cast<const T*>(p.k_norm),
                          p.norm_offset, scale, 1.0f},
                         p, batch_row, key);
      const Head<T> v_head = {v + h * p.head_dim, at_head<T>(p.v_bias, h, p.head_dim), nullptr, 0.0f, scale, 1.0f};
      for (int64_t i = 0; i < p.head_dim; i += kLanes)
        store_upto(value + i, v_head.value(i, p.head_dim - i), p.head_dim - i);
    }
  }
}

}  // namespace

void rope_cache_write(const RopeCacheWriteParams& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) { rope_cache_write_rows<decltype(element)>(p, begin, end); });
}

}  // namespace pop::cpu::POP_ISA
