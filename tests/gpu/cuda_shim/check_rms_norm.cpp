#include "checks.h"
#include "cuda/kernels.h"

namespace {

using namespace pop;
using checks::Buffer;

struct Case {
  DType dtype;
  int64_t rows, width;
  bool delta, delta_bias, weight, out, rstd;
  int64_t extra_stride = 0;  // of x, delta and out
  int64_t offset = 0;
  bool delta_norm = false;
  float weight_offset = 0.0f;
  bool in_place = false;  // out is x
  float delta_scale = 1.0f;
};

std::string name_of(const Case& c) {
  std::string name = "rms_norm " + checks::name_of(c.dtype) + " " + std::to_string(c.rows) + "x" +
                     std::to_string(c.width) + " stride +" + std::to_string(c.extra_stride) + " offset " +
                     std::to_string(c.offset) + " weight + " + std::to_string(c.weight_offset) + " delta * " +
                     std::to_string(c.delta_scale);
  for (const auto& [given, what] :
       {std::pair{c.delta, " delta"}, std::pair{c.delta_bias, " bias"}, std::pair{c.delta_norm, " delta_norm"},
        std::pair{c.weight, " weight"}, std::pair{c.out, " out"}, std::pair{c.in_place, " in place"}}) {
    if (given) name += what;
  }
  return name;
}

constexpr float kEps = 1e-3f;

float rstd_of(const std::vector<float>& row) {
  double squares = 0.0;
  for (const float value : row) squares += static_cast<double>(value) * value;
  return static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(row.size()) + kEps));
}

void check_case(const Case& c) {
  std::mt19937 random(static_cast<unsigned>(c.rows * 7919 + c.width));
  const int64_t x_stride = c.width + c.extra_stride, delta_stride = x_stride + c.extra_stride,
                out_stride = c.in_place ? x_stride : x_stride + 2 * c.extra_stride;
  const auto vector = [&](int64_t count) {
    Buffer buffer(c.dtype, count, c.offset);
    buffer.fill_random(random);
    return buffer;
  };
  Buffer x(c.dtype, c.rows * x_stride, c.offset), out(c.dtype, c.rows * out_stride, c.offset);
  Buffer rstd(DType::f32, c.rows);
  const Buffer delta = vector(c.rows * delta_stride), bias = vector(c.width), weight = vector(c.width),
               norm = vector(c.width);
  std::vector<float> x_expected(x.count(), Buffer::kSentinel);
  for (int64_t row = 0; row < c.rows; ++row) {
    std::vector<float> addend(c.width);
    for (int64_t i = 0; i < c.width; ++i) {
      x.set(row * x_stride + i, std::normal_distribution<float>(0.0f, 0.1f * (row + 1))(random));
      addend[i] = delta.get(row * delta_stride + i) + (c.delta_bias ? bias.get(i) : 0.0f);
    }
    const float scale = c.delta_norm ? rstd_of(addend) : 1.0f;
    for (int64_t i = 0; i < c.width; ++i) {
      if (c.delta_norm) addend[i] *= scale * (norm.get(i) + c.weight_offset);
      addend[i] *= c.delta_scale;
      const float before = x.get(row * x_stride + i);
      x_expected[row * x_stride + i] = c.delta ? checks::round_to(c.dtype, before + addend[i]) : before;
    }
  }
  Buffer& to = c.in_place ? x : out;
  cuda::launch_rms_norm({.dtype = c.dtype,
                         .rows = c.rows,
                         .width = c.width,
                         .x = x.data(),
                         .x_stride = x_stride,
                         .delta = c.delta ? delta.data() : nullptr,
                         .delta_stride = delta_stride,
                         .delta_bias = c.delta_bias ? bias.data() : nullptr,
                         .delta_norm = c.delta_norm ? norm.data() : nullptr,
                         .delta_scale = c.delta_scale,
                         .weight = c.weight ? weight.data() : nullptr,
                         .weight_offset = c.weight_offset,
                         .eps = kEps,
                         .out = c.out ? to.data() : nullptr,
                         .out_stride = out_stride,
                         .rstd = c.rstd ? static_cast<float*>(rstd.data()) : nullptr},
                        nullptr);
  checks::finish();
  const float rounding = checks::rounding(c.dtype);
  // A normalised or scaled addend may round differently in the last place.
  const bool exact = !c.delta_norm && c.delta_scale == 1.0f;
  const float x_relative = exact ? 0.0f : rounding, x_absolute = exact ? 0.0f : 1e-5f;
  if (!c.in_place) checks::expect_close(name_of(c) + ": x", x, x_expected, x_absolute, x_relative);
  std::vector<float> out_expected(to.count(), Buffer::kSentinel), rstd_expected;
  for (int64_t row = 0; row < c.rows; ++row) {
    std::vector<float> values(c.width);
    for (int64_t i = 0; i < c.width; ++i) {
      values[i] = c.in_place ? x_expected[row * x_stride + i] : x.get(row * x_stride + i);
    }
    const float scale = rstd_of(values);
    rstd_expected.push_back(c.rstd ? scale : Buffer::kSentinel);
    for (int64_t i = 0; i < c.width && c.out; ++i) {
      out_expected[row * out_stride + i] = values[i] * scale * (c.weight ? weight.get(i) + c.weight_offset : 1.0f);
    }
  }
  checks::expect_close(name_of(c) + ": out", to, out_expected, 1e-6f, rounding / 2 + 1e-5f);
  checks::expect_close(name_of(c) + ": rstd", rstd, rstd_expected, 0.0f, 1e-5f);
}

