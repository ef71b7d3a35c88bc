// Gathers rows of the embedding table (or of the caller's input embeddings) into batch order.
#include "cpu/row_kernels.h"

namespace pop::cpu::POP_ISA {

void embed(const EmbedParams& p, int64_t begin, int64_t end) {
  const int64_t element = p.dtype == DType::f32 ? 4 : 2;
  const char* table = static_cast<const char*>(p.table);
  char* out = static_cast<char*>(p.out);
  for (int64_t row = begin; row < end; ++row) {
    int64_t source = p.row_source[row];
    if (p.ids != nullptr) {
      // Ids are checked where they come in; a stray one must not read outside the table all the same.
      const int64_t id = p.ids[source];
      source = id < 0 ? 0 : (id < p.vocab_size ? id : p.vocab_size - 1);
    }
    __builtin_memcpy(out + row * p.width * element, table + source * p.table_stride * element, p.width * element);
  }
}

}  // namespace pop::cpu::POP_ISA
