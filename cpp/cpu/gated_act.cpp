// The activation of the gated MLP: gate = act(gate + gate_bias) * (up + up_bias), rounded once.
#include "cpu/row_kernels.h"
#include "cpu/vec.h"

namespace pop::cpu::POP_ISA {
namespace {

struct Silu {
  static POP_INLINE Vec apply(Vec x) { return silu(x); }
};
struct GeluTanh {
  static POP_INLINE Vec apply(Vec x) { return gelu_tanh(x); }
};
struct Gelu {
  static POP_INLINE Vec apply(Vec x) { return gelu(x); }
};

template <class T, class Act>
void gated_act_rows(const GatedActParams& p, int64_t begin, int64_t end) {
  const T* gate_bias = static_cast<const T*>(p.gate_bias);
  const T* up_bias = static_cast<const T*>(p.up_bias);
  for (int64_t row = begin; row < end; ++row) {
    T* gate = static_cast<T*>(p.gate) + row * p.gate_stride;
    const T* up = static_cast<const T*>(p.up) + row * p.up_stride;
    for (int64_t i = 0; i < p.width; i += kLanes) {
      const int64_t count = p.width - i;
      Vec g = load_upto(gate + i, count);
      Vec u = load_upto(up + i, count);
      if (gate_bias != nullptr) g += load_upto(gate_bias + i, count);
      if (up_bias != nullptr) u += load_upto(up_bias + i, count);
      store_upto(gate + i, Act::apply(g) * u, count);
    }
  }
}

template <class T>
POP_INLINE void with_activation(const GatedActParams& p, int64_t begin, int64_t end) {
  switch (p.activation) {
    case Activation::silu:
      return gated_act_rows<T, Silu>(p, begin, end);
    case Activation::gelu_tanh:
      return gated_act_rows<T, GeluTanh>(p, begin, end);
    case Activation::gelu:
      return gated_act_rows<T, Gelu>(p, begin, end);
  }
}

}  // namespace

void gated_act(const GatedActParams& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) { with_activation<decltype(element)>(p, begin, end); });
}

}  // namespace pop::cpu::POP_ISA
