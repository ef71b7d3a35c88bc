// Processor, dtype and shape alone decide which kernel computes a product, so that the same call gives the same bits.
// Measurements, and what was tried beside these kernels, are in docs/notes/cpu-products.md.
#include "cpu/gemm.h"

#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

#include "core/math.h"
#include "cpu/int8.h"
#include "cpu/int8_kernels.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace pop::cpu {
namespace {

// The most rows that skinny_gemm computes. Measured with K and N of 2048 and 8192. On two cores of a Zen 4 it streams w
// at the speed of memory up to 6 rows, and stays ahead of whole products by oneDNN (bfloat16, 4x at one row, 1.1x at
// 48) and by MKL (float32, 2x at one row, 1.1x at 64), which pack their operands. On two cores of a Zen 5 it is ahead
// of oneDNN up to 24 rows, equal at 32 and 1.2x behind at 48, and equal to products of prepacked weights from 8 to 16.
// On two cores of a Zen 3 it is ahead of blocks up to 24 rows of float32 and 32 of bfloat16; at 64 rows it is 1.4x
// and 1.2x behind. On AMX, oneDNN's tiles are ahead from 8 rows of bfloat16.
constexpr int64_t kSkinnyRows = 32;  // of 16 bits
constexpr int64_t kSkinnyRowsBeforePacked = 12, kSkinnyRowsBeforeTiles = 6;
constexpr int64_t kSkinnyRowsFloat32 = 64, kSkinnyRowsFloat32BeforeBlocks = 24;

// The size of a block: the columns of out (rows of w), the rows of a that are widened at once, and the elements along k
// that are widened at once. The columns were measured on a Zen 3 with K of 2048 and 8192. The library packs all of a
// for each block, which asks for wide blocks; w should still be in the cache when it is read, which asks for narrow
// ones.
constexpr int64_t kWidenedBytes = 32 << 20, kMostRows = 2048;  // of a
constexpr int64_t kMostColumns = 384, kMostElements = 2048;
constexpr int64_t kFewRows = 128, kMostColumnsForFewRows = 192;
constexpr int64_t kFewestColumns = 64, kColumnMultiple = 16, kElementMultiple = 16;
constexpr int64_t kRowsPerCall = 512;  // rows of a that the library packs at once

// True if the library's GEMM of this dtype is a plain loop on this processor. Operands are then widened to float32.
bool widens_to_float32(DType dtype) {
#if defined(__x86_64__)
  static const bool avx512 =
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return dtype == DType::f16 || (dtype == DType::bf16 && !avx512);
#else
  return dtype == DType::f16;
#endif
}

// With AMX oneDNN reads rows of `a` beyond k, up to a whole row of a tile, and multiplies what is there by zero: NaN
// there, or memory that is not ours, must not reach it.
bool reads_beyond(const GemmParams& p) {
  constexpr int64_t kTileElements = 32;
  return p.dtype == DType::bf16 && p.k % kTileElements != 0 && has_amx();
}

// On AMD's processors MKL loses up to half of its speed if w has many rows, and none in blocks of them. An option of
// the calling thread.
bool& gemm_blocks() {
#if defined(__x86_64__)
  static thread_local bool enabled = __builtin_cpu_is("amd");
#else
  static thread_local bool enabled = false;
#endif
  return enabled;
}

// The most rows that skinny_gemm computes, where what is next is a product in blocks, or the library's.
int64_t skinny_rows(const GemmParams& p, bool in_blocks) {
  if (p.dtype == DType::f32) return in_blocks ? kSkinnyRowsFloat32BeforeBlocks : kSkinnyRowsFloat32;
  const bool tiles = p.dtype == DType::bf16 && !in_blocks && has_amx();
  return tiles ? kSkinnyRowsBeforeTiles : kSkinnyRows;
}

// With AMX oneDNN leaves a product of about 512 columns to one of two threads. Such products are cut here, each slice
// for one thread. With other columns or smaller K slices were no faster, or slower. None is a product that another
// kernel computes (gemm()).
constexpr int64_t kSlicesBeyondRows = 256, kSlicesBeyondColumns = 256, kSlicesUpToColumns = 512, kSlicesFromK = 2048;
constexpr int64_t kSlicesUpToElements = 1 << 20, kFewestSliceColumns = 64;
bool in_slices(const GemmParams& p) {
  return p.dtype == DType::bf16 && has_amx() && p.products == Products::plain && p.packed == nullptr &&
         !p.w_transposed && !reads_beyond(p) && p.m > kSlicesBeyondRows && p.n > kSlicesBeyondColumns &&
         p.n <= kSlicesUpToColumns && p.m * p.n <= kSlicesUpToElements && p.k >= kSlicesFromK;
}

// A matrix in memory; elements in 8 bits have one scale per row.
struct Operand {
  HostMatrix::Type type;
  DType dtype;
  const void* data;
  int64_t stride;
  const float* scale;  // [rows], or [rows, groups], or null
  int64_t group = 0;   // elements of a row that share a scale; 0: all of `width`
  int64_t width = 0;   // of a whole row
};

// Writes rows [row, row + rows) and columns [column, column + columns) of `from` to `out` [rows, columns] as float32;
// elements in 8 bits are multiplied by the scale of their row.
void widen(const Operand& from, int64_t row, int64_t column, int64_t rows, int64_t columns, float* out) {
  const int64_t element = from.scale != nullptr ? 1 : element_size(from.dtype);
  const char* data = static_cast<const char*>(from.data) + (row * from.stride + column) * element;
  convert(
      {.dtype = from.dtype, .data = data, .rows = rows, .columns = columns, .stride = from.stride, .type = from.type},
      {.dtype = DType::f32, .data = out, .rows = rows, .columns = columns, .stride = columns});
  if (from.scale == nullptr) return;
  const int64_t group = from.group == 0 ? column + columns : from.group,
                groups = from.group == 0 ? 1 : from.width / group;
  parallel_for(0, rows, std::max<int64_t>(1, kGrainElements / columns), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* scale = from.scale + (row + r) * groups;
      for (int64_t c = 0; c < columns;) {
        const int64_t g = (column + c) / group, stop = std::min(columns, (g + 1) * group - column);
        for (; c < stop; ++c) out[r * columns + c] *= scale[g];
      }
    }
  });
}

