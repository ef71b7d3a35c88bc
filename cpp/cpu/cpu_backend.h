// The CPU backend: the kernels for this processor, on torch's threads.
#pragma once

#include "backend/backend.h"

namespace pop {

// One instance for all calls: it has no state.
Backend& cpu_backend();

}  // namespace pop
