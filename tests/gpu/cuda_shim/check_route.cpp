#include <algorithm>
#include <numeric>

#include "checks.h"
#include "cuda/kernels.h"

namespace {

using namespace pop;
using checks::Buffer;

void expect(bool ok, const std::string& what) {
  if (!ok) throw std::runtime_error(what);
}

void run_route(DType dtype, int64_t rows, int64_t experts, int64_t per_row, bool normalise, bool ties,
               bool has_bias = false) {
  const std::string name = "route " + checks::name_of(dtype) + " " + std::to_string(rows) + "x" +
                           std::to_string(experts) + " " + std::to_string(per_row) + (normalise ? " normalise" : "") +
                           (ties ? " ties" : "") + (has_bias ? " bias" : "");
  std::mt19937 random(static_cast<unsigned>(rows * 31 + experts));
  Buffer logits(dtype, rows * experts), bias(dtype, experts);
  logits.fill_random(random, 2.0f);
  bias.fill_random(random, 2.0f);
  if (ties) {
    for (int64_t i = 0; i < logits.count(); ++i) logits.set(i, std::round(logits.get(i)));
  }
  checks::Vector<int32_t> expert(rows * per_row + 1, -7);
  Buffer weight(DType::f32, rows * per_row);
  cuda::launch_route({.dtype = dtype,
                      .rows = rows,
                      .experts = experts,
                      .experts_per_row = per_row,
                      .normalise = normalise,
                      .logits = logits.data(),
                      .logit_bias = has_bias ? bias.data() : nullptr,
                      .expert = expert.data(),
                      .weight = static_cast<float*>(weight.data())},
                     nullptr);
  checks::finish();
  std::vector<float> expected;
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<int32_t> order(experts);
    std::iota(order.begin(), order.end(), 0);
    const auto logit = [&](int32_t e) {
      return double(logits.get(row * experts + e) + (has_bias ? bias.get(e) : 0.0f));
    };
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logit(a) > logit(b); });
    double all = 0, chosen = 0;
    for (int32_t e = 0; e < experts; ++e) all += std::exp(logit(e));
    for (int64_t j = 0; j < per_row; ++j) chosen += std::exp(logit(order[j]));
    for (int64_t j = 0; j < per_row; ++j) {
      expect(expert[row * per_row + j] == order[j], name + ": expert of row " + std::to_string(row));
      expected.push_back(static_cast<float>(std::exp(logit(order[j])) / (normalise ? chosen : all)));
    }
  }
  expect(expert.back() == -7, name + ": wrote past the experts");
  checks::expect_close(name, weight, expected, 1e-7f, 1e-5f);
}

// A router of sigmoids; with `bias`, every third expert is preferred, without a share in its weight. A logit of a tie
// has the lower expert first.
void run_route_of_sigmoids(DType dtype, int64_t experts, int64_t per_row, bool normalise, bool with_bias) {
  constexpr int64_t kRows = 9;
  constexpr float kEps = 0.25f, kScale = 1.7f;
  const std::string name = "route sigmoid " + checks::name_of(dtype) + " " + std::to_string(experts) + " " +
                           std::to_string(per_row) + (normalise ? " normalise" : "") + (with_bias ? " bias" : "");
  std::mt19937 random(static_cast<unsigned>(experts));
  Buffer logits(dtype, kRows * experts), bias(dtype, experts), weight(DType::f32, kRows * per_row);
  logits.fill_random(random, 2.0f);
  for (int64_t i = 0; i < logits.count(); ++i) logits.set(i, std::round(logits.get(i) * 2.0f) / 2.0f);
  for (int64_t e = 0; e < experts; ++e) bias.set(e, e % 3 == 0 ? 2.0f : 0.0f);
  checks::Vector<int32_t> expert(kRows * per_row + 1, -7);
  cuda::launch_route({.dtype = dtype,
                      .rows = kRows,
                      .experts = experts,
                      .experts_per_row = per_row,
                      .scores = RouterScores::sigmoid,
                      .normalise = normalise,
                      .norm_eps = kEps,
                      .scale = kScale,
                      .bias = with_bias ? bias.data() : nullptr,
                      .logits = logits.data(),
                      .expert = expert.data(),
                      .weight = static_cast<float*>(weight.data())},
                     nullptr);
  checks::finish();
  std::vector<float> expected;
  for (int64_t row = 0; row < kRows; ++row) {
    const auto score = [&](int32_t e) { return 1.0 / (1.0 + std::exp(-double{logits.get(row * experts + e)})); };
    const auto key = [&](int32_t e) { return score(e) + (with_bias ? bias.get(e) : 0.0f); };
    std::vector<int32_t> order(experts);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return key(a) > key(b); });
    double chosen = kEps;
    for (int64_t j = 0; j < per_row; ++j) chosen += score(order[j]);
    for (int64_t j = 0; j < per_row; ++j) {
      expect(expert[row * per_row + j] == order[j], name + ": expert of row " + std::to_string(row));
      expected.push_back(static_cast<float>(kScale * score(order[j]) / (normalise ? chosen : 1.0)));
    }
  }
  expect(expert.back() == -7, name + ": wrote past the experts");
  checks::expect_close(name, weight, expected, 1e-7f, 1e-5f);
}

