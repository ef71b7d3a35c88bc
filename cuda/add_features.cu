// Adds the features of a vision tower to the rows of its tokens (DeepStack).
//
// Floor: 3 elements moved per channel of a row with a feature, and 16 bytes of index per row. It runs after a few of
// the first layers, for prompts with images only, so one element per thread and step is enough.
#include "cuda/elements.cuh"
#include "cuda/launch.cuh"

namespace pop::cuda {

namespace {

constexpr int kThreads = 256;

// One block per row.
template <class T>
__global__ void __launch_bounds__(kThreads) add_features_kernel(const AddFeaturesParams p) {
  const int64_t row = blockIdx.x;
  const int64_t feature = p.index[p.row_source[row]];
  if (feature < 0 || feature >= p.num_features) return;
  const T* from = static_cast<const T*>(p.features) + feature * p.features_stride;
  T* to = static_cast<T*>(p.out) + row * p.width;
  for (int64_t i = threadIdx.x; i < p.width; i += kThreads) to[i] = from_float<T>(to_float(to[i]) + to_float(from[i]));
}

}  // namespace

void launch_add_features(const AddFeaturesParams& p, Stream stream) {
  if (p.rows == 0 || p.width == 0 || p.num_features == 0) return;
  with_element(p.dtype, [&](auto type) {
    using T = decltype(type);
    launch("add_features", add_features_kernel<T>, dim3(static_cast<unsigned>(p.rows)), dim3(kThreads), 0, stream, p);
  });
}

}  // namespace pop::cuda
