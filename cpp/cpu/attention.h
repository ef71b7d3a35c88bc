// CPU attention of one instruction set (POP_ISA): see attention.cpp.
//
// A call is cut into tasks: segments x kv_heads x ceil(rows / attention_task_rows). A task reads and
// writes nothing of another one, and a row's bits do not depend on how the call is cut. The cost of a
// task grows with its last position (up to the window), so threads that take tasks one by one end
// together best when they get the last rows of a segment first, and all kv_heads of a row range
// before the next range.
#pragma once

#include "kernels.h"

namespace pop::cpu::POP_ISA {

// Query rows a task should have; the last one of a segment has fewer.
int64_t attention_task_rows(const AttentionParams& params);

// Bytes of scratch of any task of this call: one buffer a thread, 64-byte aligned.
size_t attention_scratch(const AttentionParams& params);

void attention(const AttentionParams& params, const AttentionTask& task, void* scratch);

}  // namespace pop::cpu::POP_ISA