void run_to_float32(DType dtype, int64_t rows, int64_t width, int64_t extra_stride) {
  const std::string name = "to_float32 " + checks::name_of(dtype) + " " + std::to_string(rows) + "x" +
                           std::to_string(width) + " stride +" + std::to_string(extra_stride);
  std::mt19937 random(static_cast<unsigned>(rows + width));
  const int64_t stride = width + extra_stride;
  Buffer x(dtype, rows * stride), out(DType::f32, rows * width);
  x.fill_random(random);
  cuda::launch_to_float32({.dtype = dtype,
                           .rows = rows,
                           .width = width,
                           .x = x.data(),
                           .x_stride = stride,
                           .out = static_cast<float*>(out.data())},
                          nullptr);
  checks::finish();
  for (int64_t i = 0; i < rows * width; ++i) {
    expect(out.get(i) == x.get(i / width * stride + i % width), name + ": element " + std::to_string(i));
  }
}

// A NaN reaches every weight of its row and of no other row, and the expert indices stay valid.
void run_route_of_nan(RouterScores scores, bool normalise) {
  constexpr int64_t kExperts = 5, kPerRow = 4;
  Buffer logits(DType::f32, 2 * kExperts), weight(DType::f32, 2 * kPerRow);
  for (int64_t i = 0; i < logits.count(); ++i) logits.set(i, i % 3 == 0 && i < kExperts ? NAN : 1.0f);
  checks::Vector<int32_t> expert(2 * kPerRow, -7);
  cuda::launch_route({.dtype = DType::f32,
                      .rows = 2,
                      .experts = kExperts,
                      .experts_per_row = kPerRow,
                      .scores = scores,
                      .normalise = normalise,
                      .logits = logits.data(),
                      .expert = expert.data(),
                      .weight = static_cast<float*>(weight.data())},
                     nullptr);
  checks::finish();
  for (int64_t i = 0; i < 2 * kPerRow; ++i) {
    expect(expert[i] >= 0 && expert[i] < kExperts, "route NaN: expert");
    expect(std::isnan(weight.get(i)) == (i < kPerRow), "route NaN: weight");
  }
}

void run_group(int64_t rows, int64_t experts, int64_t per_row) {
  const std::string name = "group_rows " + std::to_string(rows) + "x" + std::to_string(experts);
  std::mt19937 random(static_cast<unsigned>(rows + experts));
  const int64_t pairs = rows * per_row;
  checks::Vector<int32_t> expert(pairs), place(pairs + 1, -7);
  checks::Vector<int64_t> row(pairs + 1, -7), begin(experts + 2, -7);
  // Some experts are not chosen by any row, among them the last one.
  for (int32_t& e : expert) e = static_cast<int32_t>(random() % (experts > 2 ? experts - 1 : experts) / 2 * 2);
  cuda::launch_group_rows({.rows = rows,
                           .experts = experts,
                           .experts_per_row = per_row,
                           .expert = expert.data(),
                           .place = place.data(),
                           .row = row.data(),
                           .begin = begin.data(),
                           .host_begin = nullptr},
                          nullptr);
  checks::finish();
  int64_t next = 0;
  for (int64_t e = 0; e < experts; ++e) {
    expect(begin[e] == next, name + ": begin");
    for (int64_t i = 0; i < pairs; ++i) {
      if (expert[i] != e) continue;
      expect(place[i] == next, name + ": place");
      expect(row[next++] == i / per_row, name + ": row");
    }
  }
  expect(begin[experts] == pairs, name + ": number of pairs");
  expect(place.back() == -7 && row.back() == -7 && begin.back() == -7, name + ": wrote past its tables");
}

