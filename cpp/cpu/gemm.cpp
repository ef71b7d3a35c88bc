// Who computes a product is decided by processor, dtype and shape alone, so that the same call gives the
// same bits. What was measured, and what was tried beside it, is in docs/cpu.md.
#include "cpu/gemm.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/prepacked.h"
#include "torch/aten.h"

namespace pop::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Up to so many rows skinny_gemm is used. Measured with K and N of 2048 and 8192: on two cores of a Zen 4 it streams w
// at the speed of memory up to 6 rows and stays ahead of whole products by oneDNN (bfloat16, 4x at one row, 1.1x at 48)
// and by MKL (float32, 2x at one row, 1.1x at 64), which pack their operands; on two of a Zen 5 ahead of oneDNN up to
// 24 rows, equal at 32 and 1.2x behind at 48, equal to products of prepacked weights from 8 to 16; on two of a Zen 3
// ahead of blocks up to 24 rows of float32 and 32 of bfloat16, and of 64 rows 1.4x and 1.2x behind.
constexpr int64_t kSkinnyRows = 32;  // of 16 bits
constexpr int64_t kSkinnyRowsBeforePacked = 12;
constexpr int64_t kSkinnyRowsFloat32 = 64, kSkinnyRowsFloat32BeforeBlocks = 24;

// A product in blocks holds at once so many bytes of a, widened; of each thread so many columns of w, of which
// so many elements are widened; and their sums. The columns of a block were measured on a Zen 3 with K of 2048
// and 8192: the library packs all of a for each block, which asks for wide ones, and w should still be in the
// cache when it is read.
constexpr int64_t kBytesOfA = 32 << 20, kMostRows = 2048;
constexpr int64_t kMostColumns = 384, kMostElements = 2048;
constexpr int64_t kFewRows = 128, kMostColumnsForFewRows = 192;
constexpr int64_t kFewestColumns = 64, kColumnsTogether = 16, kElementsTogether = 16;
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

Tensor view(DType dtype, const void* base, int64_t row, int64_t column, int64_t rows, int64_t columns, int64_t stride) {
  const char* data = static_cast<const char*>(base) + (row * stride + column) * element_size(dtype);
  return aten::host_matrix(dtype, data, rows, columns, stride);
}

Tensor matrix(float* data, int64_t rows, int64_t columns) {
  return view(DType::f32, data, 0, 0, rows, columns, columns);
}

// Of an operand these rows and columns in float32, to `out`; 8-bit ones times the scale of their row.
void widen(DType dtype, const void* base, const float* scale, int64_t row, int64_t column, int64_t rows,
           int64_t columns, int64_t stride, float* out) {
  Tensor to = matrix(out, rows, columns);
  if (scale == nullptr) {
    torch::stable::copy_(to, view(dtype, base, row, column, rows, columns, stride));
    return;
  }
  auto* data = static_cast<uint8_t*>(const_cast<void*>(base)) + row * stride + column;
  torch::stable::copy_(to,
                       torch::stable::from_blob(data, {rows, columns}, {stride, 1}, kCpu, ScalarType::Float8_e4m3fn));
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrainElements / columns), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t c = 0; c < columns; ++c) out[r * columns + c] *= scale[row + r];
    }
  });
}

// How a product is cut into blocks, one of which is one thread's at a time.
struct Blocks {
  bool widens;
  int64_t rows, columns;  // of a block
  int64_t elements;       // of a row of w, widened at a time

  int64_t scratch() const {  // floats of a thread
    return widens ? columns * elements + (rows + std::min(rows, kRowsTogether)) * columns : 0;
  }
};

Blocks blocks_of(const GemmParams& p) {
  // Of about equal columns, and as many blocks for each thread.
  const int64_t most = p.m <= kFewRows ? kMostColumnsForFewRows : kMostColumns;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t count = ceil_div(ceil_div(p.n, most), threads) * threads;
  const int64_t columns = std::max(kFewestColumns, ceil_div(p.n, count));
  const bool widens = p.dtype != DType::f32 || p.a_scale != nullptr;
  const int64_t fitting = kBytesOfA / (p.k * static_cast<int64_t>(sizeof(float)));
  return {.widens = widens,
          .rows = widens ? std::min(p.m, std::clamp<int64_t>(fitting, 1, kMostRows)) : p.m,
          .columns = ceil_div(columns, kColumnsTogether) * kColumnsTogether,
          .elements = ceil_div(ceil_div(p.k, ceil_div(p.k, kMostElements)), kElementsTogether) * kElementsTogether};
}

