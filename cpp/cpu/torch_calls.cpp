#include "cpu/torch_calls.h"

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <utility>

#include "core/math.h"
#include "torch/aten.h"

namespace pop::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const torch::stable::Device kCpu(torch::headeronly::DeviceType::CPU);

// torch does not export its oneDNN. It offers mkldnn::_linear_pointwise, the operator that compiled models call, which
// returns a new tensor. That operator takes strings, which the dispatcher's stable form leaks up to torch 2.13, so it
// is called through torch's C shim.
constexpr const char *kReorder = "mkldnn::_reorder_linear_weight", *kLinear = "mkldnn::_linear_pointwise";
// Rows of a prepacked product at once. Its result is copied, so it should still be in the cache, and its memory must
// not grow with the prompt.
constexpr int64_t kRowsAtOnce = 1024;
// The row count that weights are packed for. Products of 13 to 2048 rows read that layout at the full rate (oneDNN of
// torch 2.13).
constexpr int64_t kPackedForRows = 512;

// torch/csrc/inductor/aoti_torch/c/shim_cpu.h
using LinearPointwise = AOTITorchError (*)(AtenTensorHandle x, AtenTensorHandle w, AtenTensorHandle* bias,
                                           const char* attr, const double** scalars, int64_t scalars_len,
                                           const char** algorithm, AtenTensorHandle* out);

LinearPointwise linear_pointwise() {
  static const auto function =
      reinterpret_cast<LinearPointwise>(dlsym(RTLD_DEFAULT, "aoti_torch_cpu__linear_pointwise"));
  return function;
}

// mkl.h; null where torch has no MKL. Returns the number before.
using SetThreads = int (*)(int threads);

SetThreads set_mkl_threads() {
  static const auto function = reinterpret_cast<SetThreads>(dlsym(RTLD_DEFAULT, "MKL_Set_Num_Threads_Local"));
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

Tensor view(const HostMatrix& m) {
  const ScalarType type = m.type == HostMatrix::Type::e4m3   ? ScalarType::Float8_e4m3fn
                          : m.type == HostMatrix::Type::int8 ? ScalarType::Char
                                                             : aten::scalar_type(m.dtype);
  return torch::stable::from_blob(const_cast<void*>(m.data), {m.rows, m.columns}, {m.stride, 1}, kCpu, type);
}

}  // namespace

int64_t num_threads() { return torch::stable::get_num_threads(); }

void parallel_for(int64_t first, int64_t last, int64_t grain, void (*body)(const void*, int64_t, int64_t),
                  const void* context) {
  torch::stable::parallel_for(first, last, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

OneMklThread::OneMklThread() {
  num_threads();  // torch sets the number in a thread's first call, which must not be one after this
  if (set_mkl_threads() != nullptr) before_ = set_mkl_threads()(1);
}

OneMklThread::~OneMklThread() {
  if (set_mkl_threads() != nullptr) set_mkl_threads()(before_);
}

void matmul(const GemmParams& p) { aten::matmul(p, kCpu); }

void convert(const HostMatrix& from, const HostMatrix& to) {
  Tensor out = view(to);
  torch::stable::copy_(out, view(from));
}

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
  const std::optional<int64_t> rows = kPackedForRows;
  return std::make_unique<Packed>(aten::call_for_tensor(kReorder, "", std::array{from(plain), from(rows)}));
}

void packed_matmul(const GemmParams& p) {
  foreign::require(kLinear);
  const AtenTensorHandle w = static_cast<const Packed*>(p.packed)->handle();
  Tensor a = aten::host_matrix(p.dtype, p.a, p.m, p.k, p.a_stride),
         out = aten::host_matrix(p.dtype, p.out, p.m, p.n, p.out_stride);
  const int64_t rows_at_once = ceil_div(p.m, ceil_div(p.m, kRowsAtOnce));
  for (int64_t begin = 0; begin < p.m; begin += rows_at_once) {
    const int64_t rows = std::min(rows_at_once, p.m - begin);
    const Tensor part = torch::stable::narrow(a, 0, begin, rows);
    AtenTensorHandle handle = nullptr;
    if (linear_pointwise()(part.get(), w, nullptr, "none", nullptr, 0, nullptr, &handle) != 0) {
      throw std::runtime_error(std::string(kLinear) + ": " + aten::last_error());
    }
    const Tensor product(handle);
    Tensor place = torch::stable::narrow(out, 0, begin, rows);
    torch::stable::copy_(place, product);
  }
}

}  // namespace pop::cpu
