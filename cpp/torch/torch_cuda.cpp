#include "torch/torch_cuda.h"

#if defined(POP_CUDA_SHIM)

namespace pop {

struct DeviceScope::Guard {};
DeviceScope::DeviceScope(int) {}
DeviceScope::~DeviceScope() = default;
cuda::Stream current_stream(int) { return nullptr; }
StreamScope::StreamScope(cuda::Stream, int) {}
StreamScope::~StreamScope() = default;

}  // namespace pop

#else

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>

#include "cuda/device.h"

namespace pop {

namespace {

// Not `torch::stable::accelerator::getCurrentStream`: the id it gives is torch's, no cudaStream_t.
struct Functions {
  int32_t (*get_current_stream)(int32_t device, void** stream);
  int32_t (*create_stream_guard)(void* stream, int32_t device, void** guard);
  int32_t (*delete_stream_guard)(void* guard);
};

const Functions& functions() {
  static const Functions found = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    if (library == nullptr) throw std::runtime_error("pop: CUDA: expected a torch with CUDA, got one without");
    const auto look_up = [&](const char* name) {
      void* const symbol = dlsym(library, name);
      if (symbol == nullptr) throw std::runtime_error(std::string("pop: CUDA: libtorch_cuda has no ") + name);
      return symbol;
    };
    return Functions{
        reinterpret_cast<decltype(Functions::get_current_stream)>(look_up("aoti_torch_get_current_cuda_stream")),
        reinterpret_cast<decltype(Functions::create_stream_guard)>(look_up("aoti_torch_create_cuda_stream_guard")),
        reinterpret_cast<decltype(Functions::delete_stream_guard)>(look_up("aoti_torch_delete_cuda_stream_guard"))};
  }();
  return found;
}

void check(int32_t error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("pop: CUDA: torch failed at ") + what);
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
  check(functions().get_current_stream(device, &stream), "its current stream");
  return static_cast<cuda::Stream>(stream);
}

StreamScope::StreamScope(cuda::Stream stream, int device) {
  check(functions().create_stream_guard(stream, device, &guard_), "setting its current stream");
}

StreamScope::~StreamScope() { functions().delete_stream_guard(guard_); }

}  // namespace pop

#endif
