#include "checks.h"
#include "cuda/kernels.h"

namespace {

using namespace pop;
using checks::Buffer;

struct Case {
  DType dtype;
  int64_t rows, width, features;
  int64_t extra_stride;
};

void check_case(const Case& c) {
  const std::string name = "add_features " + checks::name_of(c.dtype) + " " + std::to_string(c.rows) + "x" +
                           std::to_string(c.width) + " of " + std::to_string(c.features);
  std::mt19937 random(static_cast<unsigned>(c.rows * 1000 + c.width));
  const int64_t stride = c.width + c.extra_stride;
  Buffer features(c.dtype, c.features * stride), out(c.dtype, c.rows * c.width);
  features.fill_random(random);
  out.fill_random(random);
  checks::Vector<int64_t> source(c.rows), index(c.rows);
  for (int64_t row = 0; row < c.rows; ++row) {
    source[row] = c.rows - 1 - row;
    index[row] = row % 3 == 0 ? -1 : static_cast<int64_t>(random() % (c.features + 1));  // c.features is out of range
  }
  std::vector<float> expected;
  for (int64_t row = 0; row < c.rows; ++row) {
    const int64_t feature = index[source[row]];
    const bool has_one = feature >= 0 && feature < c.features;
    for (int64_t i = 0; i < c.width; ++i) {
      const float added = has_one ? features.get(feature * stride + i) : 0.0f;
      expected.push_back(checks::round_to(c.dtype, out.get(row * c.width + i) + added));
    }
  }
  cuda::launch_add_features({.dtype = c.dtype,
                             .rows = c.rows,
                             .width = c.width,
                             .row_source = source.data(),
                             .index = index.data(),
                             .num_features = c.features,
                             .features = features.data(),
                             .features_stride = stride,
                             .out = out.data()},
                            nullptr);
  checks::finish();
  checks::expect_close(name, out, expected, 0.0f, 0.0f);
}

void run() {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    checks::Turns turns(dtype);
    const auto run_case = [&](const Case& c) {
      if (turns.next()) check_case(c);
    };
    run_case({dtype, 1, 1, 1, 0});
    run_case({dtype, 19, 96, 4, 0});
    run_case({dtype, 129, 257, 60, 3});
    run_case({dtype, 0, 96, 4, 0});
  }
}

const checks::Check check("add_features", run);

}  // namespace
