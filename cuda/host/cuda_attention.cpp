#include "cuda/host/cuda_attention.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <iostream>
#include <mutex>
#include <optional>
#include <set>
#include <string>

#include "torch/aten.h"

namespace pop {

namespace {

using aten::call;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

// Segments of one shape as a dense batch. Tensors are views of the caller's memory.
struct DenseBatch {
  int64_t batch, rows, keys;
  bool causal;    // false: every row sees all keys after the start of its window
  Tensor q, out;  // [batch, rows, heads, head_dim]
  Tensor k, v;    // [batch, keys, kv_heads, head_dim]
};

bool sees_ahead(const Segment& segment) { return segment.visible_end > segment.first_position + 1; }

DenseBatch dense_batch(const AttentionParams& p, int device) {
  const Segment& first = p.segments[0];
  const int64_t batch = p.num_segments, rows = first.rows, element = element_size(p.dtype);
  const int64_t end = std::max(first.first_position + rows, first.visible_end);
  // The libraries align the causal mask at the end. Keys before every row's window are left out.
  const int64_t begin = p.window == 0 ? 0 : std::max<int64_t>(0, first.first_position - p.window + 1);
  const torch::stable::Device where(torch::headeronly::DeviceType::CUDA, device);
  const auto view = [&](const void* data, int64_t offset, int64_t length, int64_t heads, int64_t batch_stride,
                        int64_t row_stride, int64_t head_stride) {
    char* base = static_cast<char*>(const_cast<void*>(data)) + offset * element;
    return torch::stable::from_blob(base, {batch, length, heads, p.head_dim},
                                    {batch_stride, row_stride, head_stride, 1}, where, aten::scalar_type(p.dtype));
  };
  const auto rows_of = [&](const void* data, int64_t stride) {
    return view(data, (first.first_row - p.first_row) * stride, rows, p.heads, rows * stride, stride, p.head_dim);
  };
  const auto cache_of = [&](const void* data, const CacheStrides& strides) {
    const int64_t offset = first.sequence * strides.batch + (first.cache_start + begin) * strides.slot;
    return view(data, offset, end - begin, p.kv_heads, strides.batch, strides.slot, strides.head);
  };
  return {.batch = batch,
          .rows = rows,
          .keys = end - begin,
          .causal = !sees_ahead(first),
          .q = rows_of(p.q, p.q_stride),
          .out = rows_of(p.out, p.out_stride),
          .k = cache_of(p.cache.key, p.cache.key_strides),
          .v = cache_of(p.cache.value, p.cache.value_strides)};
}

// A row sees itself and `window - 1` positions before it. The libraries count the positions before and after a row; -1
// means all.
int64_t window_left(const AttentionParams& p) { return p.window == 0 ? -1 : p.window - 1; }
int64_t window_right(const AttentionParams& p, const DenseBatch& b) { return p.window == 0 || !b.causal ? -1 : 0; }

void flash_attention_3(const AttentionParams& p, const DenseBatch& b) {
  const StableIValue none = from(std::nullopt);
  std::array<StableIValue, 34> stack;
  stack.fill(none);
  stack[0] = from(b.q);
  stack[1] = from(b.k);
  stack[2] = from(b.v);
  stack[6] = from(std::optional<Tensor>(b.out));
  stack[23] = from(std::optional<double>(p.scale));
  stack[24] = from(b.causal);
  stack[25] = from(window_left(p));
  stack[26] = from(window_right(p, b));
  stack[27] = from(int64_t{0});  // attention_chunk
  stack[28] = from(static_cast<double>(p.softcap));
  stack[29] = from(false);       // is_rotary_interleaved
  stack[31] = from(int64_t{0});  // num_splits: its choice
  stack[33] = from(int64_t{0});  // sm_margin
  call("flash_attn_3::fwd", "", stack);
  for (int i = 0; i < 4; ++i) to<Tensor>(stack[i]);  // the result is in b.out
}

void flash_attention_2(const AttentionParams& p, DenseBatch& b) {
  std::array stack{from(b.q),
                   from(b.k),
                   from(b.v),
                   from(0.0),
                   from(static_cast<double>(p.scale)),
                   from(b.causal),
                   from(window_left(p)),
                   from(window_right(p, b)),
                   from(static_cast<double>(p.softcap)),
                   from(std::nullopt),
                   from(false)};
  call("flash_attn::_flash_attn_forward", "", stack);
  const Tensor result = to<Tensor>(stack[0]);
  for (int i = 1; i < 4; ++i) to<Tensor>(stack[i]);
  torch::stable::copy_(b.out, result);
}

void torch_flash(const AttentionParams& p, DenseBatch& b) {
  const StableIValue none = from(std::nullopt);
  const auto optional_window = [&](int64_t value) {
    return p.window == 0 ? none : from(std::optional<int64_t>(value));
  };
  std::array<StableIValue, 17> stack;
  stack.fill(none);
  stack[0] = from(b.q);
  stack[1] = from(b.k);
  stack[2] = from(b.v);
  stack[5] = from(b.rows);
  stack[6] = from(b.keys);
  stack[7] = from(0.0);
  stack[8] = from(b.causal);
  stack[9] = from(false);
  stack[10] = from(std::optional<double>(p.scale));
  stack[11] = optional_window(window_left(p));
  stack[12] = optional_window(window_right(p, b));
  // Variant 0 ends with block_table and num_splits, both none. Variant 1 has no such arguments and does not read them.
  call("aten::_flash_attention_forward", "", stack);
  const Tensor result = to<Tensor>(stack[0]);
  for (int i = 1; i < 5; ++i) to<Tensor>(stack[i]);
  torch::stable::copy_(b.out, result);
}

// Rows [begin, end) of every sequence, and the keys up to the last of them.
DenseBatch some_rows(const DenseBatch& b, int64_t begin, int64_t end) {
  DenseBatch part = b;
  part.rows = end - begin;
  part.keys = b.keys - (b.rows - end);
  part.q = torch::stable::narrow(part.q, 1, begin, part.rows);
  part.out = torch::stable::narrow(part.out, 1, begin, part.rows);
  part.k = torch::stable::narrow(part.k, 1, 0, part.keys);
  part.v = torch::stable::narrow(part.v, 1, 0, part.keys);
  return part;
}

// torch's own choice among its kernels: cuDNN's on Hopper and Blackwell, twice as fast as its flash kernel there. Only
// for as many keys as rows: cuDNN aligns the causal mask at the start.
void torch_sdpa(const AttentionParams& p, DenseBatch& b) {
  // [batch, heads, rows, head_dim]
  const auto heads_first = [](Tensor& tensor) { return from(torch::stable::transpose(tensor, 1, 2)); };
  std::array stack{heads_first(b.q),
                   heads_first(b.k),
                   heads_first(b.v),
                   from(std::nullopt),
                   from(0.0),
                   from(true),
                   from(std::optional<double>(p.scale)),
                   from(p.heads != p.kv_heads)};
  call("aten::scaled_dot_product_attention", "", stack);
  Tensor result = to<Tensor>(stack[0]);
  torch::stable::copy_(b.out, torch::stable::transpose(result, 1, 2));
}

enum class Provider { none, flash_attention_3, flash_attention_2, torch_sdpa, torch_flash };

// The libraries use 16-byte accesses.
bool is_aligned(const AttentionParams& p) {
  const int64_t element = element_size(p.dtype);
  const auto aligned = [&](const void* data, std::initializer_list<int64_t> strides) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
           std::all_of(strides.begin(), strides.end(), [&](int64_t stride) { return stride * element % 16 == 0; });
  };
  const CacheStrides &k = p.cache.key_strides, &v = p.cache.value_strides;
  return aligned(p.q, {p.q_stride}) && aligned(p.out, {p.out_stride}) &&
         aligned(p.cache.key, {k.batch, k.head, k.slot}) && aligned(p.cache.value, {v.batch, v.head, v.slot});
}

Provider choose(const AttentionParams& p, int compute_capability, int64_t sdpa_rows) {
  const bool ampere = compute_capability >= 80, hopper = compute_capability == 90;
  if (p.sinks != nullptr) return Provider::none;  // no operator here has them
  if (p.dtype == DType::f32 || p.address.slot_table != nullptr || !ampere || p.num_segments == 0 || !is_aligned(p)) {
    return Provider::none;
  }
  // Windows count from the last key, so rows that see keys beyond the last row do not fit.
  const Segment& first = p.segments[0];
  if (p.window > 0 && first.visible_end > first.first_position + first.rows) return Provider::none;
  if (hopper && foreign::variant_of("flash_attn_3::fwd") >= 0) return Provider::flash_attention_3;
  const bool square = p.window == 0 && first.first_position == 0 && !sees_ahead(first) && p.softcap == 0.0f;
  // On Hopper and Blackwell cuDNN is about twice as fast as FlashAttention 2, whose code is Ampere's.
  if (sdpa_rows > 0 && first.rows >= sdpa_rows && square && compute_capability >= 90 &&
      foreign::variant_of("aten::scaled_dot_product_attention") >= 0 &&
      foreign::variant_of("aten::_flash_attention_forward") >= 0) {
    return Provider::torch_sdpa;
  }
  if (foreign::variant_of("flash_attn::_flash_attn_forward") >= 0) return Provider::flash_attention_2;
  if (p.softcap > 0.0f) return Provider::none;  // torch's operators have no cap
  return foreign::variant_of("aten::_flash_attention_forward") >= 0 ? Provider::torch_flash : Provider::none;
}

// Shapes that torch_sdpa refused: batch, rows, heads, KV heads, head_dim, dtype.
class RefusedShapes {
 public:
  using Shape = std::array<int64_t, 6>;

