// What the backend asks of the CUDA runtime beside its kernels, without the toolkit's headers.
// Under the CPU shim (tests/cuda_shim) there is one device, everything is in order, and nothing is asynchronous.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "cuda/kernels.h"

namespace pop::cuda {

struct DeviceFacts {
  int major, minor;  // compute capability
  int code;          // that of the code which runs there, times ten: less than the device's where that was translated
  int sm_count;
};

// Makes a device the current one of this library's CUDA runtime, which is linked statically and beside torch's.
void set_device(int device);

// Of the current device.
const DeviceFacts& device_facts();

// While one lives, this thread's launches of kernels made for it start early (launch.cuh). What such kernels load
// before those in front have ended must have been there before a kernel that `launch` launched.
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

// Where a kernel reports, without a synchronisation, that it met an id outside the vocabulary:
// host memory that the current device writes to.
int32_t* bad_id_flag();
// Whether one was reported since the last time somebody asked.
bool take_bad_id();

// Rows of `row_bytes`, strides in bytes, between places of the current device.
void copy_rows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t row_bytes, int64_t rows,
               Stream stream) noexcept;

// Copies to host memory and waits until it is there. A stream that is being captured cannot be waited for: throws
// std::runtime_error with `why` then.
void copy_to_host(void* to, const void* from, size_t bytes, Stream stream, const char* why);

}  // namespace pop::cuda
