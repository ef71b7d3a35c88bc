// Mixture of experts: convert the input of a router to float32 (to_float32), choose the experts of each row and their
// weights (route), sort (row, expert) pairs by expert (group_rows), and sum the outputs of a row's experts by weight,
// and that of the shared expert (combine_rows).
//
// Floor: to_float32 reads and writes rows * width elements; route reads rows * experts logits; group_rows reads the
// pairs once per expert, from L2; combine_rows reads rows * experts_per_row * width elements and writes rows * width.
#include "route_math.h"

#include <algorithm>

#include "cuda/elements.cuh"
#include "cuda/launch.cuh"

namespace pop::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kRowsOfBlock = kThreads / kWarp;

// The best choice of a warp's lanes, returned to every lane.
__device__ __forceinline__ Choice warp_earliest(Choice choice) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Choice other{__shfl_xor_sync(kAllLanes, choice.key, offset),
                       __shfl_xor_sync(kAllLanes, choice.expert, offset)};
    if (comes_before(other, choice)) choice = other;
  }
  return choice;
}

// `count` adjacent elements per thread; blockIdx.y is a part of the row.
template <class T, int count>
__global__ void __launch_bounds__(kThreads) to_float32_kernel(const ToFloat32Params p) {
  const int64_t row = blockIdx.x;
  const int64_t i = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * count;
  if (i >= p.width) return;
  float value[count];
  load(static_cast<const T*>(p.x) + row * p.x_stride + i, value);
  store(p.out + row * p.width + i, value);
}

// One warp per row: a pass over its logits for each expert to choose.
template <class T, RouterScores scores>
__global__ void __launch_bounds__(kThreads) route_kernel(const RouteParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsOfBlock + threadIdx.x / kWarp;
  if (row >= p.rows) return;
  const int lane = threadIdx.x % kWarp;
  const T* logits = static_cast<const T*>(p.logits) + row * p.experts;
  // A bias of the logits comes with softmax, one of the choice alone with sigmoids.
  const T* bias = static_cast<const T*>(scores == RouterScores::softmax ? p.logit_bias : p.bias);
  const auto bias_of = [&](int64_t e) { return bias == nullptr ? 0.0f : to_float(bias[e]); };
  const auto logit = [&](int64_t e) {
    return scores == RouterScores::softmax ? to_float(logits[e]) + bias_of(e) : to_float(logits[e]);
  };
  int32_t* expert = p.expert + row * p.experts_per_row;
  float* weight = p.weight + row * p.experts_per_row;
  Choice chosen = before_all();
  float largest = 0.0f, chosen_sum = 0.0f, all = 0.0f;
  for (int64_t pass = 0; pass < p.experts_per_row; ++pass) {
    Choice best = after_all();
    for (int64_t e = lane; e < p.experts; e += kWarp) {
      const float key = route_key(scores, logit(e), scores == RouterScores::softmax ? 0.0f : bias_of(e));
      best = better(chosen, best, {key, static_cast<int32_t>(e)});
    }
    chosen = warp_earliest(best);
    if (pass == 0) largest = chosen.key;
    const int32_t index = expert_of(chosen, pass);
    const float part = score_part(scores, logit(index), largest);
    chosen_sum += part;
    if (lane == 0) {
      expert[pass] = index;
      weight[pass] = part;
    }
  }
  for (int64_t e = lane; e < p.experts; e += kWarp) all += score_part(scores, logit(e), largest);
  const float scale = route_scale(scores, warp_sum(all), chosen_sum, p.normalise, p.norm_eps, p.scale);
  __syncwarp();  // lane 0 wrote the weights
  for (int64_t pass = lane; pass < p.experts_per_row; pass += kWarp) weight[pass] *= scale;
}

// One block per expert. It counts the pairs of the experts before it and places its own pairs after them. Each thread
// handles a range of pairs, so rows stay in order whatever the schedule.
__global__ void __launch_bounds__(kThreads) group_rows_kernel(const GroupRowsParams p) {
  __shared__ int32_t before[kThreads], own[kThreads];
  const int32_t expert = static_cast<int32_t>(blockIdx.x);
  const int64_t pairs = p.rows * p.experts_per_row;
  const int64_t range = ceil_div(pairs, kThreads);
  const int64_t first = threadIdx.x * range, last = first + range < pairs ? first + range : pairs;
  int32_t lower = 0, equal = 0;
  for (int64_t i = first; i < last; ++i) {
    lower += p.expert[i] < expert;
    equal += p.expert[i] == expert;
  }
  before[threadIdx.x] = lower;
  own[threadIdx.x] = equal;
  __syncthreads();
  int64_t start = 0, place = 0;
  for (int thread = 0; thread < kThreads; ++thread) {
    start += before[thread];
    if (thread < static_cast<int>(threadIdx.x)) place += own[thread];
  }
  if (threadIdx.x == 0) {
    p.begin[expert] = start;
    if (expert == p.experts - 1) p.begin[p.experts] = pairs;
  }
  place += start;
  for (int64_t i = first; i < last; ++i) {
    if (p.expert[i] != expert) continue;
    p.place[i] = static_cast<int32_t>(place);
    p.row[place] = i / p.experts_per_row;
    ++place;
  }
}

