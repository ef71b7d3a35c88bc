#include "torch/handles.h"

#include <mutex>
#include <unordered_map>

#include "torch/checks.h"

namespace pop {

namespace {

struct Registry {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<const LoadedModel>> models;
  int64_t next_handle = 1;
};

Registry& registry() {
  static Registry instance;
  return instance;
}

}  // namespace

int64_t register_model(std::shared_ptr<const LoadedModel> model) {
  std::lock_guard lock(registry().mutex);
  const int64_t handle = registry().next_handle++;
  registry().models.emplace(handle, std::move(model));
  return handle;
}

std::shared_ptr<const LoadedModel> find_model(int64_t handle) {
  std::lock_guard lock(registry().mutex);
  const auto found = registry().models.find(handle);
  check(found != registry().models.end(), "pop: model: expected a handle of pop::load that was not freed, got ",
        handle);
  return found->second;
}

void unregister_model(int64_t handle) {
  // Freed outside the lock: dropping the last reference to a weight may run Python code that calls this library.
  decltype(Registry::models)::node_type freed;
  {
    std::lock_guard lock(registry().mutex);
    freed = registry().models.extract(handle);
  }
  check(!freed.empty(), "pop::unload: model: expected a handle that was not freed, got ", handle);
}

}  // namespace pop
