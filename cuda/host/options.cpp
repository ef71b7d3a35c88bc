#include "cuda/host/options.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <utility>

#include "core/text.h"
#include "cuda/kernels.h"

namespace pop {

namespace {

struct Option {
  const char* name;
  int64_t CudaOptions::* value;
  int64_t most;  // values are clamped to [0, most]
};

constexpr int64_t kFlag = 1, kAnyRows = int64_t{1} << 40;
constexpr std::array kOptions{Option{"skinny_rows", &CudaOptions::skinny_rows, cuda::kSkinnyRows},
                              Option{"skinny_mma_rows", &CudaOptions::skinny_mma_rows, cuda::kSkinnyRows},
                              Option{"library_attention", &CudaOptions::library_attention, kFlag},
                              Option{"sdpa_rows", &CudaOptions::sdpa_rows, kAnyRows},
                              Option{"residual_in_product", &CudaOptions::residual_in_product, kFlag},
                              Option{"qkv_in_one_product", &CudaOptions::qkv_in_one_product, kFlag},
                              Option{"grouped_experts", &CudaOptions::grouped_experts, kFlag},
                              Option{"early_launch", &CudaOptions::early_launch, kFlag},
                              Option{"fused_kv_project", &CudaOptions::fused_kv_project, 2},
                              Option{"kv_project_halves", &CudaOptions::kv_project_halves, kFlag},
                              Option{"kv_project_kib", &CudaOptions::kv_project_kib, 1 << 20}};

CudaOptions& options() {
  static thread_local CudaOptions instance;
  return instance;
}

}  // namespace

const CudaOptions& thread_options() { return options(); }

int64_t set_thread_option(const std::string& name, int64_t value) {
  for (const Option& option : kOptions) {
    if (name == option.name) return std::exchange(options().*option.value, std::clamp<int64_t>(value, 0, option.most));
  }
  std::string known = "gemm_blocks";
  for (const Option& option : kOptions) {
    known += (&option == &kOptions.back() ? " or " : ", ") + std::string(option.name);
  }
  throw std::runtime_error("pop::tune: option: expected " + known + ", got " + shortened(name));
}

}  // namespace pop
