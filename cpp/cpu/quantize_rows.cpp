// Rounds rows to 8-bit floats (e4m3) or 8-bit integers, with one scale per row.
#include "cpu/row_kernels.h"
#include "cpu/vec.h"

namespace pop::cpu::POP_ISA {
namespace {

// NaN counts as nothing.
template <class T>
POP_INLINE float largest_magnitude(const T* x, int64_t width) {
  // Some vectors at once: a maximum waits for the one before it.
  constexpr int kAtOnce = 4;
  Vec largest[kAtOnce] = {};
  const auto step = [&](int64_t i, int slot) __attribute__((always_inline)) {
    const VecU32 bits = lane_cast<VecU32>(load_upto(x + i, width - i));
    largest[slot] = max(lane_cast<Vec>(bits & 0x7fffffffu), largest[slot]);
  };
  int64_t i = 0;
  for (; i + kAtOnce * kLanes <= width; i += kAtOnce * kLanes) {
    for (int slot = 0; slot < kAtOnce; ++slot) step(i + slot * kLanes, slot);
  }
  for (; i < width; i += kLanes) step(i, 0);
  for (int slot = 1; slot < kAtOnce; ++slot) largest[0] = max(largest[slot], largest[0]);
  float most = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) most = largest[0][lane] > most ? largest[0][lane] : most;
  return most;
}

// Stores the low 8 bits of the first min(count, kLanes) lanes.
POP_INLINE void store_bytes(uint8_t* to, VecU32 lanes, int64_t count) {
  if (count >= kLanes) return store_u8(to, lanes);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint8_t>(lanes[i]);
}

template <class T>
void to_e4m3(const T* x, int64_t width, uint8_t* out, float* scale) {
  const float largest = largest_magnitude(x, width);
  const Vec factor = splat(e4m3_factor(largest));
  for (int64_t i = 0; i < width; i += kLanes) {
    store_bytes(out + i, e4m3_bits(load_upto(x + i, width - i) * factor), width - i);
  }
  *scale = e4m3_scale(largest);
}

// Integers have no NaN, so NaN or infinity in a row makes its scale NaN.
template <class T>
void to_int8(const T* x, int64_t width, uint8_t* out, float* scale) {
  const float largest = largest_magnitude(x, width);
  const Vec factor = splat(int8_factor(largest));
  Vec zeros = {};  // or NaN
  for (int64_t i = 0; i < width; i += kLanes) {
    const Vec value = load_upto(x + i, width - i);
    zeros += value * 0.0f;
    store_bytes(out + i, int8_bits(value * factor), width - i);
  }
  *scale = int8_scale(largest) + sum_lanes(zeros);
}

template <class T>
void quantize_rows_of(const QuantizeRowsParams& p, int64_t begin, int64_t end) {
  const auto quantize = p.products == Products::int8 ? to_int8<T> : to_e4m3<T>;
  for (int64_t row = begin; row < end; ++row) {
    quantize(static_cast<const T*>(p.x) + row * p.x_stride, p.width, p.out + row * p.out_stride, p.scale + row);
  }
}

}  // namespace

void quantize_rows(const QuantizeRowsParams& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) { quantize_rows_of<decltype(element)>(p, begin, end); });
}

}  // namespace pop::cpu::POP_ISA
