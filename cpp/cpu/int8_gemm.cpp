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

int64_t groups_of(int64_t k) { return round_up(ceil_div(k, kGroup), kGroupMultiple); }

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

// What sums of a column start from, by the sums of its elements in each lane.
int32_t start_of(VecU32 totals) {
  uint32_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += totals[lane];
  return -128 * static_cast<int32_t>(sum);
}

// Where packed columns of a task lie: a column from the next, and in it a vector of kLanes groups from the next.
struct ColumnSteps {
  int64_t column, vector;
};
constexpr ColumnSteps kTileSteps = {kColumnStep, kVectorStep};  // as panel_of_columns reads them
constexpr ColumnSteps kGroupedSteps = {kColumnGroups, kLanes};  // as grouped_panel does

// Copies elements [0, count) of Columns columns of w, zero beyond `count`. `start`, unless it is null, is set to what
// their sums start from.
template <int Columns>
void copy_columns(const int8_t* w, int64_t stride, int64_t count, ColumnSteps steps, uint32_t* out, int32_t* start) {
  VecU32 totals[Columns] = {};
  // All columns at once: each is a stream of its own, which keeps more reads of memory under way.
  const auto copy = [&](int64_t k, int64_t elements) __attribute__((always_inline)) {
    for (int c = 0; c < Columns; ++c) {
      const VecU32 vector = load_w(w + c * stride + k, elements);
      store_u32(out + c * steps.column + k / kStep * steps.vector, vector);
      if constexpr (kOffset) {
        if (start != nullptr) totals[c] = dot(totals[c], splat_u32(0x01010101u), vector);
      }
    }
  };
  int64_t k = 0;
  for (; k + kStep <= count; k += kStep) copy(k, kStep);
  if (k < count) copy(k, count - k);
  for (int c = 0; start != nullptr && c < Columns; ++c) start[c] = start_of(totals[c]);
}

// The same for each scale of a packed column. VNNI offsets rows, also those of AMX.
void start_groups(const uint32_t* packed, int64_t groups, int64_t scale_groups, int32_t* start) {
  for (int64_t g = 0; g < groups; g += scale_groups, ++start) {
    VecU32 total = {};
    for (int64_t i = 0; kVnni && i < scale_groups; i += kLanes) {
      VecU32 vector = load_u32(packed + g + i);
      // A scale of 32 elements fills half a vector of AVX-512; the other half is the next one's.
      for (int64_t lane = scale_groups - i; lane < kLanes; ++lane) vector[lane] = 0;
      total = dot(total, splat_u32(0x01010101u), vector);
    }
    *start = start_of(total);
  }
}

// Packs elements [first, first + count) of `columns` columns of w, and says what their sums start from.
void pack_columns(const Int8Weight& w, int64_t column, int64_t columns, int64_t first, int64_t count, uint32_t* out,
                  int32_t* start) {
  constexpr int kAtOnce = 16;
  const int64_t groups = groups_of(count);
  const int8_t* from = w.data + column * w.stride + first;
  const bool grouped = w.group != 0;
  for (int64_t c = 0; c < columns;) {
    uint32_t* to = out + (grouped ? c * kColumnGroups : column_place(c, groups));
    const bool many = columns - c >= kAtOnce;
    const auto copy = many ? copy_columns<kAtOnce> : copy_columns<1>;
    copy(from + c * w.stride, w.stride, count, grouped ? kGroupedSteps : kTileSteps, to, grouped ? nullptr : start + c);
    const int64_t end = c + (many ? kAtOnce : 1);
    for (; c < end; ++c, to += kColumnGroups) {
      if (grouped) start_groups(to, groups, w.group / kGroup, start + c * kMostScales);
    }
  }
}

