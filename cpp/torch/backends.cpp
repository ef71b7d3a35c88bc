#include "torch/backends.h"

#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "core/text.h"
#include "cpu/cpu_backend.h"
#include "cpu/gemm.h"
#include "torch/checks.h"

#if defined(POP_WITH_CUDA)
#include "cuda/host/cuda_backend.h"
#endif

namespace pop {

#if defined(POP_WITH_CUDA)

namespace {

// Under the shim the CUDA backend works on host memory and replaces the CPU backend.
bool takes_cuda_backend([[maybe_unused]] const Tensor& tensor) {
#if defined(POP_CUDA_SHIM)
  return true;
#else
  return tensor.is_cuda();
#endif
}

}  // namespace

struct BackendOfCall::Device {
  explicit Device(const Tensor& like) : backend(like.is_cuda() ? like.get_device_index() : 0) {}

  CudaBackend backend;
};

BackendOfCall::BackendOfCall(const Tensor& like) {
  if (takes_cuda_backend(like)) {
    device_ = std::make_unique<Device>(like);
    backend_ = &device_->backend;
  } else {
    backend_ = &cpu_backend();
  }
}

int64_t tune(const std::string& option, int64_t value) {
  return option == "gemm_blocks" ? cpu::set_gemm_blocks(value) : set_thread_option(option, value);
}

void check_reported_ids(const Tensor& like) {
  if (takes_cuda_backend(like)) CudaBackend::check_reported_ids(like.is_cuda() ? like.get_device_index() : 0);
}

std::string device_missing(const Tensor& like) {
  return takes_cuda_backend(like) ? CudaBackend::device_missing(like.is_cuda() ? like.get_device_index() : 0) : "";
}

#else

struct BackendOfCall::Device {};

BackendOfCall::BackendOfCall(const Tensor&) : backend_(&cpu_backend()) {}

int64_t tune(const std::string& option, int64_t value) {
  if (option == "gemm_blocks") return cpu::set_gemm_blocks(value);
  throw std::runtime_error("pop::tune: option: expected gemm_blocks, or a build with CUDA kernels, got one without (" +
                           shortened(option) + ")");
}

void check_reported_ids(const Tensor&) {}

std::string device_missing(const Tensor& like) {
  return like.is_cuda() ? "expected a build with CUDA kernels (nvcc when it is installed), got one without" : "";
}

#endif

BackendOfCall::~BackendOfCall() = default;

}  // namespace pop
