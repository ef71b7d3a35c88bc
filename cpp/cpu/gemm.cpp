// Who computes a product is decided by processor, dtype and shape alone, so that the same call gives the
// same bits. What was measured, and what was tried beside it, is in docs/cpu.md.
#include "cpu/gemm.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "torch/aten.h"

namespace pop::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Up to so many rows skinny_gemm is used. Measured on two cores of a Zen 4 with K and N of 2048 and
// 8192: it streams w at the speed of memory up to 6 rows and stays ahead of oneDNN (bfloat16, 4x at
// one row, 1.1x at 48) and of MKL (float32, 2x at one row, 1.1x at 64), which pack their operands.
constexpr int64_t kSkinnyRows = 48;
constexpr int64_t kSkinnyRowsFloat32 = 64;

// A product in blocks holds at once so many bytes of a, widened; of each thread so many columns of w, of which
// so many elements are widened; and their sums. The columns of a block were measured on a Zen 3 with K of 2048
// and 8192: the library packs all of a for each block, which asks for wide ones, and w should still be in the
// cache when it is read.
constexpr int64_t kBytesOfA = 32 << 20, kMostRows = 2048;
constexpr int64_t kMostColumns = 384, kMostElements = 2048;
constexpr int64_t kFewRows = 128, kMostColumnsForFewRows = 192;
constexpr int64_t kFewestColumns = 64, kColumnsTogether = 16;
constexpr int64_t kRowsTogether = 512;

const torch::stable::Device kCpu(torch::headeronly::DeviceType::CPU);

// Does the library's GEMM of this dtype fall back to a plain loop on this processor?
bool widen_first(DType dtype) {
#if defined(__x86_64__)
  static const bool avx512 =
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return dtype == DType::f16 || (dtype == DType::bf16 && !avx512);
#else
  return dtype == DType::f16;
#endif
}

// On AMD's processors MKL loses up to half of its speed where w has many rows, and none in blocks of them.
std::atomic<int64_t>& gemm_blocks() {
#if defined(__x86_64__)
  static std::atomic<int64_t> wanted{__builtin_cpu_is("amd") ? 1 : 0};
#else
  static std::atomic<int64_t> wanted{0};
#endif
  return wanted;
}

Tensor as_float32(const Tensor& tensor) { return torch::stable::to(tensor, ScalarType::Float); }

Tensor view(DType dtype, const void* base, int64_t row, int64_t column, int64_t rows, int64_t columns, int64_t stride) {
  char* data = static_cast<char*>(const_cast<void*>(base)) + (row * stride + column) * element_size(dtype);
  return torch::stable::from_blob(data, {rows, columns}, {stride, 1}, kCpu, aten::scalar_type(dtype));
}

// Rows of an operand, or of each a part of its K, in float32; 8-bit ones times their scale.
Tensor widened(DType dtype, const void* base, const float* scale, int64_t row, int64_t rows, int64_t column,
               int64_t columns, int64_t stride) {
  if (scale == nullptr) return as_float32(view(dtype, base, row, column, rows, columns, stride));
  auto* data = static_cast<uint8_t*>(const_cast<void*>(base)) + row * stride + column;
  const auto e4m3 = ScalarType::Float8_e4m3fn;
  const Tensor values = as_float32(torch::stable::from_blob(data, {rows, columns}, {stride, 1}, kCpu, e4m3));
  float* scales = const_cast<float*>(scale) + row;
  return aten::mul(values, torch::stable::from_blob(scales, {rows, 1}, {1, 1}, kCpu, ScalarType::Float));
}

bool is_widened(const GemmParams& p) { return p.dtype != DType::f32 || p.a_scale != nullptr; }

// Columns of a block: of about equal blocks, as many for each thread.
int64_t block_columns(const GemmParams& p) {
  const int64_t most = p.m <= kFewRows ? kMostColumnsForFewRows : kMostColumns;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t blocks = ceil_div(ceil_div(p.n, most), threads) * threads;
  return ceil_div(std::max(kFewestColumns, ceil_div(p.n, blocks)), kColumnsTogether) * kColumnsTogether;
}

