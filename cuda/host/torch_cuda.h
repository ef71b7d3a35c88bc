// torch's current device and stream, looked up in the libtorch_cuda that is already loaded. This library links against
// torch's CPU part alone, so that one wheel works with a CPU build and a CUDA build of torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

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

// out = beta * self + alpha * mat1 . mat2, of torch's C shim (torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h):
// torch's stable ABI has no conversion of the operator's Scalars. Null if torch has none.
using AddmmOut = AOTITorchError (*)(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1,
                                    AtenTensorHandle mat2, double beta, double alpha);
AddmmOut addmm_out();

}  // namespace pop
