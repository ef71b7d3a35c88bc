// The kernel of int8 products. Rows of a lie in panels, one row in each lane of a vector. A tile of columns and one
// panel has its sums in registers and walks along a block of k, whose part of the panel stays in L1 while the columns
// of a task pass. Sums wait in scratch until the last block of k, and are then turned, scaled and rounded once.
//
// AVX2 has no exact product of 8-bit integers (vpmaddubsw saturates), so both operands are widened to 16 bits, and
// vpmaddwd adds two products. VNNI's vpdpbusd adds four products of unsigned and signed bytes: rows are offset by 128,
// and sums start from -128 times the sum of the weight's elements. Both wrap around modulo 2^32, so a sum is exact
// whenever its true value fits an int32. AMX has tiles of sums and a product of signed bytes (cpu/int8_amx.h); a few
// rows use VNNI there.
#include "cpu/int8_kernels.h"
#include "cpu/int8_tiles.h"

#define POP_STRINGIFY_(text) #text
#define POP_STRINGIFY(text) POP_STRINGIFY_(text)

namespace pop::cpu::POP_ISA {
namespace {

constexpr int64_t kFewRows = 4;  // the most rows that are read as they are: packed ones would leave lanes empty
constexpr int64_t kAhead = 4;    // columns of w that are fetched before they are prepared
// Rows whose results wait for the activation, of both products.
constexpr int64_t kGatedRows = kLanes;

int64_t groups_of(int64_t k) { return round_up(ceil_div(k, kGroup), kMultiple); }

size_t packed_bytes(int64_t m, int64_t k) { return round_up(m, kPanel) * groups_of(k) * 4; }

// Panels of a: [panel][group][row of the panel]. Rows beyond m hold anything: their sums are not read.
void pack(const Int8Rows& p, int64_t begin, int64_t end) {
  const int64_t groups = groups_of(p.k);
  for (int64_t row = begin * kPanel; row < end * kPanel; row += kLanes) {
    if (row >= p.m) break;
    const int64_t rows = p.m - row < kLanes ? p.m - row : kLanes;
    auto* out = static_cast<uint32_t*>(p.out) + row / kPanel * groups * kPanel + row % kPanel;
    const int8_t* a = p.a + row * p.a_stride;
    for (int64_t g = 0; g < groups; g += kLanes) {
      VecU32 block[kLanes] = {};
      for (int64_t r = 0; r < rows; ++r) {
        block[r] = load_a<kOffset>(a + r * p.a_stride + g * kGroup, p.k - g * kGroup);
      }
      transpose(block);
      for (int64_t i = 0; i < kLanes && g + i < groups; ++i) store_u32(out + (g + i) * kPanel, block[i]);
    }
  }
}

// Elements [first, first + count) of `columns` columns of w as tiles read them, zero in the last groups beyond `count`,
// and what their sums start from.
void prepare_w(const Int8Weight& w, int64_t column, int64_t columns, int64_t first, int64_t count, uint32_t* out,
               int32_t* start) {
  // With scales for groups, sums start for each of them.
  const int64_t group = w.group == 0 ? count : w.group, starts = w.group == 0 ? 1 : kMostScales;
  const bool offset = kOffset || (kVnni && w.group != 0);
  const int8_t* from = w.data + column * w.stride + first;
  for (int64_t c = 0; c < columns; ++c, from += w.stride, out += kColumnGroups) {
    // Hardware prefetchers do not go from a column to the next one.
    for (int64_t i = 0; c + kAhead < columns && i < count; i += 64) __builtin_prefetch(from + kAhead * w.stride + i);
    for (int64_t g = count / kGroup; g < groups_of(count); ++g) out[g] = 0;
    if constexpr (kVnni) {
      __builtin_memcpy(out, from, count);
    } else {
      auto* words = reinterpret_cast<int16_t __attribute__((may_alias))*>(out);
      for (int64_t i = 0; i < count; ++i) words[i] = from[i];
    }
    for (int64_t begin = 0, s = 0; begin < count; begin += group, ++s) {
      int32_t sum = 0;
      for (int64_t i = begin; offset && i < count && i < begin + group; ++i) sum += from[i];
      start[c * starts + s] = -128 * sum;
    }
  }
}

int64_t sums_stride(int64_t m) { return round_up(m, kPanel) + kMoreSums; }

// The scratch of a call, cut into its parts.
struct Parts {
  Parts(const Int8Gemm& p, int64_t columns, void* memory) {
    auto* at = static_cast<char*>(memory);
    const auto take = [&](int64_t bytes) {
      char* part = at + used;
      used += aligned(bytes);
      return part;
    };
    const bool gated = p.up.data != nullptr;
    columns = round_up(columns, kMultiple);
    w = reinterpret_cast<uint32_t*>(take(columns * kColumnGroups * 4));
    start = reinterpret_cast<int32_t*>(take(columns * kMostScales * 4));
    for (int i = 0; i < 1 + gated; ++i) {
      sums[i] = reinterpret_cast<int32_t*>(take(columns * sums_stride(p.m) * 4));
      results[i] = take(gated ? kGatedRows * columns * element_size(p.dtype) : 0);
    }
  }
  uint32_t* w;
  int32_t* start;
  int32_t* sums[2];
  void* results[2];
  size_t used = 0;
};

size_t scratch(const Int8Gemm& p, int64_t columns) { return Parts(p, columns, nullptr).used; }

bool reads_rows(const Int8Gemm& p, int64_t m) { return m <= kFewRows && p.w.group == 0 && p.up.group == 0; }

// The exact sums of a few rows. Lanes walk along k, and w is read once at the speed of memory.
template <int Rows>
void sum_few_rows(const Int8Gemm& p, const Int8Weight& weight, int64_t begin, int64_t end, int32_t* sums) {
  const auto add_lanes = [](VecU32 lanes) {
    uint32_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    return sum;
  };
  for (int64_t column = begin; column < end; ++column, sums += sums_stride(p.m)) {
    const int8_t* w = weight.data + column * weight.stride;
    VecU32 totals[Rows] = {}, of_w = {};
    const auto step = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
      const VecU32 w_operand = load_w(w + k, count);
      if constexpr (kVnni) of_w = dot(of_w, splat_u32(0x01010101u), w_operand);
      for (int r = 0; r < Rows; ++r) {
        totals[r] = dot(totals[r], load_a(p.rows.a + r * p.rows.a_stride + k, count), w_operand);
      }
    };
    int64_t k = 0;
    for (; k + kStep <= p.k; k += kStep) step(k, kStep);
    if (k < p.k) step(k, p.k - k);
    const uint32_t start = kVnni ? 128 * add_lanes(of_w) : 0;
    for (int r = 0; r < Rows; ++r) sums[r] = static_cast<int32_t>(add_lanes(totals[r]) - start);
  }
}

template <int Rows = kFewRows>
void sum_few_rows_of(const Int8Gemm& p, const Int8Weight& w, int64_t begin, int64_t end, int32_t* sums) {
  if constexpr (Rows > 1) {
    if (p.m < Rows) return sum_few_rows_of<Rows - 1>(p, w, begin, end, sums);
  }
  sum_few_rows<Rows>(p, w, begin, end, sums);
}

// The exact sums of columns [begin, end).
void sum_products(const Int8Gemm& p, const Int8Weight& w, int64_t begin, int64_t end, const Parts& parts,
                  int32_t* sums) {
  if (reads_rows(p, p.m)) return sum_few_rows_of(p, w, begin, end, sums);
  const int64_t stride = sums_stride(p.m), columns = end - begin;
#if defined(POP_AMX)
  const AmxTiles tiles;
#endif
  for (int64_t first = 0; first < p.k; first += kElements) {
    const int64_t count = p.k - first < kElements ? p.k - first : kElements, groups = groups_of(count);
    prepare_w(w, begin, columns, first, count, parts.w, parts.start);
    const int64_t scales = w.group == 0 ? 1 : p.k / w.group;
    for (int64_t row = 0; row < p.m; row += kPanel) {
      const auto* a = static_cast<const uint32_t*>(p.rows.out) + row * groups_of(p.k) + first / kGroup * kPanel;
      const bool half = p.m - row <= kLanes;
      if (w.group != 0) {
        const auto panel = half ? grouped_panel<1> : grouped_panel<kVectors>;
        panel({.a = a,
               .w = parts.w,
               .groups = count / kGroup,
               .scale_groups = w.group / kGroup,
               .start = parts.start,
               .scale = w.scale + begin * scales + first / w.group,
               .scale_stride = scales,
               .fresh = first == 0},
              columns, reinterpret_cast<float*>(sums) + row, stride);
        continue;
      }
      const auto panel = half ? panel_of_columns<1> : panel_of_columns<kVectors>;
      panel(columns, a, parts.w, groups, parts.start, first == 0, sums + row, stride);
    }
  }
}

// out [rows, columns] = the sums [columns][stride], scaled. Sums in float32 have their weight's scales: w_scale is
// null.
template <class T>
void scale_rows(const int32_t* sums, int64_t stride, int64_t rows, int64_t columns, const float* a_scale,
                const float* w_scale, T* out, int64_t out_stride) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    const int64_t block_rows = rows - row < kLanes ? rows - row : kLanes;
    for (int64_t n = 0; n < columns; n += kLanes) {
      const int64_t count = columns - n;
      VecU32 block[kLanes] = {};
      for (int64_t c = 0; c < kLanes && c < count; ++c) block[c] = load_u32(sums + (n + c) * stride + row);
      transpose(block);
      const Vec scales = w_scale == nullptr ? Vec{} : load_upto(w_scale + n, count);
      for (int64_t r = 0; r < block_rows; ++r) {
        // The weight's scale first: a row of large values times a small weight is finite, and so are the steps to it.
        const Vec scaled = w_scale == nullptr ? lane_cast<Vec>(block[r])
                                              : __builtin_convertvector(lane_cast<VecI32>(block[r]), Vec) * scales;
        store_upto(out + (row + r) * out_stride + n, scaled * splat(a_scale[row + r]), count);
      }
    }
  }
}

