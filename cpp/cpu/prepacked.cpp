// torch keeps its oneDNN to itself. What it offers is the operator that it compiles models to,
// mkldnn::_linear_pointwise, which returns a new tensor. It takes strings, which the dispatcher's stable form leaks up
// to torch 2.13, so it is called by torch's C shim.
#include "cpu/prepacked.h"

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <utility>

#include "cpu/parallel.h"
#include "torch/aten.h"

namespace pop::cpu {
namespace {

using torch::stable::Tensor;

constexpr const char *kReorder = "mkldnn::_reorder_linear_weight", *kLinear = "mkldnn::_linear_pointwise";
// Rows of a product at once: its result, which is copied to its place, should still be in the cache, and its memory not
// grow with the prompt.
constexpr int64_t kRowsAtOnce = 1024;
// Rows that weights are packed for. Products of 13 to 2048 rows read that layout at the full rate (oneDNN of
// torch 2.13).
constexpr int64_t kRowsInMind = 512;

// torch/csrc/inductor/aoti_torch/c/shim_cpu.h
using LinearPointwise = AOTITorchError (*)(AtenTensorHandle x, AtenTensorHandle w, AtenTensorHandle* bias,
                                           const char* attr, const double** scalars, int64_t scalars_len,
                                           const char** algorithm, AtenTensorHandle* out);

LinearPointwise linear_pointwise() {
  static const auto function =
      reinterpret_cast<LinearPointwise>(dlsym(RTLD_DEFAULT, "aoti_torch_cpu__linear_pointwise"));
  return function;
}

class Packed final : public PackedWeight {
 public:
  explicit Packed(Tensor tensor) : tensor_(std::move(tensor)) {}
  AtenTensorHandle handle() const { return tensor_.get(); }

 private:
  Tensor tensor_;
};

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace

std::string prepack_missing(DType dtype) {
  if (dtype != DType::bf16) return std::string("expected bfloat16 weights, got ") + to_string(dtype);
  if (!multiplies_bfloat16()) return "expected a processor with AVX-512 BF16, got one without";
  for (const char* name : {kReorder, kLinear}) {
    const std::string reason = foreign::reason_against(name);
    if (!reason.empty()) return std::string("expected a ") + name + " of a known schema, got another " + reason;
  }
  if (linear_pointwise() != nullptr) return "";
  return "expected a torch with aoti_torch_cpu__linear_pointwise in its C shim, got one without";
}

std::unique_ptr<PackedWeight> prepack(const PrepackParams& p) {
  using torch::stable::detail::from;
  const Tensor plain = torch::stable::contiguous(aten::host_matrix(p.dtype, p.w, p.n, p.k, p.w_stride));
  const std::optional<int64_t> rows = kRowsInMind;
  return std::make_unique<Packed>(aten::call_for_tensor(kReorder, "", std::array{from(plain), from(rows)}));
}

void packed_gemm(const GemmParams& p) {
  foreign::require(kLinear);
  const AtenTensorHandle w = static_cast<const Packed*>(p.packed)->handle();
  Tensor a = aten::host_matrix(p.dtype, p.a, p.m, p.k, p.a_stride),
         out = aten::host_matrix(p.dtype, p.out, p.m, p.n, p.out_stride);
  const int64_t rows_at_once = ceil_div(p.m, ceil_div(p.m, kRowsAtOnce));
  for (int64_t begin = 0; begin < p.m; begin += rows_at_once) {
    const int64_t rows = std::min(rows_at_once, p.m - begin);
    const Tensor some = torch::stable::narrow(a, 0, begin, rows);
    AtenTensorHandle handle = nullptr;
    if (linear_pointwise()(some.get(), w, nullptr, "none", nullptr, 0, nullptr, &handle) != 0) {
      throw std::runtime_error(std::string(kLinear) + ": " + aten::last_error());
    }
    const Tensor product(handle);
    Tensor place = torch::stable::narrow(out, 0, begin, rows);
    torch::stable::copy_(place, product);
  }
}

}  // namespace pop::cpu
