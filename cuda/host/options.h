// The options of the CUDA backend, for measuring one choice against another (docs/ops.md, tune).
#pragma once

#include <cstdint>
#include <string>

namespace pop {

struct CudaOptions {
  int64_t skinny_rows = 8;        // products of up to so many rows run in cuda/skinny_gemm.cu
  int64_t skinny_mma_rows = 0;    // products of 2 to so many rows of 16 bits run in cuda/skinny_mma.cu
  int64_t library_attention = 1;  // 0: all attention runs in cuda/attention.cu
  // Prompts without a past use aten::scaled_dot_product_attention (cuDNN's kernel on Hopper and Blackwell) for the
  // largest multiple of so many rows, and torch's flash kernel for the remaining rows. 0: the flash kernel alone. cuDNN
  // builds a plan for every new shape, some milliseconds once. Multiples of 64 bound their number, and leave at most 63
  // rows of a segment to another kernel: a batch's segments end before their boundary rows, so that a prompt of 512
  // tokens has 511 rows in one.
  int64_t sdpa_rows = 64;
  int64_t residual_in_product = 1;  // o_proj and down_proj of many rows add to the residual stream (beta = 1)
  int64_t qkv_in_one_product = 1;   // where their weights are adjacent rows of one matrix
  int64_t grouped_experts = 0;      // aten::_grouped_mm, without a wait of the host, where it serves
  int64_t early_launch = 0;         // kernels start before the previous ones have ended (cuda/launch.cuh)
  // 1, 2: runs are projected by cuda/kv_project_sm90.cu if it supports them. 2: it always gets rstd.
  int64_t fused_kv_project = 0;
  int64_t kv_project_halves = 0;  // 1: its tiles of the last round are cut in two where half of the device would idle
  int64_t kv_project_kib = 0;     // KiB of a run's [k | v] per product, at least one layer; 0: all layers
};

// The options of the calling thread. A backend copies them when a call of an operator begins, so a call sees one set of
// values, and no thread changes the calls of another.
const CudaOptions& thread_options();

// Sets an option of the calling thread by name and returns the value before. Throws std::runtime_error for an unknown
// name.
int64_t set_thread_option(const std::string& name, int64_t value);

}  // namespace pop
