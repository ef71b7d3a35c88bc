#include "runtime/batch.h"

#include <algorithm>

namespace pop {

BatchLayout::BatchLayout(const std::vector<SequenceCall>& calls, const std::vector<TokenBlock>& blocks)
    : sequences(static_cast<int64_t>(calls.size())), blocks_(calls.size()) {
  for (const TokenBlock& block : blocks) {
    const int64_t past = calls[block.sequence].past;
    blocks_[block.sequence].push_back({block.sequence, past + block.begin, past + block.end});
  }
  // Appends tokens [begin, end) of a sequence whose first token is row `source` of the packed input.
  const auto append = [this](int64_t sequence, const SequenceCall& call, int64_t source, int64_t begin, int64_t end) {
    if (begin == end) return;
    segments_.push_back({.sequence = sequence,
                         .first_row = rows,
                         .rows = end - begin,
                         .first_position = call.past + begin,
                         .first_source = source + begin,
                         .cache_start = call.cache_start});
    rows += end - begin;
  };
  const auto append_group = [&](auto begin_of, auto end_of) {
    int64_t source = 0;
    for (int64_t i = 0; i < sequences; ++i) {
      append(i, calls[i], source, begin_of(calls[i]), end_of(calls[i]));
      source += calls[i].tokens;
    }
  };

  const auto boundary_begin = [](const SequenceCall& call) { return call.tokens - call.boundary; };
  const auto wanted_begin_of = [](const SequenceCall& call) { return call.tokens - call.logits_to_keep; };
  append_group([](const SequenceCall&) { return int64_t{0}; }, boundary_begin);
  context_rows = rows;
  append_group(boundary_begin, wanted_begin_of);
  wanted_begin = rows;
  append_group(wanted_begin_of, [](const SequenceCall& call) { return call.tokens; });
}

std::vector<Segment> BatchLayout::segments(int64_t begin, int64_t end) const {
  std::vector<Segment> merged;
  for (const Segment& segment : segments_) {
    if (segment.first_row < begin || segment.first_row >= end) continue;
    if (!merged.empty()) {
      Segment& last = merged.back();
      const bool adjacent = last.sequence == segment.sequence && last.first_row + last.rows == segment.first_row;
      if (adjacent) {
        last.rows += segment.rows;
        continue;
      }
    }
    merged.push_back(segment);
  }
  return merged;
}

std::vector<Segment> BatchLayout::attention_segments(int64_t begin, int64_t end) const {
  std::vector<Segment> cut;
  for (const Segment& whole : segments(begin, end)) {
    Segment rest = whole;
    // Moves the first `rows` rows of `rest` to `cut`.
    const auto take = [&](int64_t rows, int64_t visible_end) {
      if (rows <= 0) return;
      cut.push_back(rest);
      cut.back().rows = rows;
      cut.back().visible_end = visible_end;
      rest.first_row += rows;
      rest.first_position += rows;
      rest.first_source += rows;
      rest.rows -= rows;
    };
    for (const TokenBlock& block : blocks_[whole.sequence]) {
      take(std::min(rest.rows, block.begin - rest.first_position), 0);
      if (rest.first_position >= block.begin) take(std::min(rest.rows, block.end - rest.first_position), block.end);
    }
    take(rest.rows, 0);
  }
  return cut;
}

}  // namespace pop
