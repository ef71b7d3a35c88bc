// Gathers rows of the embedding table, or of the caller's embeddings, or of cos and sin, into batch order.
//
// Floor: rows * width elements read and as many written, and 8 bytes of index per row (16 with ids). Scaled rows have a
// kernel of their own, with one element per thread and step: it runs once per prefill.
#include <algorithm>
#include <bit>

#include "cuda/elements.cuh"
#include "cuda/launch.cuh"

namespace pop::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;  // words in flight per thread

using Word16 = Elements<uint32_t, 4>;

// Elements are only copied, so their type does not matter: a Word is 16 bytes, or one element.
template <class Word>
struct Gather {
  int64_t rows, words;  // of a row
  int64_t vocab_size;
  const int64_t* ids;
  const int64_t* row_source;
  const Word* table;
  int64_t table_stride;  // in words
  Word* out;
  int32_t* bad_id;
};

template <class Word>
__device__ __forceinline__ int64_t source_row(const Gather<Word>& p, int64_t row) {
  const int64_t source = p.row_source[row];
  if (p.ids == nullptr) return source;
  const int64_t id = p.ids[source];
  if (id >= 0 && id < p.vocab_size) return id;
  if (threadIdx.x == 0 && p.bad_id != nullptr) __stwt(p.bad_id, int32_t{1});
  return id < 0 ? 0 : p.vocab_size - 1;
}

// threadIdx.x runs along a row, threadIdx.y over the rows of the block.
template <class Word>
__global__ void __launch_bounds__(kThreads) embed_kernel(const Gather<Word> p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;
  const Word* from = p.table + source_row(p, row) * p.table_stride;
  Word* to = p.out + row * p.words;
  for (int64_t first = threadIdx.x; first < p.words; first += kAtOnce * blockDim.x) {
    Word held[kAtOnce] = {};
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t i = first + j * blockDim.x;
      if (i < p.words) held[j] = from[i];
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t i = first + j * blockDim.x;
      if (i < p.words) to[i] = held[j];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) embed_scaled_kernel(const Gather<T> p, float scale) {
  const T* from = p.table + source_row(p, blockIdx.x) * p.table_stride;
  T* to = p.out + blockIdx.x * p.words;
  for (int64_t i = threadIdx.x; i < p.words; i += blockDim.x) to[i] = from_float<T>(to_float(from[i]) * scale);
}

template <class Word>
Gather<Word> gather_of(const EmbedParams& p, int64_t elements_a_word, int32_t* bad_id) {
  return {.rows = p.rows,
          .words = p.width / elements_a_word,
          .vocab_size = p.vocab_size,
          .ids = p.ids,
          .row_source = p.row_source,
          .table = static_cast<const Word*>(p.table),
          .table_stride = p.table_stride / elements_a_word,
          .out = static_cast<Word*>(p.out),
          .bad_id = bad_id};
}

template <class Word>
void launch_gather(const EmbedParams& p, int64_t elements_a_word, int32_t* bad_id, Stream stream) {
  const Gather<Word> gather = gather_of<Word>(p, elements_a_word, bad_id);
  const unsigned across =
      static_cast<unsigned>(std::bit_ceil(static_cast<uint64_t>(std::min<int64_t>(gather.words, kThreads))));
  const dim3 block(across, kThreads / across);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.rows, block.y)));
  launch("embed", embed_kernel<Word>, grid, block, 0, stream, gather);
}

}  // namespace

void launch_embed(const EmbedParams& p, int32_t* bad_id, Stream stream) {
  if (p.rows == 0 || p.width == 0) return;
  if (p.scale != 1.0f) {
    with_element(p.dtype, [&](auto type) {
      using T = decltype(type);
      launch("embed", embed_scaled_kernel<T>, dim3(static_cast<unsigned>(p.rows)), dim3(kThreads), 0, stream,
             gather_of<T>(p, 1, bad_id), p.scale);
    });
    return;
  }
  const int64_t element = p.dtype == DType::f32 ? 4 : 2;
  if (is_aligned(p.table, p.table_stride, element) && is_aligned(p.out, p.width, element)) {
    launch_gather<Word16>(p, 16 / element, bad_id, stream);
  } else if (element == 4) {
    launch_gather<uint32_t>(p, 1, bad_id, stream);
  } else {
    launch_gather<uint16_t>(p, 1, bad_id, stream);
  }
}

}  // namespace pop::cuda