HostMatrix::Type type_of_a(const GemmParams& p) {
  return p.products == Products::fp8 ? HostMatrix::Type::e4m3 : HostMatrix::Type::model;
}

HostMatrix::Type type_of_w(const GemmParams& p) {
  return p.products == Products::int8_weight ? HostMatrix::Type::int8 : type_of_a(p);
}

// How a product is cut into blocks. A block is computed by one thread.
struct Blocks {
  bool widens_a, widens;  // `a`; any operand
  int64_t rows, columns;  // of a block
  int64_t elements;       // along k, widened at a time

  int64_t scratch() const {  // floats per thread: widened w, the sums, and one call's part of the sums
    return widens ? columns * elements + (rows + std::min(rows, kRowsPerCall)) * columns : 0;
  }
};

Blocks blocks_of(const GemmParams& p) {
  // Blocks of about equal width, the same number for each thread.
  const int64_t most = p.m <= kFewRows ? kMostColumnsForFewRows : kMostColumns;
  const int64_t threads = num_threads();
  const int64_t count = round_up(ceil_div(p.n, most), threads);
  const int64_t columns = std::max(kFewestColumns, ceil_div(p.n, count));
  const bool widens_a = p.dtype != DType::f32 || p.a_scale != nullptr, widens = widens_a || p.w_scale != nullptr;
  const int64_t fitting = kWidenedBytes / (p.k * static_cast<int64_t>(sizeof(float)));
  return {.widens_a = widens_a,
          .widens = widens,
          .rows = widens ? std::min(p.m, std::clamp<int64_t>(fitting, 1, kMostRows)) : p.m,
          .columns = round_up(columns, kColumnMultiple),
          .elements = round_up(ceil_div(p.k, ceil_div(p.k, kMostElements)), kElementMultiple)};
}

// out = a . w^T in float32, or out += a . w^T by way of `part` [kRowsPerCall, n] if that is not null. Some rows at a
// time, since the library packs them.
void add_product(const GemmParams& p, float* part) {
  const int64_t rows_at_once = ceil_div(p.m, ceil_div(p.m, kRowsPerCall));
  for (int64_t begin = 0; begin < p.m; begin += rows_at_once) {
    GemmParams some = p;
    some.m = std::min(rows_at_once, p.m - begin);
    some.a = static_cast<const float*>(p.a) + begin * p.a_stride;
    float* out = static_cast<float*>(p.out) + begin * p.out_stride;
    some.out = part == nullptr ? out : part;
    some.out_stride = part == nullptr ? p.out_stride : p.n;
    matmul(some);
    if (part == nullptr) continue;
    for (int64_t row = 0; row < some.m; ++row) {
      for (int64_t i = 0; i < p.n; ++i) out[row * p.out_stride + i] += part[row * p.n + i];
    }
  }
}

// One block: rows [m, m + rows) and columns [n, n + columns) of out. `a` is float32 [rows, k] and starts at row m.
void compute_block(const GemmParams& p, const Blocks& blocks, const float* a, int64_t a_stride, int64_t m, int64_t rows,
                   int64_t n, int64_t columns, float* scratch) {
  const int64_t element = element_size(p.dtype), first = p.w_transposed ? n : n * p.w_stride;
  char* out = static_cast<char*>(p.out) + (m * p.out_stride + n) * element;
  GemmParams product{.dtype = DType::f32,
                     .m = rows,
                     .n = columns,
                     .k = p.k,
                     .a = a,
                     .a_stride = a_stride,
                     .w = static_cast<const char*>(p.w) + first * element,
                     .w_stride = p.w_stride,
                     .out = out,
                     .out_stride = p.out_stride,
                     .w_transposed = p.w_transposed};
  if (!blocks.widens) return add_product(product, nullptr);
  float* sums = scratch + columns * blocks.elements;
  product.w = scratch;
  product.out = sums;
  product.out_stride = columns;
  for (int64_t k = 0; k < p.k; k += blocks.elements) {
    product.k = std::min(blocks.elements, p.k - k);
    product.a = a + k;
    const Operand w{type_of_w(p), p.dtype, p.w, p.w_stride, p.w_scale, p.w_group, p.k};
    if (p.w_transposed) {
      product.w_stride = columns;
      widen(w, k, n, product.k, columns, scratch);
    } else {
      product.w_stride = product.k;
      widen(w, n, k, columns, product.k, scratch);
    }
    add_product(product, k == 0 ? nullptr : sums + rows * columns);
  }
  convert({.dtype = DType::f32, .data = sums, .rows = rows, .columns = columns, .stride = columns},
          {.dtype = p.dtype, .data = out, .rows = rows, .columns = columns, .stride = p.out_stride});
}

