// Python's signal handlers, for operators to run during a long call (torch/interrupts.h).
#pragma once

#include <pybind11/pybind11.h>

namespace pop {

// Adds interrupt_check() -> int, the address of a function `int()`, and take_interrupt() -> BaseException or None.
void bind_interrupts(pybind11::module_& m);

}  // namespace pop
