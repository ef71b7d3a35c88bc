// Kernels with an early launch that are right, and kernels with one fault each, for test_sass.py. Never run.
#include <cuda_pipeline.h>

#include "cuda/launch.cuh"

namespace {

using namespace pop::cuda;

struct Work {
  const float* x;
  const float* w;
  float* out;
  int count;
};

__device__ int index() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

__global__ void right_kernel(const Work p) {
  wait_for_kernels_in_front();
  let_kernel_behind_start();
  if (index() >= p.count) return;
  p.out[index()] = p.x[index()];
}

// A branch and a loop before the wait, and loads of weights.
// check_sass: right_weights_kernel loads 2 weights early
__global__ void right_weights_kernel(const Work p) {
  int i = index();
  while (i >= p.count) i -= p.count;
  float weight = 0.0f;
  if (p.w != nullptr) weight = p.w[i] + p.w[i + p.count];
  wait_for_kernels_in_front();
  let_kernel_behind_start();
  p.out[index()] = weight * p.x[index()];
}

__global__ void read_kernel(const Work p) {
  const float value = p.x[index()];
  wait_for_kernels_in_front();
  let_kernel_behind_start();
  p.out[index()] = value;
}

// check_sass: second_read_kernel loads 1 weights early
__global__ void second_read_kernel(const Work p) {
  const float value = p.w[index()] * p.x[index()];
  wait_for_kernels_in_front();
  let_kernel_behind_start();
  p.out[index()] = value;
}

__global__ void write_kernel(const Work p) {
  p.out[index()] = 0.0f;
  wait_for_kernels_in_front();
  let_kernel_behind_start();
}

__global__ void copy_kernel(const Work p) {
  __shared__ __align__(16) float tile[1024];
  __pipeline_memcpy_async(tile + 4 * threadIdx.x, p.x + 4 * index(), 16);
  __pipeline_commit();
  wait_for_kernels_in_front();
  let_kernel_behind_start();
  __pipeline_wait_prior(0);
  p.out[index()] = tile[threadIdx.x];
}

__global__ void exit_kernel(const Work p) {
  if (index() >= p.count) return;
  wait_for_kernels_in_front();
  let_kernel_behind_start();
  p.out[index()] = p.x[index()];
}

__global__ void trigger_kernel(const Work p) {
  let_kernel_behind_start();
  wait_for_kernels_in_front();
  p.out[index()] = p.x[index()];
}

__global__ void sometimes_kernel(const Work p) {
  if (p.count > 0) wait_for_kernels_in_front();
  let_kernel_behind_start();
  p.out[index()] = p.x[index()];
}

__global__ void never_kernel(const Work p) { p.out[index()] = p.x[index()]; }

}  // namespace

void launch_all(const Work& p, Stream stream) {
  for (const auto kernel : {right_kernel, right_weights_kernel, read_kernel, second_read_kernel, write_kernel,
                            copy_kernel, exit_kernel, trigger_kernel, sometimes_kernel, never_kernel}) {
    launch_early("planted", kernel, dim3(1), dim3(256), 0, stream, p);
  }
}
