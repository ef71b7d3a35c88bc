// For ThreadSanitizer, preloaded before torch's libgomp, which is not compiled with it: tells it that a parallel region
// begins after what its caller did, and that the caller goes on after all threads of the region have ended.
#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

#include <cstdlib>

namespace {

struct Region {
  void (*body)(void*);
  void* data;
};

void run(void* context) {
  const Region& region = *static_cast<const Region*>(context);
  __tsan_acquire(context);
  region.body(region.data);
  __tsan_release(context);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void GOMP_parallel(void (*body)(void*), void* data, unsigned threads,
                                                                     unsigned flags) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const Parallel next = reinterpret_cast<Parallel>(dlsym(RTLD_NEXT, "GOMP_parallel"));
  if (next == nullptr) std::abort();  // no other library has it, and none but this one was asked for it
  Region region{body, data};
  __tsan_release(&region);
  next(run, &region, threads, flags);
  __tsan_acquire(&region);
}
