// The backend of a tensor's device, for one call of an operator.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <string>

#include "backend/backend.h"

namespace pop {

class BackendOfCall {
 public:
  // The device of `like` becomes the current one, and its backend works on torch's current stream there.
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

// Switches of the backends, by name; returns the value before, or throws on an unknown name. The names
// and their meanings are in docs/ops.md.
int64_t tune(const std::string& option, int64_t value);

// Throws if a kernel of an earlier call met an id outside the vocabulary (CUDA; elsewhere ids are checked before).
void check_reported_ids(const torch::stable::Tensor& like);

}  // namespace pop
