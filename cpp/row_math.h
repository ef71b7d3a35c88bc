// The arithmetic of one row or one pair of channels, shared by the CPU and the CUDA kernels.
//
// Functions are templates over F, the type of a group of fp32 lanes: `float` on a device, `float` or a GCC vector type
// (cpu/vec.h) on a host. They have no branches, since all lanes of a vector run the same instructions. All arithmetic
// is fp32; bf16 and f16 elements are passed as their 16 bits.
#pragma once

#include <cstdint>

#include "host_device.h"

#if defined(__CUDA_ARCH__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace pop {

// Integers of the width and lane count of F. cpu/vec.h adds its vector types.
template <class F>
struct LaneInts;

template <>
struct LaneInts<float> {
  using i32 = int32_t;
  using u32 = uint32_t;
};

template <class To, class From>
POP_HD To lane_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "lane_cast keeps the bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- 16-bit elements -----------------------------------------------------------------------

// Low 16 bits of the result: the bf16 nearest to f, ties to even. A NaN becomes a quiet NaN.
template <class F>
POP_HD auto bf16_bits(F f) -> typename LaneInts<F>::u32 {
#if defined(__CUDA_ARCH__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(f));
#else
  using U = typename LaneInts<F>::u32;
  const U bits = lane_cast<U>(f);
  const U upper = bits >> 16;
  const U rounded = (bits + (0x7fffu + (upper & 1u))) >> 16;
  const U nan = upper | 0x40u;
  return f != f ? nan : rounded;
#endif
}

template <class F>
POP_HD F bf16_value(typename LaneInts<F>::u32 bits) {
  return lane_cast<F>(bits << 16);
}

// Low 16 bits of the result: the f16 nearest to f, ties to even; infinity from 65520 on.
template <class F>
POP_HD auto f16_bits(F f) -> typename LaneInts<F>::u32 {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(f));
#else
  using U = typename LaneInts<F>::u32;
  const U bits = lane_cast<U>(f);
  const U sign = bits & 0x80000000u;
  const U magnitude = bits ^ sign;
  const F absolute = lane_cast<F>(magnitude);
  // Below 2^-14 the fp32 adder rounds to the subnormal's grid: 0.5 has an ulp of 2^-24.
  const U subnormal = lane_cast<U>(absolute + 0.5f) - 0x3f000000u;
  // Otherwise move the exponent's bias from 127 to 15 and round at bit 13.
  const U normal = (magnitude + (0xc8000fffu + ((magnitude >> 13) & 1u))) >> 13;
  const U nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  U half = absolute < 6.103515625e-05f ? subnormal : normal;
  half = absolute >= 65520.0f ? 0x7c00u : half;
  half = f != f ? nan : half;
  return half | (sign >> 16);
#endif
}

template <class F>
POP_HD F f16_value(typename LaneInts<F>::u32 bits) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
#else
  using U = typename LaneInts<F>::u32;
  const U sign = (bits & 0x8000u) << 16;
  const U magnitude = (bits & 0x7fffu) << 13;
  // 2^112 moves the exponent's bias from 15 to 127, subnormals included.
  const F finite = lane_cast<F>(magnitude) * 5.192296858534828e33f;
  const U special = magnitude | 0x7f800000u;
  const U result = finite >= 65536.0f ? special : lane_cast<U>(finite);
  return lane_cast<F>(result | sign);
#endif
}

// ---- 8-bit elements ------------------------------------------------------------------------

inline constexpr float kE4m3Max = 448.0f;

// Low 8 bits of the result: the e4m3 number ("fn": no infinity) nearest to f, ties to even; at most kE4m3Max.
template <class F>
POP_HD auto e4m3_bits(F f) -> typename LaneInts<F>::u32 {
  using U = typename LaneInts<F>::u32;
  const U bits = lane_cast<U>(f);
  const U sign = bits & 0x80000000u;
  const U magnitude = bits ^ sign;
  const F absolute = lane_cast<F>(magnitude);
  // Below 2^-6 the fp32 adder rounds to the subnormal's grid: 2^14 has an ulp of 2^-9.
  const U subnormal = lane_cast<U>(absolute + 16384.0f) - 0x46800000u;
  // Otherwise move the exponent's bias from 127 to 7 and round at bit 20.
  const U normal = (magnitude + (0xc407ffffu + ((magnitude >> 20) & 1u))) >> 20;
  U byte = absolute < 0.015625f ? subnormal : normal;
  byte = absolute >= kE4m3Max ? 0x7eu : byte;
  byte = f != f ? 0x7fu : byte;
  return byte | (sign >> 24);
}

// The factor for a row before it is rounded to e4m3: its largest magnitude becomes kE4m3Max.
POP_HD float e4m3_factor(float largest) { return kE4m3Max / (largest < 1e-30f ? 1e-30f : largest); }

// The scale of the rounded row: row = rounded * scale.
POP_HD float e4m3_scale(float largest) { return (largest < 1e-30f ? 1e-30f : largest) * (1.0f / kE4m3Max); }

// Low 8 bits of the result: the integer nearest to f, ties to even, in two's complement; for |f| <= 127.5.
template <class F>
POP_HD auto int8_bits(F f) -> typename LaneInts<F>::u32 {
  using U = typename LaneInts<F>::u32;
  const U bits = lane_cast<U>(f);
  const U sign = bits & 0x80000000u;
  // The fp32 adder rounds to integers: 2^23 has an ulp of 1.
  const U magnitude = lane_cast<U>(lane_cast<F>(bits ^ sign) + 8388608.0f) - 0x4b000000u;
  const U negative = U{} - (sign >> 31);
  return (magnitude ^ negative) - negative;
}

