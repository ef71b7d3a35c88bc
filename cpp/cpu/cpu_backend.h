// The CPU backend: the kernels of the running processor on torch's threads.
#pragma once

#include "backend.h"

namespace pop {

// One for all: it holds no state.
Backend& cpu_backend();

}  // namespace pop
