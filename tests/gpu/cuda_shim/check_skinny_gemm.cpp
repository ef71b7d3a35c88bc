#include "checks.h"
#include "cuda/kernels.h"

namespace {

using namespace pop;
using checks::Buffer;

// A matrix whose rows have a gap between them, but not after the last one.
struct Matrix {
  Buffer buffer;
  int64_t rows, width, stride;

  Matrix(DType dtype, int64_t rows_, int64_t width_, int64_t gap, int64_t offset)
      : buffer(dtype, rows_ * (width_ + gap), offset), rows(rows_), width(width_), stride(width_ + gap) {}
  void fill(std::mt19937& random) { buffer.fill_random(random); }
};

using Launch = void (*)(const GemmParams*, int64_t, cuda::Stream);

struct Case {
  int64_t m, k;
  std::vector<int64_t> n;  // one product each
  int64_t gap = 0;         // elements between rows
  int64_t offset = 0;      // elements from an aligned base
};

std::string name_of(DType dtype, const Case& c, size_t product) {
  return std::string(checks::name_of(dtype)) + " m=" + std::to_string(c.m) + " n=" + std::to_string(c.n[product]) +
         " k=" + std::to_string(c.k) + " gap=" + std::to_string(c.gap) + " offset=" + std::to_string(c.offset);
}

GemmParams params_of(const Matrix& a, const Matrix& w, Matrix& out, int64_t rows) {
  return {.dtype = a.buffer.dtype(),
          .m = rows,
          .n = w.rows,
          .k = w.width,
          .a = a.buffer.data(),
          .a_stride = a.stride,
          .w = w.buffer.data(),
          .w_stride = w.stride,
          .out = out.buffer.data(),
          .out_stride = out.stride};
}

void expect_product(const std::string& what, const Matrix& a, const Matrix& w, const Matrix& out) {
  std::vector<float> expected(out.buffer.count(), Buffer::kSentinel);
  for (int64_t row = 0; row < a.rows; ++row) {
    for (int64_t column = 0; column < w.rows; ++column) {
      double sum = 0.0;
      for (int64_t i = 0; i < a.width; ++i) {
        sum += static_cast<double>(a.buffer.get(row * a.stride + i)) * w.buffer.get(column * w.stride + i);
      }
      expected[row * out.stride + column] = static_cast<float>(sum);
    }
  }
  checks::expect_close(what, out.buffer, expected, 1e-4f, checks::rounding(a.buffer.dtype()));
}

// The bits of a row are the same as if it were the only row.
void expect_alone_the_same(Launch launch, const std::string& what, const Matrix& a, const Matrix& w,
                           const Matrix& out) {
  for (const int64_t row : {int64_t{0}, a.rows - 1}) {
    Matrix alone(a.buffer.dtype(), 1, w.rows, 0, 0);
    GemmParams p = params_of(a, w, alone, 1);
    p.a = a.buffer.at(row * a.stride);
    launch(&p, 1, nullptr);
    checks::finish();
    for (int64_t column = 0; column < w.rows; ++column) {
      if (alone.buffer.get(column) == out.buffer.get(row * out.stride + column)) continue;
      throw std::runtime_error(what + ": row " + std::to_string(row) + " depends on the rows beside it");
    }
  }
}

void run_case(Launch launch, DType dtype, const Case& c) {
  std::mt19937 random(7);
  Matrix a(dtype, c.m, c.k, c.gap, c.offset);
  a.fill(random);
  std::vector<Matrix> w, out;
  for (const int64_t n : c.n) {
    w.emplace_back(dtype, n, c.k, c.gap, c.offset).fill(random);
    out.emplace_back(dtype, c.m, n, c.gap, c.offset);
  }
  std::vector<GemmParams> products;
  for (size_t i = 0; i < c.n.size(); ++i) products.push_back(params_of(a, w[i], out[i], c.m));
  launch(products.data(), static_cast<int64_t>(products.size()), nullptr);
  checks::finish();
  for (size_t i = 0; i < c.n.size(); ++i) {
    expect_product(name_of(dtype, c, i), a, w[i], out[i]);
    if (c.m > 1 && !checks::kRaces) expect_alone_the_same(launch, name_of(dtype, c, i), a, w[i], out[i]);
  }
}

void run() {
  const std::vector<Case> cases = {
      {.m = 1, .k = 96, .n = {1}},
      {.m = 1, .k = 1, .n = {19}},
      {.m = 1, .k = 19, .n = {3}},
      {.m = 1, .k = 500, .n = {37}, .gap = 3},
      {.m = 1, .k = 4096, .n = {19}},           // four warps share the columns
      {.m = 2, .k = 1032, .n = {9}, .gap = 8},  // two warps share, and their last step is not full
      {.m = 3, .k = 129, .n = {17}, .offset = 1},
      {.m = 4, .k = 264, .n = {16}},
      {.m = 7, .k = 500, .n = {33}, .gap = 4},       // 16-byte rows in fp32 only
      {.m = 8, .k = 512, .n = {31, 5, 6}},           // q, k and v
      {.m = 9, .k = 2056, .n = {7, 20}, .gap = 16},  // two tiles of rows; gate and up
      {.m = 17, .k = 96, .n = {19}},
      {.m = 64, .k = 40, .n = {13}},
      {.m = 5, .k = 64, .n = {12}, .gap = 8, .offset = 1},  // rows are whole packs, but the base is not aligned
      {.m = 3, .k = 0, .n = {5}},
  };
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    checks::Turns turns(dtype);
    for (const Case& c : cases) {
      if (turns.next()) run_case(cuda::launch_skinny_gemm, dtype, c);
    }
  }
}

