#include "cuda/host/torch_cuda.h"

#include <dlfcn.h>

#if defined(POP_CUDA_SHIM)

namespace pop {

struct DeviceScope::Guard {};
DeviceScope::DeviceScope(int) {}
DeviceScope::~DeviceScope() = default;
cuda::Stream current_stream(int) { return nullptr; }

AddmmOut addmm_out() {
  static const auto found = reinterpret_cast<AddmmOut>(dlsym(RTLD_DEFAULT, "aoti_torch_cpu_addmm_out"));
  return found;
}

}  // namespace pop

#else

#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>

#include "cuda/device.h"

namespace pop {

namespace {

// torch::stable::accelerator::getCurrentStream does not help: its id is torch's own, not a cudaStream_t.
using GetCurrentStream = int32_t (*)(int32_t device, void** stream);

// Null if libtorch_cuda has no function of that name.
void* torch_cuda_symbol(const char* name) {
  void* const library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  if (library == nullptr) throw std::runtime_error("pop: CUDA: expected a torch with CUDA, got one without");
  return dlsym(library, name);
}

GetCurrentStream get_current_stream() {
  static const GetCurrentStream found = [] {
    constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
    void* const symbol = torch_cuda_symbol(kName);
    if (symbol == nullptr) throw std::runtime_error(std::string("pop: CUDA: libtorch_cuda has no ") + kName);
    return reinterpret_cast<GetCurrentStream>(symbol);
  }();
  return found;
}

}  // namespace

struct __attribute__((visibility("hidden"))) DeviceScope::Guard {
  torch::stable::accelerator::DeviceGuard guard;
};

DeviceScope::DeviceScope(int device)
    : guard_(std::make_unique<Guard>(Guard{torch::stable::accelerator::DeviceGuard(device)})) {
  cuda::set_device(device);
}
DeviceScope::~DeviceScope() = default;

cuda::Stream current_stream(int device) {
  void* stream = nullptr;
  if (get_current_stream()(device, &stream) != 0) {
    throw std::runtime_error("pop: CUDA: torch failed at its current stream");
  }
  return static_cast<cuda::Stream>(stream);
}

AddmmOut addmm_out() {
  static const auto found = reinterpret_cast<AddmmOut>(torch_cuda_symbol("aoti_torch_cuda_addmm_out"));
  return found;
}

}  // namespace pop

#endif
