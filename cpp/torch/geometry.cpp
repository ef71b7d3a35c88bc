#include "torch/geometry.h"

#include <algorithm>

#include "torch/checks.h"

namespace pop {

namespace {

std::vector<SequenceCall> read_sequences(const std::string& op, const Lengths& lengths, int64_t rows,
                                         const Tensor* boundary, const Tensor* logits_to_keep) {
  check_tensor(lengths.cu_seqlens, op + ": cu_seqlens");
  check(lengths.cu_seqlens.dim() == 1 && lengths.cu_seqlens.size(0) >= 2, op,
        ": cu_seqlens: expected shape [batch + 1] with batch >= 1, got ", shape_of(lengths.cu_seqlens));
  const int64_t batch = lengths.cu_seqlens.size(0) - 1;
  check(batch <= rows, op, ": cu_seqlens: expected at most ", rows, " sequences (one for each row of the input), got ",
        batch);
  const auto cu_seqlens = read_lengths(lengths.cu_seqlens, batch + 1, op + ": cu_seqlens");
  const auto past = read_lengths(lengths.past_lens, batch, op + ": past_lens");
  const auto start = read_lengths(lengths.cache_start, batch, op + ": cache_start");
  check(cu_seqlens.front() == 0 && cu_seqlens.back() == rows, op,
        ": cu_seqlens: expected to begin with 0 and end with ", rows, " (the rows of the input), got ",
        cu_seqlens.front(), " and ", cu_seqlens.back());

  std::vector<SequenceCall> sequences(batch);
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t tokens = cu_seqlens[i + 1] - cu_seqlens[i];
    check(tokens >= 1, op, ": cu_seqlens: expected at least 1 new token for sequence ", i, ", got ", tokens);
    check(past[i] >= 0, op, ": past_lens: expected >= 0 for sequence ", i, ", got ", past[i]);
    check(start[i] >= 0, op, ": cache_start: expected >= 0 for sequence ", i, ", got ", start[i]);
    sequences[i] = {
        .tokens = tokens, .past = past[i], .boundary = tokens, .logits_to_keep = tokens, .cache_start = start[i]};
  }
  if (boundary == nullptr) return sequences;

  const auto boundaries = read_lengths(*boundary, batch, op + ": boundary");
  const auto keeps = read_lengths(*logits_to_keep, batch, op + ": logits_to_keep");
  for (int64_t i = 0; i < batch; ++i) {
    SequenceCall& sequence = sequences[i];
    for (const auto& [value, name] : {std::pair{boundaries[i], "boundary"}, std::pair{keeps[i], "logits_to_keep"}}) {
      check(value >= 1 && value <= sequence.tokens, op, ": ", name, ": expected 1 to ", sequence.tokens,
            " (the new tokens) for sequence ", i, ", got ", value);
    }
    sequence.boundary = std::max(boundaries[i], keeps[i]);
    sequence.logits_to_keep = keeps[i];
  }
  return sequences;
}

std::vector<TokenBlock> read_blocks(const std::string& op, const std::optional<Tensor>& table,
                                    const std::vector<SequenceCall>& sequences) {
  if (!table.has_value()) return {};
  const std::string name = op + ": blocks";
  check_tensor(*table, name);
  check(table->is_cpu() && type_of(*table) == ScalarType::Int, name, ": expected int32 on cpu, got ",
        dtype_name(*table), " on ", device_of(*table));
  check_shape(*table, {-1, 3}, name);
  const int32_t* data = static_cast<const int32_t*>(table->const_data_ptr());
  const auto at = [&](int64_t row, int64_t column) {
    return static_cast<int64_t>(data[row * table->stride(0) + column * table->stride(1)]);
  };
  const auto batch = static_cast<int64_t>(sequences.size());
  std::vector<TokenBlock> blocks;
  for (int64_t i = 0; i < table->size(0); ++i) {
    const TokenBlock block{.sequence = at(i, 0), .begin = at(i, 1), .end = at(i, 2)};
    check(block.sequence >= 0 && block.sequence < batch, name, ": expected sequences from 0 to ", batch - 1, ", got ",
          block.sequence);
    const SequenceCall& call = sequences[block.sequence];
    check(0 <= block.begin && block.begin < block.end && block.end <= call.tokens, name,
          ": expected 0 <= begin < end <= ", call.tokens, " (the new tokens) for sequence ", block.sequence, ", got ",
          block.begin, " and ", block.end);
    const bool in_order = blocks.empty() || blocks.back().sequence < block.sequence ||
                          (blocks.back().sequence == block.sequence && blocks.back().end <= block.begin);
    check(in_order, name, ": expected ascending blocks that do not overlap, got ", block.begin, " to ", block.end,
          " of sequence ", block.sequence, " in row ", i);
    const int64_t context = call.tokens - call.boundary;
    check(context <= block.begin || context >= block.end, name, ": expected no boundary inside a block (widen it to ",
          call.tokens - block.begin, "), got ", call.boundary, " for sequence ", block.sequence);
    blocks.push_back(block);
  }
  return blocks;
}

}  // namespace

