// The backend for a tensor's device, for one call of an operator.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <string>

#include "backend/backend.h"

namespace pop {

class BackendOfCall {
 public:
  // Makes the device of `like` the current one; its backend works on torch's current stream there.
  explicit BackendOfCall(const torch::stable::Tensor& like);
  ~BackendOfCall();
  BackendOfCall(const BackendOfCall&) = delete;
  BackendOfCall& operator=(const BackendOfCall&) = delete;

  Backend& operator*() const { return *backend_; }
  Backend* operator->() const { return backend_; }

 private:
  struct Device;
  std::unique_ptr<Device> device_;
  Backend* backend_;
};

// Sets an option of a backend by name for calls of this thread, and returns the value before; throws for an unknown
// name. docs/ops.md lists the options.
int64_t tune(const std::string& option, int64_t value);

// Throws if a kernel of an earlier call met an id outside of the vocabulary (CUDA only; ids on a CPU are checked before
// the call).
void check_reported_ids(const torch::stable::Tensor& like);

// The reason why the kernels of this build cannot run on the device of `like`; empty if they can.
std::string device_missing(const torch::stable::Tensor& like);

}  // namespace pop