// `out` holds the output of a shared expert if there is one.
void run_combine(DType dtype, int64_t rows, int64_t width, int64_t per_row, int64_t extra_stride, bool shared = false,
                 bool gate = false, bool has_bias = false) {
  constexpr int64_t kExperts = 5;
  const std::string name = "combine_rows " + checks::name_of(dtype) + " " + std::to_string(rows) + "x" +
                           std::to_string(width) + " stride +" + std::to_string(extra_stride) +
                           (shared ? " shared" : "") + (gate ? " gate" : "") + (has_bias ? " bias" : "");
  std::mt19937 random(static_cast<unsigned>(rows * 7 + width));
  const int64_t pairs = rows * per_row, stride = width + extra_stride;
  Buffer x(dtype, pairs * width), out(dtype, rows * stride), gates(dtype, rows), bias(dtype, kExperts * stride);
  x.fill_random(random);
  gates.fill_random(random, 2.0f);
  bias.fill_random(random);
  if (shared) out.fill_random(random);
  checks::Vector<int32_t> place(pairs), expert(pairs);
  for (int32_t& e : expert) e = static_cast<int32_t>(random() % kExperts);
  std::iota(place.begin(), place.end(), 0);
  std::shuffle(place.begin(), place.end(), random);
  checks::Vector<float> weight(pairs);
  std::vector<float> expected(out.count());
  for (int64_t i = 0; i < out.count(); ++i) expected[i] = out.get(i);
  for (float& w : weight) w = std::uniform_real_distribution<float>(0.0f, 1.0f)(random);
  cuda::launch_combine_rows({.dtype = dtype,
                             .rows = rows,
                             .width = width,
                             .experts_per_row = per_row,
                             .x = x.data(),
                             .place = place.data(),
                             .weight = weight.data(),
                             .bias = has_bias ? bias.data() : nullptr,
                             .bias_stride = stride,
                             .expert = has_bias ? expert.data() : nullptr,
                             .out = out.data(),
                             .out_stride = stride,
                             .shared = shared ? out.data() : nullptr,
                             .shared_gate = gate ? gates.data() : nullptr},
                            nullptr);
  checks::finish();
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < width; ++i) {
      const double factor = gate ? 1.0 / (1.0 + std::exp(-double{gates.get(row)})) : 1.0;
      double sum = shared ? factor * expected[row * stride + i] : 0.0;
      for (int64_t j = row * per_row; j < (row + 1) * per_row; ++j) {
        const double added = has_bias ? bias.get(expert[j] * stride + i) : 0.0;
        sum += weight[j] * (x.get(place[j] * width + i) + added);
      }
      expected[row * stride + i] = static_cast<float>(sum);
    }
  }
  checks::expect_close(name, out, expected, 1e-5f, checks::rounding(dtype) / 2 + 1e-5f);
}

void run() {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    if (checks::kRaces && dtype != DType::bf16) continue;
    run_route(dtype, 9, 8, 2, false, false);  // more rows than one block
    run_route(dtype, 2, 128, 8, true, true);
    run_combine(dtype, 3, 96, 2, 0);
    run_combine(dtype, 2, 2104, 3, 8);  // several blocks per row
    run_combine(dtype, 5, 19, 1, 3);
    run_combine(dtype, 3, 96, 2, 8, true);
    run_combine(dtype, 2, 2104, 3, 0, true, true);
    run_combine(dtype, 5, 19, 1, 3, true, true);
    run_route_of_sigmoids(dtype, 8, 3, true, true);
    run_to_float32(dtype, 3, 96, 8);
    run_to_float32(dtype, 2, 2104, 0);
    run_to_float32(dtype, 5, 19, 3);
    run_to_float32(dtype, 0, 96, 0);
    run_combine(dtype, 0, 96, 2, 0);
    run_route(dtype, 3, 33, 4, true, false, true);
    run_combine(dtype, 3, 96, 2, 0, false, false, true);
    run_combine(dtype, 2, 19, 4, 3, true, true, true);
  }
  run_route(DType::f32, 2, 33, 33, true, false);  // all of them
  run_route(DType::f32, 2, 33, 4, false, true);
  run_route(DType::f32, 1, 1, 1, true, false);
  run_route(DType::f32, 0, 8, 2, true, false);
  run_route_of_sigmoids(DType::f32, 129, 8, false, true);
  run_route_of_sigmoids(DType::f32, 33, 33, true, false);
  run_route_of_sigmoids(DType::f32, 64, 1, false, false);
  for (const bool normalise : {false, true}) {
    run_route_of_nan(RouterScores::softmax, normalise);
    run_route_of_nan(RouterScores::sigmoid, normalise);
  }
  run_group(1, 4, 2);
  run_group(19, 8, 3);
  run_group(300, 5, 4);  // more pairs than threads
  run_group(7, 1, 1);
}

const checks::Check check("route", run);

}  // namespace
