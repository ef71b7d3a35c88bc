// torch's current device and stream, from the libtorch_cuda that is already loaded: this library links against
// the CPU part alone, so that one wheel serves both kinds of torch.
#pragma once

#include <memory>

#include "cuda/kernels.h"

namespace pop {

// Makes a device the current one, of torch and of the CUDA runtime.
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