// The scratch of a call, cut into its parts.
struct Parts {
  Parts(const Int8Gemm& p, int64_t columns, void* memory) : blocks(ceil_div(p.k, kElements)) {
    auto* at = static_cast<char*>(memory);
    const auto take = [&](int64_t bytes) {
      const size_t begin = used;
      used += aligned(bytes);
      return at == nullptr ? nullptr : at + begin;
    };
    const bool gated = p.up.data != nullptr;
    columns = round_up(columns, kColumnMultiple);
    panel_sums = columns * kPanel;
    for (int i = 0; i < 1 + gated; ++i) {
      w[i] = reinterpret_cast<uint32_t*>(take(columns * kColumnGroups * 4));
      start[i] = reinterpret_cast<int32_t*>(take(columns * kMostScales * 4));
      sums[i] = reinterpret_cast<int32_t*>(take((blocks > 1 ? ceil_div(p.m, kPanel) : 1) * panel_sums * 4));
      results[i] = take(gated ? kPanel * columns * element_size(p.dtype) : 0);
    }
  }

  // Sums of a panel of rows: [columns][kPanel]. If k is one block, those of the panel before are no longer needed.
  int32_t* sums_of(int i, int64_t row) const { return sums[i] + (blocks > 1 ? row / kPanel * panel_sums : 0); }

  int64_t blocks, panel_sums;
  uint32_t* w[2];
  int32_t* start[2];
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
  for (int64_t column = begin; column < end; ++column, sums += kPanel) {
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

// Adds the products of a block of k to the sums of a panel, from row `row` on. Weights are packed.
void add_block(const Int8Gemm& p, const Int8Weight& w, int64_t begin, int64_t columns, int64_t first, int64_t count,
               int64_t row, const uint32_t* packed, const int32_t* start, int32_t* sums) {
  const auto* a = static_cast<const uint32_t*>(p.rows.out) + row * groups_of(p.k) + first / kGroup * kPanel;
  const bool half = p.m - row <= kLanes;
  if (w.group == 0) {
    const auto panel = half ? panel_of_columns<1> : panel_of_columns<kVectors>;
    return panel(columns, a, packed, groups_of(count), start, first == 0, sums);
  }
  const int64_t scales = p.k / w.group;
  const auto panel = half ? grouped_panel<1> : grouped_panel<kVectors>;
  panel({.a = a,
         .w = packed,
         .groups = count / kGroup,
         .scale_groups = w.group / kGroup,
         .start = start,
         .scale = w.scale + begin * scales + first / w.group,
         .scale_stride = scales,
         .fresh = first == 0},
        columns, reinterpret_cast<float*>(sums));
}

// A sum times both scales. The weight's comes first: a row of large values times a small weight is finite, and so are
// the steps to it. Sums of groups are float32 and have their weight's scales already: Grouped.
template <bool Grouped>
POP_INLINE Vec scaled(VecU32 sums, Vec w_scale, Vec a_scale) {
  if constexpr (Grouped) return lane_cast<Vec>(sums) * a_scale;
  return __builtin_convertvector(lane_cast<VecI32>(sums), Vec) * w_scale * a_scale;
}

// out [rows, columns] = the sums [columns][kPanel], scaled.
template <bool Grouped, class T>
void scale_rows(const int32_t* sums, int64_t rows, int64_t columns, const float* a_scale, const float* w_scale, T* out,
                int64_t out_stride) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    const int64_t block_rows = rows - row < kLanes ? rows - row : kLanes;
    int64_t n = 0;
    VecU32 block[kLanes];
    if constexpr (sizeof(T) == 2) {
      // Two columns to a lane, which halves the work of transposing.
      const Vec a_scales = load_upto(a_scale + row, block_rows);
      for (; n + 2 * kLanes <= columns; n += 2 * kLanes) {
        for (int c = 0; c < kLanes; ++c) {
          VecU32 bits[2];
          for (int i = 0; i < 2; ++i) {
            const int64_t column = n + 2 * c + i;
            const Vec w_scales = Grouped ? Vec{} : splat(w_scale[column]);
            bits[i] = bits_of(T{}, scaled<Grouped>(load_u32(sums + column * kPanel + row), w_scales, a_scales));
          }
          block[c] = bits[0] | bits[1] << 16;
        }
        transpose(block);
        for (int64_t r = 0; r < block_rows; ++r) store_u32(out + (row + r) * out_stride + n, block[r]);
      }
    }
    for (; n < columns; n += kLanes) {
      const int64_t count = columns - n;
      for (int64_t c = 0; c < kLanes; ++c) block[c] = c < count ? load_u32(sums + (n + c) * kPanel + row) : VecU32{};
      transpose(block);
      const Vec w_scales = Grouped ? Vec{} : load_upto(w_scale + n, count);
      for (int64_t r = 0; r < block_rows; ++r) {
        store_upto(out + (row + r) * out_stride + n, scaled<Grouped>(block[r], w_scales, splat(a_scale[row + r])),
                   count);
      }
    }
  }
}

