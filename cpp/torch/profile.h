// Shows the stages of a prefill to torch's profiler.
#pragma once

#include "runtime/prefill.h"

namespace pop {

// Ranges of torch.profiler's record_function kind, where this torch exports them; else nothing.
class ProfilerStages : public StageObserver {
 public:
  void begin(const char* stage) override;
  void end() override;

 private:
  void* guard_ = nullptr;
};

}  // namespace pop
