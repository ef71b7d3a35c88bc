// out = a . w^T for the few rows of a boundary step. It is bound by the bytes of w, so w is read once, in tiles of
// kTileColumns of its rows against as many rows of a as registers hold, and no operand is packed. Each element has one
// vector accumulator that walks along k, whatever the tile: the result of a row does not depend on the number of rows.
#include "core/math.h"
#include "cpu/row_kernels.h"
#include "cpu/vec.h"

namespace pop::cpu::POP_ISA {
namespace {

constexpr int kTileColumns = 4;
#if defined(__AVX512F__)
constexpr int kTileRows = 6;  // 24 accumulators, 4 operands of w and 1 of a in 32 registers
#else
constexpr int kTileRows = 2;  // 8, 4 and 1 in 16
#endif

constexpr int kIntoL2 = 2;  // locality of __builtin_prefetch; a tile of w and the next may be more than L1 holds

// Loads and multiplies kStep elements along k, of a in T and of w in W.
template <class T, class W>
struct Dot {
  using Operand = Vec;
  static constexpr int kStep = kLanes;
  template <class E>
  static POP_INLINE Operand load_step(const E* from) {
    return load(from);
  }
  template <class E>
  static POP_INLINE Operand load_rest(const E* from, int64_t count) {
    return load_tail(from, count);
  }
  static POP_INLINE void multiply_add(Vec& sum, Operand a, Operand w) { sum += a * w; }
};

#if defined(__AVX512BF16__)
template <>
struct Dot<BFloat16, BFloat16> {
  using Operand = __m512bh;
  static constexpr int kStep = 2 * kLanes;
  static POP_INLINE Operand load_step(const BFloat16* from) { return lane_cast<Operand>(_mm512_loadu_si512(from)); }
  static POP_INLINE Operand load_rest(const BFloat16* from, int64_t count) {
    BFloat16 elements[kStep] = {};
    for (int64_t i = 0; i < count; ++i) elements[i] = from[i];
    return load_step(elements);
  }
  static POP_INLINE void multiply_add(Vec& sum, Operand a, Operand w) { sum = _mm512_dpbf16_ps(sum, a, w); }
};
#endif

// Rows [row, row + Rows) and columns [column, column + Columns) of out. With scales for groups of elements along k, of
// which a step has one, w is multiplied as it is loaded. A row of w is a page or more, at whose end
// hardware prefetchers stop, so the first tile of a column prefetches the next columns.
template <class T, class W, bool Grouped, int Rows, int Columns>
void tile(const GemmParams& p, int64_t row, int64_t column) {
  using D = Dot<T, W>;
  const T* a = static_cast<const T*>(p.a) + row * p.a_stride;
  const W* w = static_cast<const W*>(p.w) + column * p.w_stride;
  Vec sums[Rows][Columns] = {};
  const int group_bits = Grouped ? __builtin_ctzll(p.w_group) : 0;
  const int64_t scale_stride = p.k >> group_bits;
  const float* scales = Grouped ? p.w_scale + column * scale_stride : nullptr;
  int64_t k = 0;
  const auto step = [&](const auto& load_operand) __attribute__((always_inline)) {
    typename D::Operand w_operands[Columns];
    for (int c = 0; c < Columns; ++c) {
      w_operands[c] = load_operand(w + c * p.w_stride);
      if constexpr (Grouped) w_operands[c] *= splat(scales[c * scale_stride + (k >> group_bits)]);
    }
    for (int r = 0; r < Rows; ++r) {
      const auto a_operand = load_operand(a + r * p.a_stride);
      for (int c = 0; c < Columns; ++c) D::multiply_add(sums[r][c], a_operand, w_operands[c]);
    }
  };
  for (; k + D::kStep <= p.k; k += D::kStep) {
    if (row == 0) {
      for (int c = 0; c < Columns; ++c) __builtin_prefetch(w + (c + Columns) * p.w_stride + k, 0, kIntoL2);
    }
    step([&](const auto* from) __attribute__((always_inline)) { return D::load_step(from + k); });
  }
  if (k < p.k) {
    step([&](const auto* from) __attribute__((always_inline)) { return D::load_rest(from + k, p.k - k); });
  }
  T* out = static_cast<T*>(p.out) + row * p.out_stride + column;
  const auto store_sum = [&](int r, int c, float sum) {
    store_one(out + r * p.out_stride + c, p.w_scale == nullptr || Grouped ? sum : sum * p.w_scale[column + c]);
  };
  for (int r = 0; r < Rows; ++r) {
    if constexpr (Columns == 4) {
      const Quad totals = sum_lanes(sums[r]);
      for (int c = 0; c < Columns; ++c) store_sum(r, c, totals[c]);
    } else {
      for (int c = 0; c < Columns; ++c) store_sum(r, c, sum_lanes(sums[r][c]));
    }
  }
}

template <class T, class W, bool Grouped, int Columns, int Rows = kTileRows>
POP_INLINE void tile_of(const GemmParams& p, int64_t rows, int64_t row, int64_t column) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return tile_of<T, W, Grouped, Columns, Rows - 1>(p, rows, row, column);
  }
  tile<T, W, Grouped, Rows, Columns>(p, row, column);
}

// All rows of out, in tiles of nearly equal height.
template <class T, class W, bool Grouped, int Columns>
POP_INLINE void column_tile(const GemmParams& p, int64_t column) {
  const int64_t tiles = ceil_div(p.m, kTileRows);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = p.m * t / tiles;
    tile_of<T, W, Grouped, Columns>(p, p.m * (t + 1) / tiles - row, row, column);
  }
}

template <class T, class W, bool Grouped = false>
void columns(const GemmParams& p, int64_t begin, int64_t end) {
  int64_t column = begin;
  for (; column + kTileColumns <= end; column += kTileColumns) column_tile<T, W, Grouped, kTileColumns>(p, column);
  for (; column < end; ++column) column_tile<T, W, Grouped, 1>(p, column);
}

}  // namespace

void skinny_gemm(const GemmParams& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const auto compute = p.products != Products::int8_weight ? columns<T, T>
                         : p.w_group == 0                    ? columns<T, int8_t>
                                                             : columns<T, int8_t, true>;
    compute(p, begin, end);
  });
}

}  // namespace pop::cpu::POP_ISA
