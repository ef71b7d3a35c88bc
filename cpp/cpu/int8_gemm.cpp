// The kernel of int8 products. A tile of rows and one panel of columns has its sums in registers and walks along a
// block of k, whose part of the panel stays in L1 while all rows of a block pass. Sums of a block of rows wait in
// scratch until the last block of k, and are then scaled and rounded once.
//
// AVX2 has no exact product of 8-bit integers (vpmaddubsw saturates), so both operands are widened to 16 bits, and
// vpmaddwd adds two products. VNNI's vpdpbusd adds four products of unsigned and signed bytes: rows are offset by 128,
// and sums start from -128 times the sum of the weight's column. Both wrap around modulo 2^32, so a sum is exact
// whenever its true value fits an int32.
#include "core/math.h"
#include "cpu/int8_kernels.h"
#include "cpu/vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define POP_STRINGIFY_(text) #text
#define POP_STRINGIFY(text) POP_STRINGIFY_(text)

namespace pop::cpu::POP_ISA {
namespace {

#if defined(POP_VNNI)
constexpr bool kVnni = true;
#else
constexpr bool kVnni = false;
#endif

constexpr int kGroup = kVnni ? 4 : 2;  // elements along k in the 32 bits of a lane
constexpr int kVectors = 2, kPanel = kVectors * kLanes;
constexpr Int8Layout kLayout{.panel = kPanel, .group = kGroup};
#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // 24 sums, 2 operands of w and 1 of a in 32 registers
#elif defined(__AVX2__)
constexpr int kTileRows = 6;  // 12, 2 and 1 in 16
#else
constexpr int kTileRows = 2;  // the plain form needs registers for halves
#endif

constexpr int64_t kPanelBytes = 16 << 10;  // of a block of k of one panel as the kernel reads it: half of L1
constexpr int64_t kGroups = kPanelBytes / (kPanel * 4);
constexpr int64_t kRowsOfA = 96;  // prepared at once: a multiple of every kTileRows
// Rows of prepared a lie apart by a little more than a block, so that they do not compete for sets of the cache.
constexpr int64_t kRowGroups = kGroups + 16;
// Rows whose sums wait in scratch. A weight is widened again for each such block.
constexpr int64_t kRowsOfSums = 512;
// With fewer rows, w is widened in registers, once for each tile of rows.
constexpr int64_t kFewRows = 2 * kTileRows;

POP_INLINE VecU32 load_u32(const void* from) {
  VecU32 value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

POP_INLINE void store_u32(void* to, VecU32 value) { __builtin_memcpy(to, &value, sizeof(value)); }

POP_INLINE VecU32 splat_u32(const uint32_t* from) { return VecU32{} + *from; }

// sum + the products of the kGroup elements in each lane.
POP_INLINE VecU32 dot(VecU32 sum, VecU32 a, VecU32 w) {
#if defined(POP_VNNI) && defined(__AVX512F__)
  return lane_cast<VecU32>(_mm512_dpbusd_epi32(lane_cast<__m512i>(sum), lane_cast<__m512i>(a), lane_cast<__m512i>(w)));
#elif defined(POP_VNNI)
  return lane_cast<VecU32>(
      _mm256_dpbusd_avx_epi32(lane_cast<__m256i>(sum), lane_cast<__m256i>(a), lane_cast<__m256i>(w)));
#elif defined(__AVX2__)
  return sum + lane_cast<VecU32>(_mm256_madd_epi16(lane_cast<__m256i>(a), lane_cast<__m256i>(w)));
#else
  const auto low = [](VecU32 pair) { return lane_cast<VecI32>(pair << 16) >> 16; };
  const auto high = [](VecU32 pair) { return lane_cast<VecI32>(pair) >> 16; };
  return sum + lane_cast<VecU32>(low(a) * low(w) + high(a) * high(w));
#endif
}

// kLanes groups of w, from memory that holds them in the size that dot() reads, or as bytes.
POP_INLINE VecU32 load_w(const int16_t* from) { return load_u32(from); }
POP_INLINE VecU32 load_w(const int8_t* from) {
#if defined(POP_VNNI)
  return load_u32(from);
#elif defined(__AVX2__)
  return lane_cast<VecU32>(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  int16_t wide[2 * kLanes];
  for (int i = 0; i < 2 * kLanes; ++i) wide[i] = from[i];
  return load_u32(wide);
#endif
}

// Rows of a as dot() reads them, [rows][kRowGroups] groups, zero in the last group beyond `count` elements.
void prepare_a(const int8_t* a, int64_t stride, int64_t rows, int64_t count, uint32_t* out) {
  for (int64_t row = 0; row < rows; ++row, a += stride, out += kRowGroups) {
    const int64_t groups = ceil_div(count, kGroup);
    out[groups - 1] = 0;
    if constexpr (kVnni) {
      auto* bytes = reinterpret_cast<uint8_t*>(out);
      for (int64_t i = 0; i < count; ++i) bytes[i] = static_cast<uint8_t>(a[i]) ^ 0x80u;
    } else {
      auto* words = reinterpret_cast<int16_t __attribute__((may_alias))*>(out);
      for (int64_t i = 0; i < count; ++i) words[i] = a[i];
    }
  }
}

void widen_w(const int8_t* w, int64_t count, int16_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = w[i];
}

// sums [Rows][stride] of one panel = start, or themselves if that is null, + the products of `groups` groups.
template <int Rows, class W>
void tile(const uint32_t* a, const W* w, int64_t groups, const int32_t* start, int32_t* sums, int64_t stride) {
  VecU32 totals[Rows][kVectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      totals[r][v] = load_u32((start == nullptr ? sums + r * stride : start) + v * kLanes);
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    VecU32 w_operands[kVectors];
    for (int v = 0; v < kVectors; ++v) w_operands[v] = load_w(w + (g * kPanel + v * kLanes) * kGroup);
    for (int r = 0; r < Rows; ++r) {
      const VecU32 a_operand = splat_u32(a + r * kRowGroups + g);
      for (int v = 0; v < kVectors; ++v) totals[r][v] = dot(totals[r][v], a_operand, w_operands[v]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kVectors; ++v) store_u32(sums + r * stride + v * kLanes, totals[r][v]);
  }
}

template <class W, int Rows = kTileRows>
POP_INLINE void tile_of(int64_t rows, const uint32_t* a, const W* w, int64_t groups, const int32_t* start,
                        int32_t* sums, int64_t stride) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return tile_of<W, Rows - 1>(rows, a, w, groups, start, sums, stride);
  }
  tile<Rows>(a, w, groups, start, sums, stride);
}

// The tiles of one panel, of nearly equal height.
template <class W>
void panel_of_rows(int64_t rows, const uint32_t* a, const W* w, int64_t groups, const int32_t* start, int32_t* sums,
                   int64_t stride) {
  const int64_t tiles = ceil_div(rows, kTileRows);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = rows * t / tiles, end = rows * (t + 1) / tiles;
    tile_of<W>(end - row, a + row * kRowGroups, w, groups, start, sums + row * stride, stride);
  }
}

template <class T>
void scale_rows(const Int8Gemm& p, int64_t first_row, int64_t rows, int64_t begin, int64_t end, const int32_t* sums,
                int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    T* out = static_cast<T*>(p.out) + (first_row + row) * p.out_stride;
    const Vec a_scale = splat(p.a_scale[first_row + row]);
    for (int64_t n = begin; n < end; n += kLanes) {
      const int64_t count = end - n;
      const VecI32 exact = lane_cast<VecI32>(load_u32(sums + row * stride + n - begin));
      // The weight's scale first: a row of large values times a small weight is finite, and so are the steps to it.
      store_upto(out + n, __builtin_convertvector(exact, Vec) * load_upto(p.w_scale + n, count) * a_scale, count);
    }
  }
}

int64_t padded(int64_t columns) { return round_up(columns, kPanel); }

// The scratch of a call, cut into its parts.
struct Parts {
  Parts(int64_t m, int64_t columns, void* memory) {
    auto* at = static_cast<char*>(memory);
    const auto take = [&](int64_t bytes) {
      char* part = at + used;
      used += aligned(bytes);
      return part;
    };
    a = reinterpret_cast<uint32_t*>(take(kRowsOfA * kRowGroups * 4));
    sums = reinterpret_cast<int32_t*>(take((m < kRowsOfSums ? m : kRowsOfSums) * padded(columns) * 4));
    w = reinterpret_cast<int16_t*>(take(kVnni ? 0 : padded(columns) * kGroups * 4));
  }
  uint32_t* a;
  int32_t* sums;
  int16_t* w;
  size_t used = 0;
};

void pack(const Int8Pack& p) {
  const int64_t groups = ceil_div(p.k, kGroup);
  for (int64_t i = 0; i < groups * kPanel * kGroup; ++i) p.panel[i] = 0;
  for (int64_t column = 0; column < kPanel; ++column) {
    int64_t sum = 0;
    for (int64_t i = 0; column < p.columns && i < p.k; ++i) {
      const int8_t value = p.w[column * p.k + i];
      p.panel[(i / kGroup * kPanel + column) * kGroup + i % kGroup] = value;
      sum += value;
    }
    p.start[column] = kVnni ? static_cast<int32_t>(-128 * sum) : 0;
  }
}

size_t scratch(int64_t m, int64_t columns) { return Parts(m, columns, nullptr).used; }

void gemm(const Int8Gemm& p, int64_t begin, int64_t end, void* memory) {
  const Parts parts(p.m, end - begin, memory);
  const int64_t stride = padded(end - begin), groups = ceil_div(p.k, kGroup), panel_size = kLayout.panel_bytes(p.k);
  const auto* panels = static_cast<const int8_t*>(p.w) + begin / kPanel * panel_size;
  const auto* starts =
      reinterpret_cast<const int32_t*>(static_cast<const int8_t*>(p.w) + kLayout.starts(p.n, p.k)) + begin;
  const bool widens = !kVnni && p.m > kFewRows;
  const int64_t blocks = ceil_div(p.m, kRowsOfSums);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = p.m * block / blocks, rows = p.m * (block + 1) / blocks - first;
    for (int64_t group = 0; group < groups; group += kGroups) {
      const int64_t part = groups - group < kGroups ? groups - group : kGroups;
      const int64_t element = group * kGroup, left = p.k - element;
      const int64_t elements = left < part * kGroup ? left : part * kGroup;
      const int64_t slice = part * kPanel * kGroup;
      for (int64_t n = 0; widens && n < stride; n += kPanel) {
        widen_w(panels + n / kPanel * panel_size + element * kPanel, slice, parts.w + n / kPanel * slice);
      }
      for (int64_t row = 0; row < rows; row += kRowsOfA) {
        const int64_t some = rows - row < kRowsOfA ? rows - row : kRowsOfA;
        prepare_a(p.a + (first + row) * p.a_stride + element, p.a_stride, some, elements, parts.a);
        for (int64_t n = 0; n < stride; n += kPanel) {
          const int32_t* start = group == 0 ? starts + n : nullptr;
          int32_t* sums = parts.sums + row * stride + n;
          if (widens) {
            panel_of_rows(some, parts.a, parts.w + n / kPanel * slice, part, start, sums, stride);
          } else {
            panel_of_rows(some, parts.a, panels + n / kPanel * panel_size + element * kPanel, part, start, sums,
                          stride);
          }
        }
      }
    }
    with_element(p.dtype,
                 [&](auto value) { scale_rows<decltype(value)>(p, first, rows, begin, end, parts.sums, stride); });
  }
}

}  // namespace

extern const Int8Kernels int8_kernels = {
    .name = POP_STRINGIFY(POP_ISA),
    .layout = kLayout,
    .pack = pack,
    .scratch = scratch,
    .gemm = gemm,
};

}  // namespace pop::cpu::POP_ISA
