// CPU attention of one instruction set (POP_ISA): see attention.cpp.
//
// A call is cut into tasks: segments x kv_heads x ceil(rows / attention_task_rows). Tasks write apart
// from each other, and a row's bits do not depend on how the call is cut; with many threads and few
// tasks, fewer rows a task are fine (half of attention_task_rows costs about 5 %). The cost of a task
// grows with its last position, up to the window: threads that take tasks one by one end together best
// when they get the last rows of a segment first, all kv_heads of a row range before the next range.
//
// head_dim is a multiple of 8 up to 256; heads is a multiple of kv_heads.
#pragma once

#include "kernels.h"

namespace pop::cpu::POP_ISA {

// The most query rows a task may have.
int64_t attention_task_rows(const AttentionParams& params);

// Bytes of scratch of any task of this call: one buffer a thread, 64-byte aligned.
size_t attention_scratch(const AttentionParams& params);

void attention(const AttentionParams& params, const AttentionTask& task, void* scratch);

}  // namespace pop::cpu::POP_ISA