template <class T>
void scale_rows(const Int8Gemm& p, const Int8Weight& w, int64_t begin, int64_t columns, int64_t row,
                const int32_t* sums, T* out, int64_t out_stride) {
  const int64_t rows = p.m - row < kPanel ? p.m - row : kPanel;
  if (w.group != 0) return scale_rows<true>(sums, rows, columns, p.a_scale + row, nullptr, out, out_stride);
  scale_rows<false>(sums, rows, columns, p.a_scale + row, w.scale + begin, out, out_stride);
}

// The activation of both products of a panel.
template <class T>
void activate(const Int8Gemm& p, int64_t begin, int64_t columns, int64_t row, const Parts& parts) {
  GatedActParams act = *p.act;
  const auto at = [&](const void* bias) { return bias == nullptr ? nullptr : static_cast<const T*>(bias) + begin; };
  act.gate_bias = at(act.gate_bias);
  act.up_bias = at(act.up_bias);
  act.width = columns;
  act.gate_stride = act.up_stride = columns;
  act.gate = parts.results[0];
  act.up = parts.results[1];
  act.rows = p.m - row < kPanel ? p.m - row : kPanel;
  act.out = static_cast<T*>(p.out) + row * p.out_stride + begin;
  act.out_stride = p.out_stride;
  const Int8Weight* weights[] = {&p.w, &p.up};
  for (int i = 0; i < 2; ++i) {
    scale_rows(p, *weights[i], begin, columns, row, parts.sums_of(i, row), static_cast<T*>(parts.results[i]), columns);
  }
  p.gated_act(act, 0, act.rows);
}

// Rounds a panel of rows, whose sums are complete.
template <class T>
void finish(const Int8Gemm& p, int64_t begin, int64_t columns, int64_t row, const Parts& parts) {
  if (p.up.data != nullptr) return activate<T>(p, begin, columns, row, parts);
  scale_rows(p, p.w, begin, columns, row, parts.sums_of(0, row), static_cast<T*>(p.out) + row * p.out_stride + begin,
             p.out_stride);
}

void gemm(const Int8Gemm& p, int64_t begin, int64_t end, void* memory) {
  const int64_t columns = end - begin;
  const Parts parts(p, columns, memory);
  const Int8Weight* weights[] = {&p.w, &p.up};
  const int count_weights = p.up.data == nullptr ? 1 : 2;
  const auto finish_panel = [&](int64_t row) {
    with_element(p.dtype, [&](auto element) { finish<decltype(element)>(p, begin, columns, row, parts); });
  };
  if (reads_rows(p, p.m)) {
    for (int i = 0; i < count_weights; ++i) sum_few_rows_of(p, *weights[i], begin, end, parts.sums[i]);
    return finish_panel(0);
  }
#if defined(POP_AMX)
  const AmxTiles tiles;
#endif
  for (int64_t first = 0; first < p.k; first += kElements) {
    const int64_t count = p.k - first < kElements ? p.k - first : kElements;
    for (int i = 0; i < count_weights; ++i) {
      pack_columns(*weights[i], begin, columns, first, count, parts.w[i], parts.start[i]);
    }
    for (int64_t row = 0; row < p.m; row += kPanel) {
      for (int i = 0; i < count_weights; ++i) {
        add_block(p, *weights[i], begin, columns, first, count, row, parts.w[i], parts.start[i], parts.sums_of(i, row));
      }
      if (first + count == p.k) finish_panel(row);
    }
  }
}

}  // namespace

extern const Int8Kernels int8_kernels = {
    .name = POP_STRINGIFY(POP_ISA),
    .panel = kPanel,
    .tile_columns = kTileColumns,
    .most_columns = kLanes == 16 ? 256 : 128,
    .reads_rows = reads_rows,
    .packed_bytes = packed_bytes,
    .pack = pack,
    .scratch = scratch,
    .gemm = gemm,
};

}  // namespace pop::cpu::POP_ISA
