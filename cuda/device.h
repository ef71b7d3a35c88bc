// The calls of the CUDA runtime that the backend needs, without the toolkit's headers. Under the CPU shim
// (tests/gpu/cuda_shim) there is one device, and every call is synchronous.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "cuda/kernels.h"

namespace pop::cuda {

struct DeviceFacts {
  int major, minor;  // compute capability
  int code;  // 10 * compute capability of the compiled code that runs there; below the device's if it was translated
  int sm_count;
  int sm_threads;             // that an SM holds at once
  size_t block_shared_bytes;  // the most shared memory that a block can be given
};

int current_device();

// Makes a device the current one of this library's CUDA runtime, which is linked statically and separate from torch's.
void set_device(int device);

// Of the current device.
const DeviceFacts& device_facts();

// The reason why the kernels cannot run on a device: its driver or its architecture; empty if they can.
std::string device_missing(int device);

// While one lives, launch_early of this thread starts kernels early (launch.cuh). What such kernels load before their
// wait must have been written before the last kernel that `launch` launched.
class EarlyLaunches {
 public:
  EarlyLaunches() : before_(wanted()) { wanted() = true; }
  ~EarlyLaunches() { wanted() = before_; }
  EarlyLaunches(const EarlyLaunches&) = delete;
  EarlyLaunches& operator=(const EarlyLaunches&) = delete;

  static bool& wanted() {
    static thread_local bool value = false;
    return value;
  }

 private:
  bool before_;
};

// The flag with which a kernel reports an id outside of the vocabulary, without a synchronisation: host memory that the
// current device writes to.
int32_t* bad_id_flag();
// True if an id was reported since the last call.
bool take_bad_id();

// Copies rows of `row_bytes` within the current device; strides in bytes.
void copy_rows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t row_bytes, int64_t rows,
               Stream stream) noexcept;

// Copies to host memory and waits for it. Throws std::runtime_error with `why` if the stream is being captured, since
// it cannot be waited for then.
void copy_to_host(void* to, const void* from, size_t bytes, Stream stream, const char* why);

}  // namespace pop::cuda
