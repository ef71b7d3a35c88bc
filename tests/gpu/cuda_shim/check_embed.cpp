#include <algorithm>

#include "checks.h"
#include "cuda/kernels.h"

namespace {

using namespace pop;
using checks::Buffer;

struct Case {
  DType dtype;
  int64_t rows, width;
  bool with_ids;
  int64_t extra_stride, offset;  // of the table; make it unaligned
  bool stray_ids;
  float scale = 1.0f;
};

std::string name_of(const Case& c) {
  return "embed " + checks::name_of(c.dtype) + " " + std::to_string(c.rows) + "x" + std::to_string(c.width) +
         (c.with_ids ? " ids" : "") + " scale " + std::to_string(c.scale) + " offset " + std::to_string(c.offset);
}

void check_case(const Case& c) {
  constexpr int64_t kTableRows = 37;
  std::mt19937 random(static_cast<unsigned>(c.rows * 1000 + c.width));
  const int64_t stride = c.width + c.extra_stride;
  Buffer table(c.dtype, kTableRows * stride, c.offset), out(c.dtype, c.rows * c.width);
  table.fill_random(random);
  checks::Vector<int64_t> ids(kTableRows), source(c.rows);
  for (int64_t& id : ids) id = static_cast<int64_t>(random() % kTableRows);
  for (int64_t& from : source) from = static_cast<int64_t>(random() % kTableRows);
  if (c.stray_ids) {
    ids[3] = -5;
    ids[4] = kTableRows;
    source[0] = 3;
    if (c.rows > 1) source[1] = 4;
  }
  std::vector<float> expected;
  for (int64_t row = 0; row < c.rows; ++row) {
    const int64_t from = c.with_ids ? std::clamp<int64_t>(ids[source[row]], 0, kTableRows - 1) : source[row];
    for (int64_t i = 0; i < c.width; ++i) {
      expected.push_back(checks::round_to(c.dtype, table.get(from * stride + i) * c.scale));
    }
  }
  checks::Vector<int32_t> bad_id(1, 0);
  cuda::launch_embed({.dtype = c.dtype,
                      .rows = c.rows,
                      .width = c.width,
                      .vocab_size = c.with_ids ? kTableRows : 0,
                      .ids = c.with_ids ? ids.data() : nullptr,
                      .row_source = source.data(),
                      .table = table.data(),
                      .table_stride = stride,
                      .out = out.data(),
                      .scale = c.scale},
                     c.width == 19 ? nullptr : bad_id.data(), nullptr);
  checks::finish();
  checks::expect_close(name_of(c), out, expected, 0.0f, 0.0f);
  if (bad_id[0] != (c.stray_ids && c.width != 19)) throw std::runtime_error(name_of(c) + ": bad_id");
}

void run() {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    checks::Turns turns(dtype);
    const auto run_case = [&](const Case& c) {
      if (turns.next()) check_case(c);
    };
    run_case({dtype, 1, 1, true, 0, 0, false});
    run_case({dtype, 2, 19, true, 0, 0, true});  // odd rows, without a flag for bad ids
    run_case({dtype, 9, 96, true, 0, 0, true});
    run_case({dtype, 5, 96, true, 0, 1, false});   // unaligned base
    run_case({dtype, 5, 96, false, 3, 0, false});  // unaligned rows
    run_case({dtype, 5, 96, false, 16, 0, false});
    run_case({dtype, 129, 64, false, 0, 0, false});
    run_case({dtype, 2, 2600, true, 0, 0, true});
    run_case({dtype, 1, 10000, true, 0, 0, false});  // more than one step of a block
    run_case({dtype, 0, 96, true, 0, 0, false});
    run_case({dtype, 2, 19, true, 0, 0, true, 9.8125f});
    run_case({dtype, 9, 96, true, 0, 0, true, 61.75f});
    run_case({dtype, 5, 96, true, 3, 1, false, 0.5f});
    run_case({dtype, 2, 2600, false, 0, 0, false, 61.75f});
    run_case({dtype, 0, 96, true, 0, 0, false, 2.0f});
  }
}

const checks::Check check("embed", run);

}  // namespace
