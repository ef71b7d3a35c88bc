// Fills the row tables of a call: sequence, position and packed input row of each row, and the slot table.
//
// Host data is passed in the kernel parameters. It is then not read later, when the memory may be freed, and a capture
// into a CUDA graph keeps it.
#include <algorithm>

#include "cuda/launch.cuh"

namespace pop::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kSegmentsAtOnce = 64;
constexpr int kWordsAtOnce = 960;  // keeps the kernel parameters under 4 KiB, which every driver accepts

struct SegmentList {
  Segment segments[kSegmentsAtOnce];
};

// blockIdx.y is the segment.
__global__ void __launch_bounds__(kThreads)
    segments_kernel(const SegmentList list, int64_t* row_sequence, int64_t* row_position, int64_t* row_source,
                    int64_t* start) {
  const Segment& segment = list.segments[blockIdx.y];
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < segment.rows; i += stride) {
    row_sequence[segment.first_row + i] = segment.sequence;
    row_position[segment.first_row + i] = segment.first_position + i;
    row_source[segment.first_row + i] = segment.first_source + i;
    if (i == 0) start[segment.sequence] = segment.cache_start;
  }
}

struct Words {
  int32_t words[kWordsAtOnce];
};

__global__ void __launch_bounds__(kThreads) store_words_kernel(const Words words, int count, int32_t* to) {
  for (int i = threadIdx.x; i < count; i += kThreads) to[i] = words.words[i];
}

}  // namespace

void launch_build_row_tables(const RowTablesParams& p, Stream stream) {
  for (int64_t first = 0; first < p.num_segments; first += kSegmentsAtOnce) {
    const int64_t count = std::min<int64_t>(kSegmentsAtOnce, p.num_segments - first);
    SegmentList list{};
    int64_t longest = 1;
    for (int64_t i = 0; i < count; ++i) {
      list.segments[i] = p.segments[first + i];
      longest = std::max(longest, list.segments[i].rows);
    }
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(ceil_div(longest, kThreads), 64)),
                    static_cast<unsigned>(count));
    launch("build_row_tables", segments_kernel, grid, dim3(kThreads), 0, stream, list, p.row_sequence, p.row_position,
           p.row_source, p.start);
  }
  if (p.slot_table == nullptr) return;
  const int64_t total = p.sequences * p.address.slot_table_stride;
  for (int64_t first = 0; first < total; first += kWordsAtOnce) {
    Words words{};
    const int64_t count = std::min<int64_t>(kWordsAtOnce, total - first);
    std::copy_n(p.address.slot_table + first, count, words.words);
    launch("build_row_tables", store_words_kernel, dim3(1), dim3(kThreads), 0, stream, words, static_cast<int>(count),
           p.slot_table + first);
  }
}

}  // namespace pop::cuda
