// Shows the stages of a prefill to torch's profiler.
#pragma once

#include "runtime/prefill.h"

namespace pop {

// Makes ranges like torch.profiler.record_function, if this torch exports them; else does nothing.
class ProfilerStages : public PrefillObserver {
 public:
  void begin(const char* stage) override;
  void end() override;

 private:
  void* guard_ = nullptr;
};

}  // namespace pop
