// torch's current device and stream, looked up in the libtorch_cuda that is already loaded. This library links against
// torch's CPU part alone, so that one wheel works with a CPU build and a CUDA build of torch.
#pragma once

#include <memory>

#include "cuda/kernels.h"

namespace pop {

// Makes a device the current one, of torch and of the CUDA runtime, while it lives.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  struct Guard;
  std::unique_ptr<Guard> guard_;
};

cuda::Stream current_stream(int device);

}  // namespace pop