// The GEMM in float32, rounded once. One thread computes a block of columns, from widening its rows of w to its part of
// out. In 16 bits that is several times the speed of a plain loop. The widened operands have memory for the whole call:
// allocated block by block it took twice as much.
void gemm_in_blocks(const GemmParams& p) {
  const Blocks blocks = blocks_of(p);
  const int64_t tasks = ceil_div(p.n, blocks.columns), thread_floats = blocks.scratch();
  const Scratch scratch = allocate(workers_for(tasks) * thread_floats * sizeof(float));
  const Scratch widened = allocate(blocks.widens_a ? blocks.rows * p.k * sizeof(float) : 0);
  auto *of_threads = reinterpret_cast<float*>(scratch.get()), *widened_a = reinterpret_cast<float*>(widened.get());
  for (int64_t m = 0; m < p.m; m += blocks.rows) {
    const int64_t rows = std::min(blocks.rows, p.m - m);
    if (blocks.widens_a) widen({type_of_a(p), p.dtype, p.a, p.a_stride, p.a_scale}, m, 0, rows, p.k, widened_a);
    const float* a = blocks.widens_a ? widened_a : static_cast<const float*>(p.a) + m * p.a_stride;
    const int64_t a_stride = blocks.widens_a ? p.k : p.a_stride;
    parallel_tasks(tasks, [&](int64_t i, int64_t worker) {
      const OneMklThread one;
      const int64_t n = i * blocks.columns, columns = std::min(blocks.columns, p.n - n);
      compute_block(p, blocks, a, a_stride, m, rows, n, columns, of_threads + worker * thread_floats);
    });
  }
}

}  // namespace

void gemm(const GemmParams& p) {
  if (p.m == 0 || p.n == 0) return;
  if (p.products == Products::int8) return int8_gemm(p);
  if (p.products == Products::fp8) return gemm_in_blocks(p);
  const bool in_blocks = widens_to_float32(p.dtype) || (p.dtype == DType::f32 && gemm_blocks()) ||
                         p.products == Products::int8_weight || reads_beyond(p);
  const int64_t few = skinny_rows(p, in_blocks);
  if (p.packed != nullptr && !reads_beyond(p) && p.m > std::min(few, kSkinnyRowsBeforePacked)) return packed_matmul(p);
  if (!p.w_transposed && p.m <= few) {
    const int64_t grain = std::max<int64_t>(4, kGrainElements / std::max<int64_t>(1, p.k));
    parallel_for(0, p.n, grain, [&](int64_t begin, int64_t end) { kernels().skinny_gemm(p, begin, end); });
  } else if (in_blocks) {
    gemm_in_blocks(p);
  } else {
    matmul(p);
  }
}

void gemm(const GemmParams* products, int64_t count) {
  int64_t columns = 0;  // of all products in slices
  for (int64_t i = 0; i < count; ++i) {
    if (in_slices(products[i])) {
      columns += products[i].n;
    } else {
      gemm(products[i]);
    }
  }
  if (columns == 0) return;
  const int64_t width = std::max(kFewestSliceColumns, round_up(ceil_div(columns, num_threads()), kColumnMultiple));
  std::vector<GemmParams> slices;
  for (const GemmParams* p = products; p != products + count; ++p) {
    for (int64_t n = 0; in_slices(*p) && n < p->n; n += width) {
      GemmParams slice = *p;
      slice.n = std::min(width, p->n - n);
      slice.w = static_cast<const char*>(p->w) + n * p->w_stride * element_size(p->dtype);
      slice.out = static_cast<char*>(p->out) + n * element_size(p->dtype);
      slices.push_back(slice);
    }
  }
  parallel_tasks(std::ssize(slices), [&](int64_t i, int64_t) { matmul(slices[i]); });
}

// With 512 rows, whole products of bfloat16 leave an intermediate result of 8192 columns in the last-level cache, and
// read their weight at a fraction of memory's speed. So do products of int8, which take so many rows at a time. A
// weight that is widened to float32 should be widened once for all rows.
int64_t mlp_rows(DType dtype, Products products) {
  if (products == Products::int8) return kInt8Rows;
  return dtype == DType::bf16 && !widens_to_float32(dtype) ? 512 : kMlpChunkRows;
}

int64_t set_gemm_blocks(int64_t value) { return std::exchange(gemm_blocks(), value != 0); }

}  // namespace pop::cpu
