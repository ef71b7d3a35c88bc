#include <algorithm>

#include "checks.h"
#include "cuda/kernels.h"

namespace {

using namespace pop;
using checks::Buffer;

struct Case {
  DType dtype;
  int64_t rows, width;
  float scale = 1.0f;
  int64_t x_extra = 0, out_extra = 0, offset = 0;
};

// The value of a byte by the definition of e4m3: four bits of exponent, three of mantissa.
float value_of(uint8_t byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                        : std::ldexp(1.0f + static_cast<float>(mantissa) / 8, exponent - 7);
  return byte & 0x80 ? -magnitude : magnitude;
}

// True if no e4m3 number is nearer to `value` than that of `byte`.
bool is_nearest(uint8_t byte, float value) {
  const float distance = std::abs(value_of(byte) - value);
  for (int other = 0; other < 256; ++other) {
    if ((other & 0x7f) != 0x7f && std::abs(value_of(static_cast<uint8_t>(other)) - value) < distance) return false;
  }
  return (byte & 0x7f) != 0x7f;
}

void check_case(const Case& c) {
  const std::string name = "quantize_rows " + checks::name_of(c.dtype) + " " + std::to_string(c.rows) + "x" +
                           std::to_string(c.width) + " strides +" + std::to_string(c.x_extra) + " +" +
                           std::to_string(c.out_extra) + " offset " + std::to_string(c.offset);
  std::mt19937 random(static_cast<unsigned>(c.rows * 7919 + c.width));
  const int64_t x_stride = c.width + c.x_extra, out_stride = c.width + c.out_extra;
  Buffer x(c.dtype, c.rows * x_stride, c.offset), scale(DType::f32, c.rows);
  x.fill_random(random, c.scale);
  constexpr uint8_t kUntouched = 0xa5;
  checks::Vector<uint8_t> out(c.rows * out_stride + 64 + c.offset, kUntouched);
  uint8_t* first = out.data() + c.offset;
  cuda::launch_quantize_rows({.dtype = c.dtype,
                              .rows = c.rows,
                              .width = c.width,
                              .x = x.data(),
                              .x_stride = x_stride,
                              .out = first,
                              .out_stride = out_stride,
                              .scale = static_cast<float*>(scale.data())},
                             nullptr);
  checks::finish();
  std::vector<float> scales(c.rows);
  for (int64_t row = 0; row < c.rows; ++row) {
    float largest = 0.0f;
    for (int64_t i = 0; i < c.width; ++i) largest = std::max(largest, std::abs(x.get(row * x_stride + i)));
    scales[row] = largest / 448.0f;
    for (int64_t i = 0; i < out_stride; ++i) {
      const uint8_t byte = first[row * out_stride + i];
      if (i >= c.width) {
        if (byte != kUntouched) throw std::runtime_error(name + ": wrote between rows");
        continue;
      }
      const float value = std::clamp(x.get(row * x_stride + i) * (448.0f / largest), -448.0f, 448.0f);
      if (!is_nearest(byte, value)) {
        throw std::runtime_error(name + ": row " + std::to_string(row) + ", element " + std::to_string(i) + ": got " +
                                 std::to_string(value_of(byte)) + " for " + std::to_string(value));
      }
    }
  }
  for (int64_t i = 0; i < 64; ++i) {
    if (first[c.rows * out_stride + i] != kUntouched) throw std::runtime_error(name + ": wrote behind its output");
  }
  checks::expect_close(name + ", scale", scale, scales, 0.0f, 1e-6f);
}

void run() {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    checks::Turns turns(dtype);
    const auto run_case = [&](const Case& c) {
      if (turns.next()) check_case(c);
    };
    run_case({dtype, 1, 1});
    run_case({dtype, 3, 96});
    run_case({dtype, 2, 19});
    run_case({dtype, 2, 500, 100.0f});
    run_case({dtype, 2, 4104, 0.01f});        // more than one step of a block
    run_case({dtype, 3, 96, 1.0f, 8, 16});    // rows with gaps
    run_case({dtype, 3, 96, 1.0f, 3, 5});     // unaligned rows
    run_case({dtype, 2, 96, 1.0f, 0, 0, 1});  // unaligned bases
  }
}

const checks::Check check("quantize_rows", run);

}  // namespace