// a [rows, K], float32, of which w takes the elements from `k` on; into sums [rows, columns], or added to them. A part
// of the rows at a time, since the library packs them.
void product(Tensor a, int64_t k, const Tensor& w, Tensor sums) {
  const Tensor w_transposed = torch::stable::transpose(w, 0, 1);
  const int64_t rows = a.size(0), columns = w.size(0), part = ceil_div(rows, ceil_div(rows, kRowsTogether));
  for (int64_t begin = 0; begin < rows; begin += part) {
    const int64_t count = std::min(part, rows - begin);
    Tensor a_rows = torch::stable::narrow(a, 0, begin, count);
    const Tensor a_part = torch::stable::narrow(a_rows, 1, k, w.size(1));
    const Tensor sums_part = torch::stable::narrow(sums, 0, begin, count);
    if (k == 0) {
      aten::mm_out(a_part, w_transposed, sums_part);
      continue;
    }
    const Tensor more = torch::stable::empty({count, columns}, ScalarType::Float);
    aten::mm_out(a_part, w_transposed, more);
    const auto* from = static_cast<const float*>(more.data_ptr());
    auto* to = static_cast<float*>(sums_part.data_ptr());
    for (int64_t i = 0; i < count * columns; ++i) to[i] += from[i];
  }
}

// Rows [m, m + rows) and columns [n, n + columns) of out.
void block(const GemmParams& p, Tensor a, int64_t m, int64_t rows, int64_t n, int64_t columns) {
  Tensor out = view(p.dtype, p.out, m, n, rows, columns, p.out_stride);
  if (!is_widened(p)) return product(a, 0, view(p.dtype, p.w, n, 0, columns, p.k, p.w_stride), out);
  const Tensor sums = torch::stable::empty({rows, columns}, ScalarType::Float);
  const int64_t part = ceil_div(p.k, ceil_div(p.k, kMostElements));
  for (int64_t k = 0; k < p.k; k += part) {
    product(a, k, widened(p.dtype, p.w, p.w_scale, n, columns, k, std::min(part, p.k - k), p.w_stride), sums);
  }
  torch::stable::copy_(out, sums);
}

// The GEMM in float32 by aten, rounded once: a block of columns is one thread's, from the widening of
// its rows of w to its part of out. In 16 bits that is several times the speed of a plain loop.
void gemm_in_blocks(const GemmParams& p) {
  const int64_t fitting = kBytesOfA / (p.k * static_cast<int64_t>(sizeof(float)));
  const int64_t block_rows = is_widened(p) ? std::clamp<int64_t>(fitting, 1, kMostRows) : p.m;
  const int64_t columns = block_columns(p);
  for (int64_t m = 0; m < p.m; m += block_rows) {
    const int64_t rows = std::min(block_rows, p.m - m);
    const Tensor a = widened(p.dtype, p.a, p.a_scale, m, rows, 0, p.k, p.a_stride);
    over_tasks(ceil_div(p.n, columns),
               [&](int64_t i, int64_t) { block(p, a, m, rows, i * columns, std::min(columns, p.n - i * columns)); });
  }
}

}  // namespace

void gemm(const GemmParams& p) {
  if (p.m == 0 || p.n == 0) return;
  if (p.a_scale != nullptr) {
    gemm_in_blocks(p);
  } else if (p.m <= (p.dtype == DType::f32 ? kSkinnyRowsFloat32 : kSkinnyRows)) {
    const int64_t grain = std::max<int64_t>(4, kGrainElements / std::max<int64_t>(1, p.k));
    torch::stable::parallel_for(0, p.n, grain,
                                [&](int64_t begin, int64_t end) { kernels().skinny_gemm(p, begin, end); });
  } else if (widen_first(p.dtype) || (p.dtype == DType::f32 && gemm_blocks() != 0)) {
    gemm_in_blocks(p);
  } else {
    aten::matmul_nt(p, kCpu);
  }
}

int64_t set_gemm_blocks(int64_t value) { return gemm_blocks().exchange(value != 0); }

}  // namespace pop::cpu
