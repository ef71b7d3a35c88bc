#include "checks.h"
#include "cuda/kernels.h"

namespace {

using namespace pop;
using checks::Buffer;

struct Case {
  DType dtype;
  Activation activation;
  int64_t rows, width;
  bool gate_bias, up_bias;
  int64_t extra_stride = 0, offset = 0;
};

constexpr float kAlpha = 1.702f, kLimit = 2.5f;

double activate(Activation activation, double x) {
  switch (activation) {
    case Activation::silu:
      return x / (1.0 + std::exp(-x));
    case Activation::gelu_tanh:
      return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::gelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::clamped_swiglu:
      return std::min<double>(x, kLimit) / (1.0 + std::exp(-kAlpha * std::min<double>(x, kLimit)));
  }
  return 0.0;
}

double activate(Activation activation, double gate, double up) {
  if (activation == Activation::clamped_swiglu) up = 1.0 + std::clamp<double>(up, -kLimit, kLimit);
  return activate(activation, gate) * up;
}

void check_case(const Case& c) {
  const std::string name = "gated_act " + checks::name_of(c.dtype) + " " +
                           std::to_string(static_cast<int>(c.activation)) + " " + std::to_string(c.rows) + "x" +
                           std::to_string(c.width) + " stride +" + std::to_string(c.extra_stride) + " offset " +
                           std::to_string(c.offset) + (c.gate_bias ? " gate_bias" : "") + (c.up_bias ? " up_bias" : "");
  std::mt19937 random(static_cast<unsigned>(c.rows * 7919 + c.width));
  const int64_t gate_stride = c.width + c.extra_stride, up_stride = gate_stride + c.extra_stride;
  Buffer gate(c.dtype, c.rows * gate_stride, c.offset), up(c.dtype, c.rows * up_stride, c.offset);
  Buffer gate_bias(c.dtype, c.width, c.offset), up_bias(c.dtype, c.width, c.offset);
  for (Buffer* buffer : {&up, &gate_bias, &up_bias}) buffer->fill_random(random);
  std::vector<float> expected(gate.count(), Buffer::kSentinel);
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t i = 0; i < c.width; ++i) {
      const int64_t at = row * gate_stride + i;
      gate.set(at, std::normal_distribution<float>(0.0f, 3.0f)(random));
      const float g = gate.get(at) + (c.gate_bias ? gate_bias.get(i) : 0.0f);
      const float u = up.get(row * up_stride + i) + (c.up_bias ? up_bias.get(i) : 0.0f);
      expected[at] = static_cast<float>(activate(c.activation, g, u));
    }
  }
  cuda::launch_gated_act({.dtype = c.dtype,
                          .activation = c.activation,
                          .rows = c.rows,
                          .width = c.width,
                          .gate = gate.data(),
                          .gate_stride = gate_stride,
                          .up = up.data(),
                          .up_stride = up_stride,
                          .gate_bias = c.gate_bias ? gate_bias.data() : nullptr,
                          .up_bias = c.up_bias ? up_bias.data() : nullptr,
                          .out = gate.data(),
                          .out_stride = gate_stride,
                          .swiglu_alpha = kAlpha,
                          .swiglu_limit = kLimit},
                         nullptr);
  checks::finish();
  checks::expect_close(name, gate, expected, 1e-6f, checks::rounding(c.dtype) / 2 + 1e-5f);
}

// Channels of gate and up, and of their biases, take turns.
void check_interleaved(DType dtype, Activation activation, int64_t rows, int64_t width, bool has_bias) {
  const std::string name = "gated_act interleaved " + checks::name_of(dtype) + " " + std::to_string(width);
  std::mt19937 random(static_cast<unsigned>(rows * 31 + width));
  Buffer both(dtype, rows * 2 * width), bias(dtype, 2 * width), out(dtype, rows * (width + 3));
  both.fill_random(random, 3.0f);
  bias.fill_random(random);
  cuda::launch_gated_act({.dtype = dtype,
                          .activation = activation,
                          .rows = rows,
                          .width = width,
                          .gate = both.data(),
                          .gate_stride = 2 * width,
                          .up = both.at(1),
                          .up_stride = 2 * width,
                          .gate_bias = has_bias ? bias.data() : nullptr,
                          .up_bias = has_bias ? bias.at(1) : nullptr,
                          .step = 2,
                          .out = out.data(),
                          .out_stride = width + 3,
                          .swiglu_alpha = kAlpha,
                          .swiglu_limit = kLimit},
                         nullptr);
  checks::finish();
  std::vector<float> expected(out.count(), Buffer::kSentinel);
  for (int64_t i = 0; i < rows * width; ++i) {
    const int64_t at = 2 * (i % width);
    const auto value = [&](int64_t e) { return both.get(i / width * 2 * width + e) + (has_bias ? bias.get(e) : 0.0f); };
    expected[i / width * (width + 3) + i % width] = static_cast<float>(activate(activation, value(at), value(at + 1)));
  }
  checks::expect_close(name, out, expected, 1e-6f, checks::rounding(dtype) / 2 + 1e-5f);
}

void run() {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    checks::Turns turns(dtype);
    const auto run_case = [&](const Case& c) {
      if (turns.next()) check_case(c);
    };
    for (const Activation activation :
         {Activation::silu, Activation::gelu_tanh, Activation::gelu, Activation::clamped_swiglu}) {
      for (const bool gate_bias : {false, true}) {
        for (const bool up_bias : {false, true}) {
          run_case({dtype, activation, 2, 96, gate_bias, up_bias});
          run_case({dtype, activation, 3, 19, gate_bias, up_bias});
        }
      }
      run_case({dtype, activation, 1, 1, true, true});
      run_case({dtype, activation, 2, 2104, true, true, 8});  // the second pieces of some threads lie beyond the row
      run_case({dtype, activation, 2, 4136, true, true, 8});  // several blocks per row, the last one not full
    }
    run_case({dtype, Activation::silu, 2, 96, true, true, 0, 1});  // unaligned bases
    run_case({dtype, Activation::silu, 3, 96, true, true, 3});     // unaligned rows
    run_case({dtype, Activation::silu, 2, 500, true, false, 500});
    run_case({dtype, Activation::silu, 0, 96, true, true});
    for (const bool has_bias : {false, true}) {
      if (turns.next()) check_interleaved(dtype, Activation::clamped_swiglu, 3, 96, has_bias);
      if (turns.next()) check_interleaved(dtype, Activation::silu, 2, 300, has_bias);  // several blocks per row
    }
  }
}

const checks::Check check("gated_act", run);

}  // namespace
