// cuda/device.h on the CPU: one device, and every call is synchronous.
#include "cuda/device.h"

#include <cuda_runtime.h>

#include <atomic>
#include <cstring>

namespace pop::cuda {

int current_device() { return 0; }

void set_device(int) {}

namespace {
// No library supports this device. Its size is that of an H200, so that work is cut as there.
DeviceFacts facts{
    .major = 0, .minor = 0, .code = 0, .sm_count = 132, .sm_threads = 2048, .block_shared_bytes = 227 << 10};
}  // namespace

const DeviceFacts& device_facts() { return facts; }

std::string device_missing(int) { return ""; }

namespace {
std::atomic<int32_t> flag{0};
}

int32_t* bad_id_flag() { return reinterpret_cast<int32_t*>(&flag); }
bool take_bad_id() { return flag.exchange(0) != 0; }

void copy_rows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t row_bytes, int64_t rows,
               Stream) noexcept {
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(static_cast<char*>(to) + row * to_stride, static_cast<const char*>(from) + row * from_stride,
                row_bytes);
  }
}

void copy_to_host(void* to, const void* from, size_t bytes, Stream, const char*) { std::memcpy(to, from, bytes); }

}  // namespace pop::cuda

void cuda_shim::set_block_shared_bytes(size_t bytes) { pop::cuda::facts.block_shared_bytes = bytes; }
void cuda_shim::set_sm_count(int count) { pop::cuda::facts.sm_count = count; }
