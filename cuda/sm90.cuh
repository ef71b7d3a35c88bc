// Hopper (sm_90a) instructions that CUDA C++ does not have, one function each, and their host side. The quoted names
// are sections of the PTX ISA manual. The CPU shim uses tests/gpu/cuda_shim/sm90_emulated.h instead of this file.
#pragma once

#include <cudaTypedefs.h>

#include <algorithm>
#include <map>
#include <tuple>

#include "cuda/launch.cuh"

namespace pop::cuda::sm90 {

using Barrier = uint64_t;  // an mbarrier in shared memory
using TensorMap = CUtensorMap;

// ---- Shared memory, threads and clusters ---------------------------------------------------

// "Generic Addressing": the address of a generic pointer in the shared window.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The dynamic shared memory from its first multiple of 1024 on, as the 128-byte swizzle requires: the same offset in
// every block of a cluster. The launch must request kSharedSlack bytes more.
inline constexpr size_t kSharedSlack = 1024 - 128;
template <class T>
__device__ __forceinline__ T& shared_memory() {
  unsigned char* base = dynamic_shared<unsigned char>();
  return *reinterpret_cast<T*>(base + (-shared_address(base) & 1023u));
}

// "Special Registers: %cluster_ctarank": this block's number within its cluster.
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// "Special Registers: %clusterid": this cluster's number within the grid.
__device__ __forceinline__ int cluster_index() {
  uint32_t index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return static_cast<int>(index);
}

// "Special Registers: %nclusterid": clusters in the grid.
__device__ __forceinline__ int cluster_count() {
  uint32_t count;
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(count));
  return static_cast<int>(count);
}

// "barrier.cluster": waits for every thread of the cluster, and orders their memory accesses.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// "setmaxnreg": changes the registers of a warpgroup to `count` per thread.
template <int count>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// ---- mbarrier ------------------------------------------------------------------------------

// "mbarrier.init": a phase completes after `arrivals` arrivals and all bytes that are expected until then.
__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// "fence.mbarrier_init": makes initialised barriers visible to the cluster and the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// "mbarrier.arrive": one arrival, and `bytes` more bytes to wait for before the phase completes.
__device__ __forceinline__ void barrier_arrive_expecting(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// "mapa", "mbarrier.arrive": one arrival at the same barrier of block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive_at(Barrier* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// "mapa", "st.shared::cluster": stores 16 bytes at the same place in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ void store_at(float (&to)[4], int rank, float a, float b, float c, float d) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5};\n"
      "}" ::"r"(shared_address(to)),
      "r"(rank), "f"(a), "f"(b), "f"(c), "f"(d)
      : "memory");
}

// "mbarrier.try_wait": waits until the phase of this parity is complete. On a new barrier the wait for parity 1 returns
// at once. Arrivals and waits use the default scope, the block, also between the blocks of a cluster: they hand over no
// ordinary stores, only boxes that TMA wrote and space that it may write to. Cluster scope would put a fence of the
// whole GPU into every step.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, uint32_t parity) {
  uint32_t complete;
  do {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (complete == 0);
}

// ---- TMA -----------------------------------------------------------------------------------

// "prefetch.tensormap": fetches a tensor map ahead of its first use.
__device__ __forceinline__ void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// "cp.async.bulk.tensor": copies the box at (row, column) to shared memory of this block; elements outside of the
// matrix become zeros. All bytes of the box count towards `barrier` once they are written.
__device__ __forceinline__ void load_box(const TensorMap& map, void* to, Barrier* barrier, int row, int column) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// The same for every block whose bit is set in `ranks`, with the same offsets of box and barrier.
__device__ __forceinline__ void load_box_multicast(const TensorMap& map, void* to, Barrier* barrier, int row,
                                                   int column, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(ranks)
      : "memory");
}

// ---- wgmma ---------------------------------------------------------------------------------

// "wgmma.fence": orders earlier accesses to the accumulators before later products.
__device__ __forceinline__ void multiply_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// "wgmma.commit_group": makes a group of the products issued since the last one.
__device__ __forceinline__ void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// "wgmma.wait_group": waits until at most `pending` groups are unfinished.
template <int pending>
__device__ __forceinline__ void multiply_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

