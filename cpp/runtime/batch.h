// The rows of one call and their order.
//
// Rows are ordered [context | boundary | wanted]: the context rows of every sequence, then the boundary rows whose
// logits are not wanted, then the rows whose logits are wanted. Each set of rows that the loop works on (all; boundary
// and wanted; wanted) is then a suffix, the rows that leave early are a prefix, and nothing is gathered on the way.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/params.h"

namespace pop {

// One sequence of a call.
struct SequenceCall {
  int64_t tokens;          // T: new rows
  int64_t past;            // P: positions already in the cache
  int64_t boundary;        // rows at full depth, including the wanted ones; logits_to_keep <= boundary <= tokens
  int64_t logits_to_keep;  // wanted rows
  int64_t cache_start;     // CacheAddress::start
};

// New tokens [begin, end) of a sequence that attend to each other in both directions, such as those of an image.
struct TokenBlock {
  int64_t sequence, begin, end;
};

struct BatchLayout {
  explicit BatchLayout(const std::vector<SequenceCall>& sequences, const std::vector<TokenBlock>& blocks = {});

  // The segments of rows [begin, end), each bound one of 0, context_rows, wanted_begin and rows. Adjacent segments of a
  // sequence are merged: a single sequence is one segment.
  std::vector<Segment> segments(int64_t begin, int64_t end) const;

  // The same, cut where a block begins or ends, with Segment::visible_end set.
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
