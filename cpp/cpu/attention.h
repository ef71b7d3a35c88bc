// CPU attention of one instruction set (POP_ISA); the algorithm is described in attention.cpp.
//
// A call is cut into tasks: segments x kv_heads x ceil(rows / attention_task_rows). Tasks write to separate memory, and
// the bits of a row do not depend on the cut. With many threads and few tasks, fewer rows per task are possible (half
// of attention_task_rows costs about 5 %). The cost of a task grows with its last position, up to the window. Threads
// that take tasks one by one finish together best if they get the last rows of a segment first, all kv_heads of a range
// of rows before the next range.
//
// head_dim is a multiple of 8 up to 256; heads is a multiple of kv_heads.
#pragma once

#include "kernels.h"

namespace pop::cpu::POP_ISA {

// The most query rows a task may have.
int64_t attention_task_rows(const AttentionParams& params);

// Bytes of scratch for any task of this call: one buffer per thread, 64-byte aligned.
size_t attention_scratch(const AttentionParams& params);

void attention(const AttentionParams& params, const AttentionTask& task, void* scratch);

}  // namespace pop::cpu::POP_ISA
