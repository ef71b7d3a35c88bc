// A library to preload: counts the bytes of the blocks that malloc has handed out and not got back (glibc).
#include <malloc.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>

namespace {

std::atomic<int64_t> live{0};

void* counted(void* block) {
  if (block != nullptr) live += static_cast<int64_t>(malloc_usable_size(block));
  return block;
}

}  // namespace

extern "C" {

void* __libc_malloc(size_t size);
void* __libc_calloc(size_t count, size_t size);
void* __libc_realloc(void* block, size_t size);
void* __libc_memalign(size_t alignment, size_t size);
void __libc_free(void* block);

int64_t bytes_in_use() { return live; }

void* malloc(size_t size) { return counted(__libc_malloc(size)); }
void* calloc(size_t count, size_t size) { return counted(__libc_calloc(count, size)); }
void* memalign(size_t alignment, size_t size) { return counted(__libc_memalign(alignment, size)); }
void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void** block, size_t alignment, size_t size) {
  void* made = memalign(alignment, size);
  if (made == nullptr) return ENOMEM;
  *block = made;
  return 0;
}

void* realloc(void* block, size_t size) {
  const int64_t before = block == nullptr ? 0 : static_cast<int64_t>(malloc_usable_size(block));
  void* moved = __libc_realloc(block, size);
  if (moved != nullptr || size == 0) live -= before;
  return counted(moved);
}

void free(void* block) {
  if (block == nullptr) return;
  live -= static_cast<int64_t>(malloc_usable_size(block));
  __libc_free(block);
}
}
