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
  int64_t cache_start;     // CacheAddress::start
};

// New tokens [begin, end) of a sequence that see each other, before and after: an image's.
struct TokenBlock {
  int64_t sequence, begin, end;
};

struct BatchLayout {
  explicit BatchLayout(const std::vector<SequenceCall>& sequences, const std::vector<TokenBlock>& blocks = {});

  // Segments of rows [begin, end), each 0, context_rows, wanted_begin or rows. Neighbours of one
  // sequence are merged: a single sequence is one segment.
  std::vector<Segment> segments(int64_t begin, int64_t end) const;

  // The same, cut where a block begins or ends, with Segment::sees_to.
  std::vector<Segment> attention_segments(int64_t begin, int64_t end) const;

  int64_t rows = 0;
  int64_t sequences = 0;
  int64_t context_rows = 0;  // context rows are [0, context_rows)
  int64_t wanted_begin = 0;  // wanted rows are [wanted_begin, rows), by sequence

 private:
  std::vector<Segment> segments_;
  std::vector<std::vector<TokenBlock>> blocks_;  // [sequences], in positions, ascending
};

}  // namespace pop
