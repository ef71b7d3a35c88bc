#include "cuda/host/torch_cuda.h"

#if defined(POP_CUDA_SHIM)

namespace pop {

struct DeviceScope::Guard {};
DeviceScope::DeviceScope(int) {}
DeviceScope::~DeviceScope() = default;
cuda::Stream current_stream(int) { return nullptr; }

}  // namespace pop

#else

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>

#include "cuda/device.h"

namespace pop {

namespace {

// torch::stable::accelerator::getCurrentStream does not help: its id is torch's own, not a cudaStream_t.
using GetCurrentStream = int32_t (*)(int32_t device, void** stream);

GetCurrentStream get_current_stream() {
  static const GetCurrentStream found = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    if (library == nullptr) throw std::runtime_error("pop: CUDA: expected a torch with CUDA, got one without");
    constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
    void* const symbol = dlsym(library, kName);
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

}  // namespace pop

#endif
