// Prints which tiles attention.cu chooses, for tests and scripts/kernel_resources.py. Its arguments are limits of
// shared memory per block. A line for each limit, dtype, head_dim and tile that some call gets: these four, and the
// bytes.
#include <cstdio>
#include <cstdlib>
#include <set>

#include "cuda/attention.cu"

namespace pop::cuda {

namespace {

size_t bytes_of(DType dtype, int head_dim, int queries) {
  size_t bytes = 0;
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    bytes = queries == 4    ? shared_bytes_of<T, 4>(head_dim)
            : queries == 8  ? shared_bytes_of<T, 8>(head_dim)
            : queries == 16 ? shared_bytes_of<T, 16>(head_dim)
                            : shared_bytes_of<T, 32>(head_dim);
  });
  return bytes;
}

void print_tiles(size_t limit, const char* name, DType dtype, int head_dim) {
  cuda_shim::set_block_shared_bytes(limit);
  const int most = most_queries(dtype, head_dim);
  std::set<int> tiles;
  for (int64_t pairs = 1; pairs <= 33; ++pairs) tiles.insert(queries_of(pairs, most));
  for (const int queries : tiles) {
    std::printf("%zu %s %d %d %zu\n", limit, name, head_dim, queries, bytes_of(dtype, head_dim, queries));
  }
}

}  // namespace

}  // namespace pop::cuda

int main(int count, char** limits) {
  for (int i = 1; i < count; ++i) {
    const size_t limit = std::strtoul(limits[i], nullptr, 10);
    for (int head_dim = 8; head_dim <= 256; head_dim += 8) {
      pop::cuda::print_tiles(limit, "f32", pop::DType::f32, head_dim);
      pop::cuda::print_tiles(limit, "bf16", pop::DType::bf16, head_dim);
      pop::cuda::print_tiles(limit, "f16", pop::DType::f16, head_dim);
    }
  }
  return 0;
}
