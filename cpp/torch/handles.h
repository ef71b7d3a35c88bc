// The integer handles of `pop::load`.
#pragma once

#include <cstdint>
#include <memory>

#include "torch/loaded_model.h"

namespace pop {

// Handles are never reused. A model outlives every call that uses it, even if it is unregistered meanwhile.
int64_t register_model(std::shared_ptr<const LoadedModel> model);
std::shared_ptr<const LoadedModel> find_model(int64_t handle);  // throws for a freed or unknown handle
void unregister_model(int64_t handle);                          // throws for such a handle, too

}  // namespace pop
