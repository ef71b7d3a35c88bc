// Rounds rows to 8-bit floats (e4m3) or 8-bit integers, with one scale per row.
#include "cpu/row_kernels.h"
#include "cpu/vec.h"

namespace pop::cpu::POP_ISA {
namespace {

template <class T>
POP_INLINE float largest_magnitude(const T* x, int64_t width) {
  Vec largest = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    const Vec value = load_upto(x + i, width - i);
    const Vec magnitude = value < 0.0f ? -value : value;
    largest = magnitude > largest ? magnitude : largest;
  }
  float most = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) most = largest[lane] > most ? largest[lane] : most;
  return most;
}

// Stores the low 8 bits of the first min(count, kLanes) lanes.
POP_INLINE void store_bytes(uint8_t* to, VecU32 lanes, int64_t count) {
  using VecU8 = uint8_t __attribute__((vector_size(kLanes)));
  if (count >= kLanes) {
    const VecU8 bytes = __builtin_convertvector(lanes, VecU8);
    __builtin_memcpy(to, &bytes, sizeof(bytes));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint8_t>(lanes[i]);
  }
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
