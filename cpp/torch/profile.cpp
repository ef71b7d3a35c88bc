#include "torch/profile.h"

#include <dlfcn.h>

#include <cstdint>

namespace pop {

namespace {

// Part of torch's C shim, but not in every supported release, so it is looked up, not linked.
using RecordFunctionStart = int32_t (*)(const char* name, void* kwargs, const void* inputs, uint64_t count,
                                        void** guard);
using RecordFunctionEnd = int32_t (*)(void* guard);

template <typename Function>
Function look_up(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

}  // namespace

void ProfilerStages::begin(const char* stage) {
  static const auto start = look_up<RecordFunctionStart>("aoti_record_function_start");
  guard_ = nullptr;
  if (start != nullptr) start(stage, nullptr, nullptr, 0, &guard_);
}

void ProfilerStages::end() {
  static const auto finish = look_up<RecordFunctionEnd>("aoti_record_function_end");
  if (guard_ != nullptr && finish != nullptr) finish(guard_);
  guard_ = nullptr;
}

}  // namespace pop