void run() {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    checks::Turns turns(dtype);
    const auto run_case = [&](const Case& c) {
      if (turns.next()) check_case(c);
    };
    // Every optional argument on and off, in registers (96) and element by element (19).
    for (const int64_t width : {96, 19}) {
      for (int given = 0; given < 32; given += checks::kRaces ? 31 : 1) {
        run_case({dtype, 2, width, (given & 1) != 0, (given & 2) != 0, (given & 4) != 0, (given & 8) != 0,
                  (given & 16) != 0});
      }
      for (int given = 0; given < 16; given += checks::kRaces ? 15 : 1) {
        Case c{dtype, 2, width, true, (given & 1) != 0, (given & 2) != 0, (given & 4) != 0, true};
        c.delta_norm = true;
        c.weight_offset = (given & 8) != 0 ? 1.0f : 0.0f;
        run_case(c);
        c.delta_norm = (given & 8) != 0;
        c.delta_scale = 0.3f;
        run_case(c);
      }
    }
    run_case({dtype, 1, 1, true, true, true, true, true});
    run_case({dtype, 3, 2, true, true, true, true, true});
    run_case({dtype, 5, 111, true, false, true, true, false});
    run_case({dtype, 2, 500, true, true, true, true, true, 4});
    run_case({dtype, 2, 96, true, true, true, true, true, 0, 1});  // unaligned bases
    run_case({dtype, 3, 96, true, true, true, true, true, 8});     // gaps between rows are not written
    run_case({dtype, 3, 96, true, false, true, true, false, 3});   // unaligned rows
    run_case({dtype, 2, 1500, true, true, true, true, true, 0, 1});
    run_case({dtype, 3, 96, true, true, true, true, true, 3, 1, true, 1.0f});
    // One, two and four packs per thread, the last one not full; then more than registers hold.
    for (const int64_t width : {1016, 2048, 3000, 4096, 5000, 8192, 17000}) {
      if (checks::kRaces && width != 1016 && width != 4096 && width != 17000) continue;
      run_case({dtype, 1, width, true, true, true, true, true});
      run_case({dtype, 1, width, true, width % 3 == 0, true, true, true, 0, 0, true, 1.0f});
      run_case({dtype, 2, width, false, false, width % 3 == 0, true, false});
      run_case({dtype, 2, width, false, false, true, true, false, 8, 0, false, 1.0f, true});
    }
    run_case({dtype, 2, 19, false, false, true, true, true, 3, 1, false, 0.0f, true});
    run_case({dtype, 0, 96, true, true, true, true, true});
  }
}

const checks::Check check("rms_norm", run);

}  // namespace
