// A library to preload: makes the n-th allocation of a kind fail, on the thread that asked for it.
//
// Kinds: 0, C++ allocations (operator new) of pop_ext's libraries, or of the standard library on their behalf; 1,
// memory of tensors (torch's CPU allocator takes it by posix_memalign); 2, like 0, of the operators' library alone.
#include <dlfcn.h>
#include <execinfo.h>
#include <link.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <new>

namespace {

thread_local int armed_kind = -1;
thread_local int64_t countdown = 0;  // fails at 0
thread_local int64_t seen = 0;
thread_local bool inside = false;

// The addresses of a library's code.
struct Range {
  const char* name;
  uintptr_t begin = 0, end = 0;

  bool contains(const void* address) const {
    const auto at = reinterpret_cast<uintptr_t>(address);
    return at >= begin && at < end;
  }
};
Range operators{"pop_ext/_ops"}, core{"pop_ext/_core"}, standard{"libstdc++"};

int find_ranges(dl_phdr_info* library, size_t, void*) {
  for (Range* range : {&operators, &core, &standard}) {
    if (std::strstr(library->dlpi_name, range->name) == nullptr) continue;
    for (int i = 0; i < library->dlpi_phnum; ++i) {
      const auto& segment = library->dlpi_phdr[i];
      if (segment.p_type != PT_LOAD || (segment.p_flags & PF_X) == 0) continue;
      range->begin = library->dlpi_addr + segment.p_vaddr;
      range->end = range->begin + segment.p_memsz;
    }
  }
  return 0;
}

bool is_ours(const void* address, int kind) {
  return operators.contains(address) || (kind == 0 && core.contains(address));
}

// True if the allocation belongs to pop_ext: called by it, or by the standard library that it called.
bool called_by_us(const void* caller, int kind) {
  if (is_ours(caller, kind)) return true;
  if (!standard.contains(caller)) return false;
  void* frames[12];
  const int count = backtrace(frames, 12);
  for (int i = 2; i < count; ++i) {
    if (!standard.contains(frames[i])) return is_ours(frames[i], kind);
  }
  return false;
}

// `memory`: of a tensor.
bool fails(bool memory, const void* caller) {
  if (armed_kind < 0 || (armed_kind == 1) != memory || inside) return false;
  inside = true;
  const bool counted = memory || called_by_us(caller, armed_kind);
  inside = false;
  if (!counted) return false;
  ++seen;
  return --countdown == 0;
}

void* allocate(size_t size, const void* caller) {
  void* memory = fails(false, caller) ? nullptr : std::malloc(size == 0 ? 1 : size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void* allocate_aligned(size_t size, size_t alignment, const void* caller) {
  void* memory =
      fails(false, caller) ? nullptr : std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

// Says where an exception ended the process.
[[maybe_unused]] const auto before = std::set_terminate([] {
  void* frames[40];
  backtrace_symbols_fd(frames, backtrace(frames, 40), STDERR_FILENO);
  std::abort();
});

}  // namespace

extern "C" {

// Lets allocation `number` (from 1) of `kind` on this thread fail; 0: none, only count.
void fail_allocation(int kind, int64_t number) {
  void* frame;
  backtrace(&frame, 1);  // loads its library, which allocates
  dl_iterate_phdr(find_ranges, nullptr);
  seen = 0;
  countdown = number;
  armed_kind = kind;
}

// Ends that, and returns how many allocations of the kind there were.
int64_t stop_failing() {
  armed_kind = -1;
  return seen;
}

int posix_memalign(void** memory, size_t alignment, size_t size) {
  using Function = int (*)(void**, size_t, size_t);
  static const auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "posix_memalign"));
  if (fails(true, __builtin_return_address(0))) return ENOMEM;
  return real(memory, alignment, size);
}
}

void* operator new(size_t size) { return allocate(size, __builtin_return_address(0)); }
void* operator new[](size_t size) { return allocate(size, __builtin_return_address(0)); }
void* operator new(size_t size, std::align_val_t align) {
  return allocate_aligned(size, static_cast<size_t>(align), __builtin_return_address(0));
}
void* operator new[](size_t size, std::align_val_t align) {
  return allocate_aligned(size, static_cast<size_t>(align), __builtin_return_address(0));
}
void* operator new(size_t size, const std::nothrow_t&) noexcept {
  return fails(false, __builtin_return_address(0)) ? nullptr : std::malloc(size == 0 ? 1 : size);
}
void* operator new[](size_t size, const std::nothrow_t&) noexcept {
  return fails(false, __builtin_return_address(0)) ? nullptr : std::malloc(size == 0 ? 1 : size);
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