// The factor for a row before it is rounded to int8, and the scale of the rounded row: row = rounded * scale.
POP_HD float int8_factor(float largest) { return 127.0f / (largest < 1e-30f ? 1e-30f : largest); }
POP_HD float int8_scale(float largest) { return (largest < 1e-30f ? 1e-30f : largest) / 127.0f; }

// ---- Activations ---------------------------------------------------------------------------

// e^x: within 2 ulp on a host; zero below the range, infinity above, NaN kept.
template <class F>
POP_HD F exp_lanes(F x) {
#if defined(__CUDA_ARCH__)
  return __expf(x);
#else
  using I = typename LaneInts<F>::i32;
  x = x < -110.0f ? -110.0f : x;
  x = x > 100.0f ? 100.0f : x;
  // x = n ln2 + r with |r| <= ln2 / 2; adding 1.5 * 2^23 leaves round(x / ln2) in the low bits.
  const F shifted = x * 1.44269504f + 12582912.0f;
  const F n = shifted - 12582912.0f;
  const F r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  F p = r * 1.39013472e-3f + 8.36330003e-3f;
  p = p * r + 4.16668554e-2f;
  p = p * r + 0.166665764f;
  p = p * r + 0.499999995f;
  p = p * (r * r) + r + 1.0f;
  // 2^n in two factors, so that subnormal and overflowing results come out right.
  const I exponent = lane_cast<I>(shifted) - 0x4b400000;
  const I half = exponent >> 1;
  return p * lane_cast<F>((half + 127) << 23) * lane_cast<F>((exponent - half + 127) << 23);
#endif
}

// a / b for b >= 1, including infinity. On a device within 2 ulp, without the slow path of `/`.
template <class F>
POP_HD F ratio(F a, F b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

template <class F>
POP_HD F sigmoid(F x) {
  return ratio(F{} + 1.0f, 1.0f + exp_lanes(-x));
}

template <class F>
POP_HD F silu(F x) {
  return ratio(x, 1.0f + exp_lanes(-x));
}

// 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3): no cancellation for x < 0.
template <class F>
POP_HD F gelu_tanh(F x) {
  return ratio(x, 1.0f + exp_lanes(x * (-1.595769122f - 0.0713548163f * (x * x))));
}

// x Phi(x), Phi(x) = erfc(-x / sqrt(2)) / 2.
template <class F>
POP_HD F gelu(F x) {
#if defined(__CUDA_ARCH__)
  return 0.5f * x * erfcf(-0.707106781f * x);
#else
  // erfc(t) = e^(-t^2) u P(u) with u = 1 / (1 + 0.3 t), relative error 2e-8 for t in [0, 10.2].
  F t = (x < 0.0f ? -x : x) * 0.707106781f;
  t = t > 10.2f ? 10.2f : t;
  const F u = 1.0f / (1.0f + 0.3f * t);
  F p = u * -0.12954118f + 0.485659084f;
  p = p * u - 0.512493684f;
  p = p * u + 0.547991065f;
  p = p * u - 0.0948587483f;
  p = p * u + 0.215025714f;
  p = p * u + 0.148310115f;
  p = p * u + 0.170719934f;
  p = p * u + 0.169187681f;
  const F tail = 0.5f * (p * u) * exp_lanes(-(t * t));
  return x * (x > 0.0f ? 1.0f - tail : tail);
#endif
}

// (u + 1) g sigmoid(alpha g) of g = min(gate, limit) and u = up within [-limit, limit]; NaN kept (gpt-oss).
template <class F>
POP_HD F clamped_swiglu(F gate, F up, float alpha, float limit) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up;
  up = up < -limit ? -limit : up;
  return (up + 1.0f) * ratio(gate, 1.0f + exp_lanes(-alpha * gate));
}

// cap * tanh(u), u = x / cap. Computed as 1 - 2 / (1 + e^(2u)) the error is relative to cap, 4e-7 cap on a device. For
// |u| < 0.1 the series is used, whose error is relative to x, so that a cap far above the scores changes nothing.
template <class F>
POP_HD F softcapped(F x, float cap) {
  const F u = x * (1.0f / cap), u2 = u * u;
  const F large = cap - cap * ratio(F{} + 2.0f, 1.0f + exp_lanes(2.0f * u));
  const F small = x * (1.0f + u2 * (-0.333333333f + u2 * (0.133333333f - 0.0539682540f * u2)));
  return u2 < 0.01f ? small : large;
}

// ---- Norm and RoPE -------------------------------------------------------------------------

// 1 / sqrt(mean(x^2) + eps), with eps added to the mean as in Llama, Qwen and Gemma.
POP_HD float rms_scale(float sum_of_squares, int64_t width, float eps) {
#if defined(__CUDA_ARCH__)
  return rsqrtf(ratio(sum_of_squares, static_cast<float>(width)) + eps);
#else
  return 1.0f / __builtin_sqrtf(sum_of_squares / static_cast<float>(width) + eps);
#endif
}

// Rotates the pair of channels (i, i + rotary_dim / 2) by the angle with this cosine and sine.
template <class F>
POP_HD void rope_rotate(F& first, F& second, F cos, F sin) {
  const F turned = first * cos - second * sin;
  second = second * cos + first * sin;
  first = turned;
}

}  // namespace pop
