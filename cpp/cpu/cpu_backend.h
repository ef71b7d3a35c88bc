// The CPU backend: the kernels of the running processor on torch's threads.
#pragma once

#include <memory>

#include "backend.h"

namespace pop {

std::unique_ptr<Backend> make_cpu_backend();

// One for all: it holds no state.
Backend& cpu_backend();

}  // namespace pop