// a [rows, K], float32, of which w takes the elements from `k` on; into out [rows, columns], or added to it by way of
// `more`. A part of the rows at a time, since the library packs them.
void product(Tensor a, int64_t k, const Tensor& w, Tensor out, float* more) {
  const Tensor w_transposed = torch::stable::transpose(w, 0, 1);
  const int64_t rows = a.size(0), columns = w.size(0), part = ceil_div(rows, ceil_div(rows, kRowsTogether));
  for (int64_t begin = 0; begin < rows; begin += part) {
    const int64_t count = std::min(part, rows - begin);
    Tensor a_rows = torch::stable::narrow(a, 0, begin, count);
    const Tensor a_part = torch::stable::narrow(a_rows, 1, k, w.size(1));
    const Tensor out_part = torch::stable::narrow(out, 0, begin, count);
    if (k == 0) {
      aten::mm_out(a_part, w_transposed, out_part);
      continue;
    }
    aten::mm_out(a_part, w_transposed, matrix(more, count, columns));
    auto* sums = static_cast<float*>(out_part.data_ptr());
    for (int64_t i = 0; i < count * columns; ++i) sums[i] += more[i];
  }
}

// Rows [m, m + a.size(0)) and columns [n, n + columns) of out.
void block(const GemmParams& p, const Blocks& blocks, const Tensor& a, int64_t m, int64_t n, int64_t columns,
           float* scratch) {
  const int64_t rows = a.size(0);
  Tensor out = view(p.dtype, p.out, m, n, rows, columns, p.out_stride);
  if (!blocks.widens) return product(a, 0, view(p.dtype, p.w, n, 0, columns, p.k, p.w_stride), out, nullptr);
  float* sums = scratch + columns * blocks.elements;
  for (int64_t k = 0; k < p.k; k += blocks.elements) {
    const int64_t elements = std::min(blocks.elements, p.k - k);
    widen(p.dtype, p.w, p.w_scale, n, k, columns, elements, p.w_stride, scratch);
    product(a, k, matrix(scratch, columns, elements), matrix(sums, rows, columns), sums + rows * columns);
  }
  torch::stable::copy_(out, matrix(sums, rows, columns));
}

// The GEMM in float32 by aten, rounded once: a block of columns is one thread's, from the widening of its rows of w to
// its part of out. In 16 bits that is several times the speed of a plain loop. What is widened has memory of the whole
// call: allocated block by block, it comes to twice as much.
void gemm_in_blocks(const GemmParams& p) {
  const Blocks blocks = blocks_of(p);
  const int64_t tasks = ceil_div(p.n, blocks.columns), each = blocks.scratch();
  const Tensor scratch = torch::stable::empty({workers_for(tasks) * each}, ScalarType::Float);
  const Tensor wide = torch::stable::empty({blocks.widens ? blocks.rows * p.k : 0}, ScalarType::Float);
  auto *of_threads = static_cast<float*>(scratch.data_ptr()), *wide_a = static_cast<float*>(wide.data_ptr());
  for (int64_t m = 0; m < p.m; m += blocks.rows) {
    const int64_t rows = std::min(blocks.rows, p.m - m);
    if (blocks.widens) widen(p.dtype, p.a, p.a_scale, m, 0, rows, p.k, p.a_stride, wide_a);
    const Tensor a = blocks.widens ? matrix(wide_a, rows, p.k) : view(p.dtype, p.a, m, 0, rows, p.k, p.a_stride);
    over_tasks(tasks, [&](int64_t i, int64_t worker) {
      const int64_t n = i * blocks.columns;
      block(p, blocks, a, m, n, std::min(blocks.columns, p.n - n), of_threads + worker * each);
    });
  }
}

}  // namespace

void gemm(const GemmParams& p) {
  if (p.m == 0 || p.n == 0) return;
  if (p.a_scale != nullptr) return gemm_in_blocks(p);
  if (p.packed != nullptr && p.m > kSkinnyRowsBeforePacked) return packed_gemm(p);
  const bool float32 = p.dtype == DType::f32;
  const bool in_blocks = widen_first(p.dtype) || (float32 && gemm_blocks() != 0);
  const int64_t float32_rows = in_blocks ? kSkinnyRowsFloat32BeforeBlocks : kSkinnyRowsFloat32;
  if (p.m <= (float32 ? float32_rows : kSkinnyRows)) {
    const int64_t grain = std::max<int64_t>(4, kGrainElements / std::max<int64_t>(1, p.k));
    torch::stable::parallel_for(0, p.n, grain,
                                [&](int64_t begin, int64_t end) { kernels().skinny_gemm(p, begin, end); });
  } else if (in_blocks) {
    gemm_in_blocks(p);
  } else {
    aten::matmul_nt(p, kCpu);
  }
}

// Whole products of bfloat16 with 512 rows leave an intermediate result of 8192 columns in the last-level cache, and
// read their weight at a fraction of memory's speed. What is widened should be widened once for all rows.
int64_t mlp_rows(DType dtype) { return dtype == DType::bf16 && !widen_first(dtype) ? 512 : kMlpChunkRows; }

int64_t set_gemm_blocks(int64_t value) { return gemm_blocks().exchange(value != 0); }

}  // namespace pop::cpu