// Scales that a column's sums are multiplied with at the end; null if they have them already.
const float* row_scales(const Int8Weight& w, int64_t column) { return w.group == 0 ? w.scale + column : nullptr; }

// The activation of both products, some rows at a time, which stay in the cache.
template <class T>
void activate(const Int8Gemm& p, int64_t begin, int64_t columns, const Parts& parts) {
  const int64_t stride = sums_stride(p.m);
  GatedActParams act = *p.act;
  const auto at = [&](const void* bias) { return bias == nullptr ? nullptr : static_cast<const T*>(bias) + begin; };
  act.gate_bias = at(act.gate_bias);
  act.up_bias = at(act.up_bias);
  act.width = columns;
  act.gate_stride = act.up_stride = columns;
  act.gate = parts.results[0];
  act.up = parts.results[1];
  act.out_stride = p.out_stride;
  for (int64_t row = 0; row < p.m; row += kGatedRows) {
    act.rows = p.m - row < kGatedRows ? p.m - row : kGatedRows;
    const Int8Weight* weights[] = {&p.w, &p.up};
    for (int i = 0; i < 2; ++i) {
      scale_rows(parts.sums[i] + row, stride, act.rows, columns, p.a_scale + row, row_scales(*weights[i], begin),
                 static_cast<T*>(parts.results[i]), columns);
    }
    act.out = static_cast<T*>(p.out) + row * p.out_stride + begin;
    p.gated_act(act, 0, act.rows);
  }
}

template <class T>
void finish(const Int8Gemm& p, int64_t begin, int64_t columns, const Parts& parts) {
  if (p.up.data != nullptr) return activate<T>(p, begin, columns, parts);
  scale_rows(parts.sums[0], sums_stride(p.m), p.m, columns, p.a_scale, row_scales(p.w, begin),
             static_cast<T*>(p.out) + begin, p.out_stride);
}

void gemm(const Int8Gemm& p, int64_t begin, int64_t end, void* memory) {
  const Parts parts(p, end - begin, memory);
  sum_products(p, p.w, begin, end, parts, parts.sums[0]);
  if (p.up.data != nullptr) sum_products(p, p.up, begin, end, parts, parts.sums[1]);
  with_element(p.dtype, [&](auto element) { finish<decltype(element)>(p, begin, end - begin, parts); });
}

}  // namespace

extern const Int8Kernels int8_kernels = {
    .name = POP_STRINGIFY(POP_ISA),
    .panel = kPanel,
    .tile_columns = kTileColumns,
    .reads_rows = reads_rows,
    .packed_bytes = packed_bytes,
    .pack = pack,
    .scratch = scratch,
    .gemm = gemm,
};

}  // namespace pop::cpu::POP_ISA