  bool has(const Shape& shape) {
    const std::lock_guard lock(mutex_);
    return shapes_.count(shape) != 0;
  }

  // Says so once in a process: what is slower than it could be should not stay unknown.
  void add(const Shape& shape, const char* reason) {
    const std::lock_guard lock(mutex_);
    if (shapes_.empty()) {
      std::cerr << "pop_ext: scaled_dot_product_attention failed for [batch, rows, heads, kv_heads, head_dim] = ["
                << shape[0] << ", " << shape[1] << ", " << shape[2] << ", " << shape[3] << ", " << shape[4]
                << "]; torch's flash kernel takes such shapes instead: " << reason << '\n';
    }
    shapes_.insert(shape);
  }

 private:
  std::mutex mutex_;
  std::set<Shape> shapes_;
};

RefusedShapes& refused_shapes() {
  static RefusedShapes instance;
  return instance;
}

// Errors that say nothing about the shape: memory that ran out, or a device that failed.
bool is_of_the_device(const std::string& error) {
  const auto has = [&](const char* text) { return error.find(text) != std::string::npos; };
  return has("out of memory") || has("CUDA error") || has("CUDA out of");
}

// The largest multiple of `sdpa_rows` rows by the kernel that needs a plan for every shape, the remaining rows by the
// one that needs none.
void sdpa_then_flash(const AttentionParams& p, DenseBatch& b, int64_t sdpa_rows) {
  int64_t done = b.rows - b.rows % sdpa_rows;
  const RefusedShapes::Shape shape{b.batch, done, p.heads, p.kv_heads, p.head_dim, static_cast<int64_t>(p.dtype)};
  if (refused_shapes().has(shape)) {
    done = 0;
  } else {
    DenseBatch squares = some_rows(b, 0, done);
    try {
      torch_sdpa(p, squares);
    } catch (const std::runtime_error& error) {
      if (is_of_the_device(error.what())) throw;
      // None of torch's kernels has a plan for this shape. Nothing has been written yet.
      refused_shapes().add(shape, error.what());
      done = 0;
    }
  }
  if (done == b.rows) return;
  DenseBatch rest = some_rows(b, done, b.rows);
  torch_flash(p, rest);
}

}  // namespace

bool library_attention(const AttentionParams& p, int device, int compute_capability, int64_t sdpa_rows) {
  const Provider provider = choose(p, compute_capability, sdpa_rows);
  if (provider == Provider::none) return false;
  DenseBatch batch = dense_batch(p, device);
  switch (provider) {
    case Provider::flash_attention_3:
      flash_attention_3(p, batch);
      break;
    case Provider::flash_attention_2:
      flash_attention_2(p, batch);
      break;
    case Provider::torch_sdpa:
      sdpa_then_flash(p, batch, sdpa_rows);
      break;
    default:
      torch_flash(p, batch);
  }
  return true;
}

}  // namespace pop
