// The rows of one call and their order.
//
// Rows are ordered [context | boundary | wanted]: context rows of every sequence, then boundary
// rows whose logits nobody wants, then the rows whose logits are wanted. Each group of rows
// that the loop works on ("all", "boundary and wanted", "wanted") is then a suffix, rows that
// leave early are a prefix, and nothing is gathered on the way.
#pragma once

#include <cstdint>
#include <vector>

#include "backend.h"

namespace pop {

// Geometry of one sequence of a call.
struct SequenceCall {
  int64_t tokens;          // T: new rows
  int64_t past;            // P: positions already in the cache
  int64_t boundary;        // rows at full depth, wanted rows included; wanted <= boundary <= tokens
  int64_t logits_to_keep;  // wanted rows
};

struct BatchLayout {
  explicit BatchLayout(const std::vector<SequenceCall>& sequences);

  // Segments of the rows from `first_row` on, which is 0, context_rows or wanted_begin.
  // Neighbours of one sequence are merged: a single sequence is one segment.
  std::vector<Segment> segments_from(int64_t first_row) const;

  int64_t rows = 0;
  int64_t sequences = 0;
  int64_t context_rows = 0;  // context rows are [0, context_rows)
  int64_t wanted_begin = 0;  // wanted rows are [wanted_begin, rows), by sequence
  std::vector<int64_t> row_sequence;
  std::vector<int64_t> row_position;
  std::vector<int64_t> row_source;  // row of the packed input

 private:
  std::vector<Segment> segments_;
};

}  // namespace pop
