// Integer arithmetic, on host and device.
#pragma once

#include "host_device.h"

namespace pop {

// a / b, rounded up; for a >= 0 and b > 0.
template <class A, class B>
POP_HD constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// The least multiple of `multiple` that is not below `value`; for value >= 0.
template <class A, class B>
POP_HD constexpr auto round_up(A value, B multiple) {
  return ceil_div(value, multiple) * multiple;
}

}  // namespace pop
