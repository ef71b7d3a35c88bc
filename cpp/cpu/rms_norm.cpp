// Residual add and RMSNorm in one pass over a row:
//   x += delta_scale * (delta + delta_bias);  rstd = 1 / sqrt(mean(x^2) + eps);  out = x * rstd * (weight + offset)
// With delta_norm, delta + delta_bias goes through an RMSNorm of its own before it is scaled and added.
// The sum is rounded to the dtype and stored before its norm is taken, as the stock model does.
#include "cpu/row_kernels.h"
#include "cpu/vec.h"

namespace pop::cpu::POP_ISA {
namespace {

constexpr int kAccumulators = 4;

// Adds scale * (delta + bias) to `count` elements of x (a full vector, or fewer at the end of a row) and returns the
// new x.
template <class T>
POP_INLINE Vec update(T* x, const T* delta, const T* bias, float scale, int64_t count) {
  Vec value = load_upto(x, count);
  if (delta == nullptr) return value;
  Vec addend = load_upto(delta, count);
  if (bias != nullptr) addend += load_upto(bias, count);
  return store_rounded(x, value + addend * splat(scale), count);
}

// Adds scale * (delta + bias) and returns the sum of squares. Callers pass literal nulls, so that the compiler makes a
// loop for each case.
template <class T>
POP_INLINE float sum_of_squares(T* x, const T* delta, const T* bias, float scale, int64_t width) {
  const auto at = [](const T* base, int64_t i) { return base == nullptr ? base : base + i; };
  Vec sums[kAccumulators] = {};
  constexpr int64_t kStep = kAccumulators * kLanes;
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep) {
    for (int j = 0; j < kAccumulators; ++j) {
      const int64_t from = i + j * kLanes;
      const Vec value = update(x + from, at(delta, from), at(bias, from), scale, kLanes);
      sums[j] += value * value;
    }
  }
  for (; i < width; i += kLanes) {
    const Vec value = update(x + i, at(delta, i), at(bias, i), scale, width - i);
    sums[0] += value * value;
  }
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// x += delta_scale * rms_norm(delta + bias); returns the sum of squares of x. Reads the row of delta twice.
template <class T>
POP_INLINE float add_normalised(const RmsNormParams& p, T* x, const T* delta, const T* bias, const T* norm) {
  const int64_t width = p.width;
  const auto addend = [&](int64_t i) {
    Vec value = load_upto(delta + i, width - i);
    if (bias != nullptr) value += load_upto(bias + i, width - i);
    return value;
  };
  Vec squares = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    const Vec value = addend(i);
    squares += value * value;
  }
  const Vec scale = splat(rms_scale(sum_lanes(squares), width, p.eps) * p.delta_scale);
  Vec sum = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t count = width - i;
    const Vec normalised = addend(i) * scale * (load_upto(norm + i, count) + p.weight_offset);
    const Vec value = store_rounded(x + i, load_upto(x + i, count) + normalised, count);
    sum += value * value;
  }
  return sum_lanes(sum);
}

template <class T>
POP_INLINE void scale_row(const T* x, float rstd, const T* weight, float offset, T* out, int64_t width) {
  const Vec scale = splat(rstd);
  for (int64_t i = 0; i < width; i += kLanes) {
    Vec value = load_upto(x + i, width - i) * scale;
    if (weight != nullptr) value *= load_upto(weight + i, width - i) + offset;
    store_upto(out + i, value, width - i);
  }
}

template <class T>
void rms_norm_rows(const RmsNormParams& p, int64_t begin, int64_t end) {
  const T* bias = static_cast<const T*>(p.delta_bias);
  const T* norm = static_cast<const T*>(p.delta_norm);
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t row = begin; row < end; ++row) {
    T* x = static_cast<T*>(p.x) + row * p.x_stride;
    float sum;
    if (p.delta == nullptr) {
      sum = sum_of_squares<T>(x, nullptr, nullptr, 1.0f, p.width);
    } else {
      const T* delta = static_cast<const T*>(p.delta) + row * p.delta_stride;
      if (norm != nullptr) {
        sum = add_normalised<T>(p, x, delta, bias, norm);
      } else if (bias != nullptr) {
        sum = sum_of_squares<T>(x, delta, bias, p.delta_scale, p.width);
      } else {
        sum = sum_of_squares<T>(x, delta, nullptr, p.delta_scale, p.width);
      }
    }
    const float rstd = rms_scale(sum, p.width, p.eps);
    if (p.rstd != nullptr) p.rstd[row] = rstd;
    if (p.out == nullptr) continue;
    T* out = static_cast<T*>(p.out) + row * p.out_stride;
    if (weight == nullptr) {
      scale_row<T>(x, rstd, nullptr, 0.0f, out, p.width);
    } else {
      scale_row<T>(x, rstd, weight, p.weight_offset, out, p.width);
    }
  }
}

}  // namespace

void rms_norm(const RmsNormParams& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) { rms_norm_rows<decltype(element)>(p, begin, end); });
}

}  // namespace pop::cpu::POP_ISA
