// The address of a position in a KV cache. All kernels and checks use these functions.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pop {

// Strides in elements of a cache [batch, kv_heads, capacity, head_dim] with contiguous head_dim.
struct CacheStrides {
  int64_t batch;
  int64_t head;
  int64_t slot;
};

// Maps (sequence, position) to a slot. Without a slot table the positions of sequence i fill consecutive slots from
// start[i] on; with one, position p is in slot slot_table[i, p].
struct CacheAddress {
  const int64_t* start;       // [batch]
  const int32_t* slot_table;  // [batch, slot_table_stride] or null
  int64_t slot_table_stride;
};

POP_HD int64_t cache_slot(const CacheAddress& address, int64_t sequence, int64_t position) {
  return address.slot_table != nullptr ? address.slot_table[sequence * address.slot_table_stride + position]
                                       : address.start[sequence] + position;
}

// Offset in elements of channel 0 of (sequence, head, slot).
POP_HD int64_t slot_offset(const CacheStrides& strides, int64_t sequence, int64_t head, int64_t slot) {
  return sequence * strides.batch + head * strides.head + slot * strides.slot;
}

// Offset in elements of channel 0 of (sequence, head, position).
POP_HD int64_t cache_offset(const CacheStrides& strides, const CacheAddress& address, int64_t sequence, int64_t head,
                            int64_t position) {
  return slot_offset(strides, sequence, head, cache_slot(address, sequence, position));
}

}  // namespace pop
