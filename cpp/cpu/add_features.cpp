// Adds the features of a vision tower to the rows of its tokens (DeepStack).
#include "cpu/row_kernels.h"
#include "cpu/vec.h"

namespace pop::cpu::POP_ISA {
namespace {

template <class T>
POP_INLINE void add_row(const T* from, T* to, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes) {
    store_upto(to + i, load_upto(to + i, width - i) + load_upto(from + i, width - i), width - i);
  }
}

}  // namespace

void add_features(const AddFeaturesParams& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t feature = p.index[p.row_source[row]];
      if (feature < 0 || feature >= p.num_features) continue;
      add_row(static_cast<const T*>(p.features) + feature * p.features_stride, static_cast<T*>(p.out) + row * p.width,
              p.width);
    }
  });
}

}  // namespace pop::cpu::POP_ISA
