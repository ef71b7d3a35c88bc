// Rounds rows to 8-bit floats (e4m3) with one scale per row.
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

template <class T>
void quantize_rows_of(const QuantizeRowsParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    uint8_t* out = p.out + row * p.out_stride;
    const float largest = largest_magnitude(x, p.width);
    const Vec factor = splat(e4m3_factor(largest));
    for (int64_t i = 0; i < p.width; i += kLanes) {
      const int64_t count = p.width - i;
      const VecU32 bytes = e4m3_bits(load_upto(x + i, count) * factor);
      for (int lane = 0; lane < kLanes && lane < count; ++lane) out[i + lane] = static_cast<uint8_t>(bytes[lane]);
    }
    p.scale[row] = e4m3_scale(largest);
  }
}

}  // namespace

void quantize_rows(const QuantizeRowsParams& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) { quantize_rows_of<decltype(element)>(p, begin, end); });
}

}  // namespace pop::cpu::POP_ISA
