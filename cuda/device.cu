#include "cuda/device.h"

#include <algorithm>
#include <array>
#include <mutex>
#include <vector>

#include "cuda/launch.cuh"

namespace pop::cuda {

namespace {

constexpr int kMaxDevices = 64;

}  // namespace

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device >= kMaxDevices) throw std::runtime_error("pop: CUDA: expected a device below 64");
  return device;
}

void set_device(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }

__global__ void probe_kernel() {}

const DeviceFacts& device_facts() {
  static std::array<DeviceFacts, kMaxDevices> facts;
  static std::array<std::once_flag, kMaxDevices> once;
  const int device = current_device();
  std::call_once(once[device], [&] {
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
      return value;
    };
    cudaFuncAttributes probe{};
    check(cudaFuncGetAttributes(&probe, reinterpret_cast<const void*>(probe_kernel)), "cudaFuncGetAttributes");
    facts[device] = {.major = attribute(cudaDevAttrComputeCapabilityMajor),
                     .minor = attribute(cudaDevAttrComputeCapabilityMinor),
                     .code = probe.ptxVersion,
                     .sm_count = attribute(cudaDevAttrMultiProcessorCount),
                     .sm_threads = attribute(cudaDevAttrMaxThreadsPerMultiProcessor),
                     .block_shared_bytes = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin))};
  });
  return facts[device];
}

namespace {

// "13.0", of 13000.
std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

std::string device_missing(int device) {
  int driver = 0, runtime = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  const auto failed = [](cudaError_t error) {
    static_cast<void>(cudaGetLastError());  // else the next call of the runtime reports it
    return error != cudaSuccess;
  };
  // Minor versions are compatible with each other.
  if (driver / 1000 < runtime / 1000) {
    return "expected a driver for CUDA " + version_text(runtime / 1000 * 1000) + " or later, got one for CUDA " +
           version_text(driver);
  }
  if (const cudaError_t error = cudaSetDevice(device); failed(error)) return cudaGetErrorString(error);
  cudaFuncAttributes probe{};
  if (!failed(cudaFuncGetAttributes(&probe, reinterpret_cast<const void*>(probe_kernel)))) return "";
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  return "expected a compute capability that this build has code for (" POP_CUDA_ARCHITECTURES "), got " +
         std::to_string(major) + "." + std::to_string(minor);
}

namespace {

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

struct Flag {
  volatile int32_t* host = nullptr;
  int32_t* device = nullptr;
};

Flag& flag() {
  static std::array<Flag, kMaxDevices> flags;
  static std::array<std::once_flag, kMaxDevices> once;
  const int device = current_device();
  std::call_once(once[device], [&] {
    void *host = nullptr, *mapped = nullptr;
    check(cudaHostAlloc(&host, sizeof(int32_t), cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc");
    check(cudaHostGetDevicePointer(&mapped, host, 0), "cudaHostGetDevicePointer");
    flags[device].host = static_cast<volatile int32_t*>(host);
    flags[device].device = static_cast<int32_t*>(mapped);
    *flags[device].host = 0;
  });
  return flags[device];
}

}  // namespace

int32_t* bad_id_flag() { return flag().device; }

bool take_bad_id() {
  volatile int32_t* const reported = flag().host;
  if (*reported == 0) return false;
  *reported = 0;
  return true;
}

void copy_rows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t row_bytes, int64_t rows,
               Stream stream) noexcept {
  if (rows == 0 || row_bytes == 0) return;
  // The stride of a single row has no meaning, and cudaMemcpy2DAsync refuses one below the width.
  if (rows == 1) to_stride = from_stride = row_bytes;
  // Only a device that failed before can fail here, and that error is already on its way to the caller.
  static_cast<void>(
      cudaMemcpy2DAsync(to, to_stride, from, from_stride, row_bytes, rows, cudaMemcpyDeviceToDevice, stream));
}

void copy_to_host(void* to, const void* from, size_t bytes, Stream stream, const char* why) {
  if (is_capturing(stream)) throw std::runtime_error(std::string(why) + ": it cannot be captured into a CUDA graph");
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

}  // namespace pop::cuda