// `count` adjacent elements per thread; blockIdx.y is the row.
template <class T, int count>
__global__ void __launch_bounds__(kThreads) combine_rows_kernel(const CombineRowsParams p) {
  const int64_t row = blockIdx.x;
  const int64_t i = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * count;
  if (i >= p.width) return;
  const int32_t* place = p.place + row * p.experts_per_row;
  const float* weight = p.weight + row * p.experts_per_row;
  float sum[count] = {};
  if (p.shared != nullptr) {
    load(static_cast<const T*>(p.shared) + row * p.out_stride + i, sum);
    const float factor = p.shared_gate == nullptr ? 1.0f : sigmoid(to_float(static_cast<const T*>(p.shared_gate)[row]));
#pragma unroll
    for (int e = 0; e < count; ++e) sum[e] *= factor;
  }
  for (int64_t j = 0; j < p.experts_per_row; ++j) {
    float value[count];
    load(static_cast<const T*>(p.x) + place[j] * p.width + i, value);
    if (p.bias != nullptr) {
      float bias[count];
      load(static_cast<const T*>(p.bias) + p.expert[row * p.experts_per_row + j] * p.bias_stride + i, bias);
#pragma unroll
      for (int e = 0; e < count; ++e) value[e] += bias[e];
    }
#pragma unroll
    for (int e = 0; e < count; ++e) sum[e] += value[e] * weight[j];
  }
  store(static_cast<T*>(p.out) + row * p.out_stride + i, sum);
}

// Launches a kernel of blocks (row, part of the row), `count` elements per thread.
template <class Params>
void launch_over_rows(const char* name, void (*kernel)(const Params), const Params& p, int count, Stream stream) {
  const int64_t pieces = p.width / count, blocks = ceil_div(pieces, kThreads);
  const int64_t threads = ceil_div(ceil_div(pieces, blocks), kWarp) * kWarp;
  const dim3 grid(static_cast<unsigned>(p.rows), static_cast<unsigned>(blocks));
  launch(name, kernel, grid, dim3(static_cast<unsigned>(threads)), 0, stream, p);
}

}  // namespace

void launch_to_float32(const ToFloat32Params& p, Stream stream) {
  if (p.rows == 0 || p.width == 0) return;
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kCount = kPack<float>;
    const bool in_packs = is_aligned(p.x, p.x_stride, sizeof(T), kCount * sizeof(T)) && p.width % kCount == 0;
    if (in_packs) return launch_over_rows("to_float32", to_float32_kernel<T, kCount>, p, kCount, stream);
    launch_over_rows("to_float32", to_float32_kernel<T, 1>, p, 1, stream);
  });
}

void launch_route(const RouteParams& p, Stream stream) {
  if (p.rows == 0) return;
  const auto run = [&](auto kernel) {
    launch("route", kernel, dim3(static_cast<unsigned>(ceil_div(p.rows, kRowsOfBlock))), dim3(kThreads), 0, stream, p);
  };
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (p.scores == RouterScores::softmax) return run(route_kernel<T, RouterScores::softmax>);
    run(route_kernel<T, RouterScores::sigmoid>);
  });
}

void launch_group_rows(const GroupRowsParams& p, Stream stream) {
  if (p.rows == 0) return;
  launch("group_rows", group_rows_kernel, dim3(static_cast<unsigned>(p.experts)), dim3(kThreads), 0, stream, p);
}

void launch_combine_rows(const CombineRowsParams& p, Stream stream) {
  if (p.rows == 0 || p.width == 0) return;
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t size = sizeof(T);
    const bool in_packs = is_aligned(p.x, p.width, size) && is_aligned(p.out, p.out_stride, size) &&
                          is_aligned(p.bias, p.bias_stride, size) && is_aligned(p.shared, p.out_stride, size) &&
                          p.width % kPack<T> == 0;
    if (in_packs) return launch_over_rows("combine_rows", combine_rows_kernel<T, kPack<T>>, p, kPack<T>, stream);
    launch_over_rows("combine_rows", combine_rows_kernel<T, 1>, p, 1, stream);
  });
}

}  // namespace pop::cuda