Geometry::Geometry(const std::string& op, const Lengths& lengths, int64_t rows, const Tensor* boundary,
                   const Tensor* logits_to_keep, const std::optional<Tensor>& blocks)
    : sequences_(read_sequences(op, lengths, rows, boundary, logits_to_keep)),
      layout_(sequences_, read_blocks(op, blocks, sequences_)) {
  for (const SequenceCall& sequence : sequences_) start_.push_back(sequence.cache_start);
  if (!lengths.slot_table.has_value()) return;

  const Tensor& table = *lengths.slot_table;
  const std::string name = op + ": slot_table";
  check_tensor(table, name);
  check(table.is_cpu() && type_of(table) == ScalarType::Int, name, ": expected int32 on cpu, got ", dtype_name(table),
        " on ", device_of(table));
  check_shape(table, {layout_.sequences, -1}, name);
  for (int64_t i = 0; i < layout_.sequences; ++i) {
    const int64_t length = sequences_[i].past + sequences_[i].tokens;
    check(length <= table.size(1), name, ": expected at least ", length, " columns (past and new tokens of sequence ",
          i, "), got ", table.size(1));
    check(length <= lengths.capacity, op, ": past_lens: expected past and new tokens of at most ", lengths.capacity,
          " (slots of a cache) for sequence ", i, ", got ", length);
    slot_table_stride_ = std::max(slot_table_stride_, length);
  }
  slot_table_.resize(layout_.sequences * slot_table_stride_);
  const int32_t* data = static_cast<const int32_t*>(table.const_data_ptr());
  for (int64_t i = 0; i < layout_.sequences; ++i) {
    const int64_t length = sequences_[i].past + sequences_[i].tokens;
    const auto begin = slot_table_.begin() + i * slot_table_stride_;
    for (int64_t p = 0; p < length; ++p) begin[p] = data[i * table.stride(0) + p * table.stride(1)];
    std::vector<int32_t> slots(begin, begin + length);
    std::sort(slots.begin(), slots.end());
    const auto twice = std::adjacent_find(slots.begin(), slots.end());
    check(twice == slots.end(), name, ": expected every position of sequence ", i, " in a slot of its own, got slot ",
          twice == slots.end() ? 0 : *twice, " twice");
  }
}

CacheAddress Geometry::address() const {
  return {.start = start_.data(),
          .slot_table = slot_table_.empty() ? nullptr : slot_table_.data(),
          .slot_table_stride = slot_table_stride_};
}

void Geometry::check_fits(const std::string& op, const std::string& cache, int64_t batch, int64_t capacity) const {
  check(batch == layout_.sequences, cache, ": expected a batch of ", layout_.sequences, " (cu_seqlens), got ", batch);
  for (int64_t i = 0; i < layout_.sequences; ++i) {
    const int64_t length = sequences_[i].past + sequences_[i].tokens;
    if (slot_table_.empty()) {
      check(start_[i] + length <= capacity, cache, ": expected capacity of at least ", start_[i] + length,
            " (cache_start + past + new tokens of sequence ", i, "), got ", capacity);
      continue;
    }
    for (int64_t p = 0; p < length; ++p) {
      const int32_t slot = slot_table_[i * slot_table_stride_ + p];
      check(slot >= 0 && slot < capacity, op, ": slot_table: expected slots from 0 to ", capacity - 1, " for sequence ",
            i, ", got ", slot, " at position ", p);
    }
  }
}

std::pair<int64_t, int64_t> Geometry::written_slots(int64_t sequence) const {
  const SequenceCall& call = sequences_[sequence];
  int64_t begin = INT64_MAX, end = 0;
  for (int64_t p = call.past; p < call.past + call.tokens; ++p) {
    const int64_t slot = cache_slot(address(), sequence, p);
    begin = std::min(begin, slot);
    end = std::max(end, slot + 1);
  }
  return {begin, end};
}

}  // namespace pop
