// Gathers rows of the embedding table, or of the caller's input embeddings, into batch order, and scales them.
#include "cpu/row_kernels.h"
#include "cpu/vec.h"

namespace pop::cpu::POP_ISA {
namespace {

template <class T>
POP_INLINE void scale_row(const T* from, float scale, T* to, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes) store_upto(to + i, load_upto(from + i, width - i) * scale, width - i);
}

}  // namespace

void embed(const EmbedParams& p, int64_t begin, int64_t end) {
  const int64_t element = p.dtype == DType::f32 ? 4 : 2;
  const char* table = static_cast<const char*>(p.table);
  char* out = static_cast<char*>(p.out);
  for (int64_t row = begin; row < end; ++row) {
    int64_t source = p.row_source[row];
    if (p.ids != nullptr) {
      // The operator has checked the ids. Clamping them ensures that no id reads outside of the table.
      const int64_t id = p.ids[source];
      source = id < 0 ? 0 : (id < p.vocab_size ? id : p.vocab_size - 1);
    }
    const char* from = table + source * p.table_stride * element;
    char* to = out + row * p.width * element;
    if (p.scale == 1.0f) {
      __builtin_memcpy(to, from, p.width * element);
      continue;
    }
    with_element(p.dtype, [&](auto type) {
      using T = decltype(type);
      scale_row(reinterpret_cast<const T*>(from), p.scale, reinterpret_cast<T*>(to), p.width);
    });
  }
}

}  // namespace pop::cpu::POP_ISA
