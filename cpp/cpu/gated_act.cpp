// The activation of the gated MLP: out = act(gate + gate_bias) * (up + up_bias), rounded once.
#include "cpu/row_kernels.h"
#include "cpu/vec.h"

namespace pop::cpu::POP_ISA {
namespace {

struct Silu {
  static POP_INLINE Vec apply(const GatedActParams&, Vec gate, Vec up) { return silu(gate) * up; }
};
struct GeluTanh {
  static POP_INLINE Vec apply(const GatedActParams&, Vec gate, Vec up) { return gelu_tanh(gate) * up; }
};
struct Gelu {
  static POP_INLINE Vec apply(const GatedActParams&, Vec gate, Vec up) { return gelu(gate) * up; }
};
struct ClampedSwiglu {
  static POP_INLINE Vec apply(const GatedActParams& p, Vec gate, Vec up) {
    return clamped_swiglu(gate, up, p.swiglu_alpha, p.swiglu_limit);
  }
};

template <class T, class Act>
void gated_act_rows(const GatedActParams& p, int64_t begin, int64_t end) {
  const T* gate_bias = static_cast<const T*>(p.gate_bias);
  const T* up_bias = static_cast<const T*>(p.up_bias);
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(p.gate) + row * p.gate_stride;
    const T* up = static_cast<const T*>(p.up) + row * p.up_stride;
    T* out = static_cast<T*>(p.out) + row * p.out_stride;
    for (int64_t i = 0; i < p.width; i += kLanes) {
      const int64_t count = p.width - i, at = i * p.step;
      Vec g = load_upto(gate + at, count, p.step);
      Vec u = load_upto(up + at, count, p.step);
      if (gate_bias != nullptr) g += load_upto(gate_bias + at, count, p.step);
      if (up_bias != nullptr) u += load_upto(up_bias + at, count, p.step);
      store_upto(out + i, Act::apply(p, g, u), count);
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
    case Activation::clamped_swiglu:
      return gated_act_rows<T, ClampedSwiglu>(p, begin, end);
  }
}

}  // namespace

void gated_act(const GatedActParams& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) { with_activation<decltype(element)>(p, begin, end); });
}

}  // namespace pop::cpu::POP_ISA
