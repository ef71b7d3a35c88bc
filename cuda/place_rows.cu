// Fills the tables that say where each row of a call comes from and belongs.
//
// What a kernel needs of host memory travels in its parameters, so that nothing is copied later
// from memory that may be gone, and a capture into a CUDA graph keeps it.
#include <algorithm>

#include "cuda/launch.cuh"

namespace pop::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kSegmentsAtOnce = 64;
constexpr int kWordsAtOnce = 960;  // with the rest under the 4 KiB that every driver takes as parameters

struct SegmentList {
  Segment segments[kSegmentsAtOnce];
};

// A block column a segment.
__global__ void __launch_bounds__(kThreads)
    place_segments_kernel(const SegmentList list, int64_t* row_sequence, int64_t* row_position, int64_t* row_source,
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

void launch_place_rows(const PlaceRowsParams& p, Stream stream) {
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
    launch("place_rows", place_segments_kernel, grid, dim3(kThreads), 0, stream, list, p.row_sequence, p.row_position,
           p.row_source, p.start);
  }
  if (p.slot_table == nullptr) return;
  const int64_t total = p.sequences * p.address.slot_table_stride;
  for (int64_t first = 0; first < total; first += kWordsAtOnce) {
    Words words{};
    const int64_t count = std::min<int64_t>(kWordsAtOnce, total - first);
    std::copy_n(p.address.slot_table + first, count, words.words);
    launch("place_rows", store_words_kernel, dim3(1), dim3(kThreads), 0, stream, words, static_cast<int>(count),
           p.slot_table + first);
  }
}

}  // namespace pop::cuda