#define POP_FLOATS_8(c, i)                                                                                    \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), \
      "+f"(c[i + 7])
#define POP_FLOATS_32(c, i) POP_FLOATS_8(c, i), POP_FLOATS_8(c, i + 8), POP_FLOATS_8(c, i + 16), POP_FLOATS_8(c, i + 24)

// "wgmma.mma_async": c = a . b^T (+ c to accumulate), a [64, 16] and b [256, 16] bf16 in shared memory,
// both K-major.
__device__ __forceinline__ void multiply_64x256x16(float (&c)[128], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, accumulate, 1, 1, 0, 0;\n"
      "}"
      : POP_FLOATS_32(c, 0), POP_FLOATS_32(c, 32), POP_FLOATS_32(c, 64), POP_FLOATS_32(c, 96)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

#undef POP_FLOATS_8
#undef POP_FLOATS_32

// Call after the wait. Tells the compiler that the accumulators change here, so that it moves no use of them forward.
__device__ __forceinline__ void multiply_done(float (&c)[128]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

// ---- Host ----------------------------------------------------------------------------------

// The driver's encoder of tensor maps, found through the runtime, since nothing links against libcuda. Null if the
// driver does not have it.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    const bool ok = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(ok ? entry : nullptr);
  }();
  return encoder;
}

// True if the current device is a Hopper and its driver encodes tensor maps. sm_90a code runs nowhere else.
inline bool available() {
  const DeviceFacts& device = device_facts();
  return device.major == 9 && device.minor == 0 && tensor_map_encoder() != nullptr;
}

// Describes the bf16 matrix [rows, columns], rows `stride` elements apart, in boxes of [box_rows, 64] that are written
// to shared memory with the 128-byte swizzle.
inline TensorMap tensor_map(const void* matrix, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  const cuuint64_t size[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t step[] = {1, 1};
  TensorMap map;
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) throw std::runtime_error("pop: CUDA: the driver has no cuTensorMapEncodeTiled");
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix), size, row_bytes,
                                 box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("pop: CUDA: cuTensorMapEncodeTiled: error " + std::to_string(result));
  }
  return map;
}

// How a kernel of clusters is launched.
struct ClusterShape {
  int cluster;  // blocks of a cluster
  int threads;  // of a block
  size_t shared_bytes;
};

// The configuration of a launch of `clusters` clusters.
struct ClusterLaunch {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  ClusterLaunch(const ClusterShape& shape, int clusters, Stream stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(clusters * shape.cluster));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;  // the configuration points to the attribute
  ClusterLaunch& operator=(const ClusterLaunch&) = delete;
};

// The number of clusters that can run at the same time. The driver knows it: a cluster must fit into one part of the
// GPU, and parts differ in size.
template <class... P>
int resident_clusters(const char* name, void (*kernel)(P...), const ClusterShape& shape) {
  const void* const code = reinterpret_cast<const void*>(kernel);
  // The driver takes some microseconds for its answer.
  static thread_local std::map<std::tuple<const void*, int, int>, int> known;
  int& resident = known[{code, current_device(), shape.cluster}];
  if (resident != 0) return resident;
  allow_shared_bytes(name, code, shape.shared_bytes);
  const ClusterLaunch one(shape, 1, nullptr);
  check(cudaOccupancyMaxActiveClusters(&resident, kernel, &one.config), name);
  if (resident == 0) throw std::runtime_error(std::string("pop: CUDA: ") + name + ": not one cluster fits the device");
  return resident;
}

// Launches as many clusters as can run at the same time, at most `most`.
template <class... P>
void launch_clusters(const char* name, void (*kernel)(P...), int most, const ClusterShape& shape, Stream stream,
                     const P&... args) {
  const ClusterLaunch launch(shape, std::min(most, resident_clusters(name, kernel, shape)), stream);
  allow_shared_bytes(name, reinterpret_cast<const void*>(kernel), shape.shared_bytes);
  check(cudaLaunchKernelEx(&launch.config, kernel, args...), name);
}

}  // namespace pop::cuda::sm90