// Products of different m and k, one of them empty, and no product at all.
void run_mixed() {
  std::mt19937 random(3);
  Matrix a(DType::bf16, 6, 128, 0, 0), b(DType::bf16, 2, 64, 0, 0);
  Matrix w(DType::bf16, 10, 128, 0, 0), x(DType::bf16, 5, 64, 0, 0);
  Matrix out(DType::bf16, 6, 10, 0, 0), out_b(DType::bf16, 2, 5, 0, 0), none(DType::bf16, 6, 10, 0, 0);
  for (Matrix* matrix : {&a, &b, &w, &x}) matrix->fill(random);
  const GemmParams products[] = {params_of(a, w, out, 6), params_of(a, w, none, 0), params_of(b, x, out_b, 2)};
  cuda::launch_skinny_gemm(products, 3, nullptr);
  cuda::launch_skinny_gemm(products, 0, nullptr);
  checks::finish();
  expect_product("first product", a, w, out);
  expect_product("third product", b, x, out_b);
  checks::expect_close("empty product", none.buffer, std::vector<float>(60, Buffer::kSentinel), 0, 0);
}

// On the tensor cores: rows of 16 bits and multiples of 8 elements.
void run_mma() {
  const std::vector<Case> cases = {
      {.m = 2, .k = 8, .n = {1}},
      {.m = 1, .k = 72, .n = {33}, .gap = 8},     // a second step with one piece, not full
      {.m = 8, .k = 520, .n = {31, 5, 6}},        // q, k and v; two warps share columns
      {.m = 7, .k = 2056, .n = {40}, .gap = 16},  // eight share, and some have one step less
      {.m = 9, .k = 1032, .n = {300, 20}},        // gate and up; four share, and several blocks
      {.m = 17, .k = 104, .n = {65}, .gap = 8},
      {.m = 31, .k = 512, .n = {64}},
      {.m = 33, .k = 64, .n = {19}},
      {.m = 64, .k = 136, .n = {290}},  // two blocks, one warp for its columns
      {.m = 64, .k = 1024, .n = {32}},
      {.m = 3, .k = 0, .n = {5}},
      {.m = 0, .k = 64, .n = {5}},
  };
  for (const DType dtype : {DType::bf16, DType::f16}) {
    checks::Turns turns(dtype);
    for (const Case& c : cases) {
      // The emulated product has twelve barriers: under ThreadSanitizer the long cases would take minutes.
      if (checks::kRaces && (c.k > 600 || c.n[0] > 100)) continue;
      if (turns.next()) run_case(cuda::launch_skinny_mma, dtype, c);
    }
  }
}

void run_mma_refusals() {
  Matrix a(DType::bf16, 2, 64, 0, 0), w(DType::bf16, 3, 64, 0, 0), out(DType::bf16, 2, 3, 0, 0);
  const GemmParams right = params_of(a, w, out, 2);
  const auto expect = [](const char* what, bool fits, const GemmParams& p) {
    if (cuda::skinny_mma_fits(p) != fits) throw std::runtime_error(std::string("skinny_mma_fits: ") + what);
  };
  const auto changed = [&](auto change) {
    GemmParams p = right;
    change(p);
    return p;
  };
  expect("right", true, right);
  expect("float32", false, changed([](GemmParams& p) { p.dtype = DType::f32; }));
  expect("65 rows", false, changed([](GemmParams& p) { p.m = 65; }));
  expect("k", false, changed([](GemmParams& p) { p.k = 60; }));
  expect("base of a", false, changed([&](GemmParams& p) { p.a = a.buffer.at(1); }));
  expect("base of w", false, changed([&](GemmParams& p) { p.w = w.buffer.at(4); }));
  expect("stride of a", false, changed([](GemmParams& p) { p.a_stride = 68; }));
  expect("stride of w", false, changed([](GemmParams& p) { p.w_stride = 65; }));
}

const checks::Check check("skinny_gemm", run);
const checks::Check check_mma("skinny_mma", run_mma);
const checks::Check check_mma_refusals("skinny_mma refusals", run_mma_refusals);
const checks::Check check_mixed("skinny_gemm of mixed products", run_mixed);

}  // namespace
