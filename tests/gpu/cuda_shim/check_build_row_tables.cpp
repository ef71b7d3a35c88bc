#include "checks.h"
#include "cuda/kernels.h"

namespace {

using namespace pop;

// More segments than fit in one launch, some of one row, and a slot table that needs several launches.
void run() {
  constexpr int64_t kSequences = 70, kStride = 31;
  std::vector<Segment> segments;
  int64_t rows = 0;
  for (int64_t s = 0; s < kSequences; ++s) {
    const int64_t length = s == 3 ? 300 : 1 + s % 5;
    segments.push_back({.sequence = (s * 3) % kSequences,
                        .first_row = rows,
                        .rows = length,
                        .first_position = 2 * s,
                        .first_source = 1000 - s,
                        .cache_start = s + 11});
    rows += length;
  }
  checks::Vector<int64_t> sequence(rows + 1, -1), position(rows + 1, -1), source(rows + 1, -1),
      start(kSequences + 1, -1);
  std::vector<int32_t> table(kSequences * kStride);  // on the host
  checks::Vector<int32_t> placed(table.size() + 1, -1);
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(3 * i + 1);
  std::vector<int64_t> host_start(kSequences);
  cuda::launch_build_row_tables(
      {.segments = segments.data(),
       .num_segments = kSequences,
       .sequences = kSequences,
       .address = {.start = host_start.data(), .slot_table = table.data(), .slot_table_stride = kStride},
       .row_sequence = sequence.data(),
       .row_position = position.data(),
       .row_source = source.data(),
       .start = start.data(),
       .slot_table = placed.data()},
      nullptr);
  checks::finish();
  const auto expect = [](bool ok, const char* what) {
    if (!ok) throw std::runtime_error(what);
  };
  for (const Segment& segment : segments) {
    for (int64_t i = 0; i < segment.rows; ++i) {
      expect(sequence[segment.first_row + i] == segment.sequence, "row_sequence");
      expect(position[segment.first_row + i] == segment.first_position + i, "row_position");
      expect(source[segment.first_row + i] == segment.first_source + i, "row_source");
    }
    expect(start[segment.sequence] == segment.cache_start, "start");
  }
  for (size_t i = 0; i < table.size(); ++i) expect(placed[i] == table[i], "slot_table");
  expect(sequence.back() == -1 && position.back() == -1 && source.back() == -1, "wrote past the rows");
  expect(start.back() == -1 && placed.back() == -1, "wrote past the tables");
}

const checks::Check check("build_row_tables", run);

}  // namespace
