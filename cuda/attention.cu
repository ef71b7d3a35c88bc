// Causal attention of packed query rows over the KV cache, for boundary steps and for calls that no library kernel
// serves. Rows of an image also see the rest of the image.
//
// Floor: a boundary step reads K and V once, 4 * head_dim bytes per key and KV head in 16 bits: 125 us at 4.3 TB/s for
// a Llama-3.1-8B layer and 131072 keys. Each (query, key) pair takes 4 * head_dim FLOPs. 4 queries per KV head take
// about half of the instructions that 132 SMs issue in the time of the bytes, 8 queries nearly all of them. Many rows
// are bound by fp32 FMAs, which are 60 to 70 % of the instructions of both products.
//
// A block computes the query heads of one KV head for adjacent rows, up to kQueries (row, head) pairs, over a range of
// keys, kKeys at a time. K and V are copied asynchronously to shared memory, each while the other is in use. Scores: a
// thread sums channels for 4 queries and one or two keys. Probabilities: a few lanes per query, with running maxima and
// sums. Output: a thread sums keys for 4 queries and 4 or 8 channels; the sums of adjacent threads over other keys are
// added at the end, in fixed order.
//
// A segment (consecutive rows of a sequence) with too few rows to fill the GPU has its keys cut into ranges, one block
// each, for as many blocks as the device's SMs hold at once: 3 per SM up to 8 queries, which keep 16 to 32 KB of K and
// V each in flight (bf16, head_dim 128, 4 queries: 44 KB of shared memory), where 26 KB per SM are needed; 2 per SM
// above. Blocks write maximum, sum and unnormalised output to the workspace, and a second kernel merges them in order.
// The cut depends on the segment's own rows and length, and on the number of SMs: the bits of a row do not depend on
// other sequences.
#include <algorithm>

#include "cuda/attention_tile.cuh"

namespace pop::cuda {

namespace {

// ---- Kernels -------------------------------------------------------------------------------

// Blocks per SM to leave registers for. For 12.0, nvcc needs more than three blocks of the 8-query tile leave.
constexpr int blocks_to_fit(int queries) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 1200
  if (queries == 8) return 2;
#endif
  return blocks_an_sm(queries);
}

template <class T, int kQueries>
__global__ void __launch_bounds__(kThreads, blocks_to_fit(kQueries))
    attention_kernel(const __grid_constant__ AttentionLaunch p) {
  wait_for_kernels_in_front();
  let_kernel_behind_start();
  using C = Tile<T, kQueries>;
  const C tile(dynamic_shared<float>(), p.head_dim, p.pitch);
  if (threadIdx.x == 0) *tile.work = work_of(p, static_cast<int>(blockIdx.x));
  __syncthreads();
  const Work& work = *tile.work;
  if (work.begin >= work.end) return;

  const OutputShare<T, kQueries> share(p.head_dim);
  const auto copy_k = [&](int start) {
    copy_keys<T, C::kKeys>(p, work, p.cache.key, p.cache.key_strides, start, tile.k);
    __pipeline_commit();
  };
  const auto copy_v = [&](int start) {
    copy_keys<T, C::kKeys>(p, work, p.cache.value, p.cache.value_strides, start, tile.v);
    __pipeline_commit();
  };

  copy_k(work.begin);
  copy_v(work.begin);
  load_queries<T, kQueries>(p, tile);
  float output[kSide][C::kChannels] = {};
#pragma unroll 1
  for (int start = work.begin; start < work.end; start += C::kKeys) {
    const bool is_first = start == work.begin;
    if (is_first) {
      __pipeline_wait_prior(1);
    } else {
      __pipeline_wait_prior(0);
    }
    __syncthreads();  // K is loaded; V and the probabilities may be overwritten
    if (!is_first) copy_v(start);
    score<T, kQueries>(p, tile, start);
    __syncthreads();  // the scores are stored; K may be overwritten
    const bool is_last = start + C::kKeys >= work.end;
    if (!is_last) copy_k(start + C::kKeys);
    softmax<T, kQueries>(tile);
    // V was copied before the next K. Of the last tile it is the newest copy, since no K follows: an empty group in its
    // place would do, but racecheck takes the reads of V for a race with it.
    if (is_last) {
      __pipeline_wait_prior(0);
    } else {
      __pipeline_wait_prior(1);
    }
    __syncthreads();  // the probabilities are stored and V is loaded
    add_values<T, kQueries>(p, tile, share, min(C::kKeys, work.end - start), output);
  }
  __syncthreads();  // K and V may be overwritten
  store_output<T, kQueries>(p, tile, share, output);
}

// One block per (row, head): sums its partial outputs, each rescaled to the overall maximum.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) merge_kernel(const __grid_constant__ AttentionLaunch p) {
  wait_for_kernels_in_front();
  let_kernel_behind_start();
  int which = 0, item = static_cast<int>(blockIdx.x);
  while (item >= p.parts[which].end_merge) ++which;
  if (which > 0) item -= p.parts[which - 1].end_merge;
  const Part& part = p.parts[which];
  const int row = item / p.heads, head = item % p.heads;
  const Keys keys = keys_of_tile(p, part, (row * p.group + head % p.group) / p.queries);
  const int splits = static_cast<int>(ceil_div(keys.end - keys.begin, part.split_keys));
  const int64_t first = part.first_partial + static_cast<int64_t>(item) * part.splits;

  __shared__ float weight[kMaxSplits];
  __shared__ float sums[kThreads * 4];
  __shared__ float max_of_warp[kThreads / kWarp], sum_of_warp[kThreads / kWarp];
  const float* max_sum = p.partial_max_sum + 2 * first;
  float max = -INFINITY;
  for (int i = threadIdx.x; i < splits; i += kThreads) max = fmaxf(max, max_sum[2 * i]);
  max = block_max(max, max_of_warp);
  float sum = 0.0f;
  for (int i = threadIdx.x; i < splits; i += kThreads) {
    weight[i] = exp2f(max_sum[2 * i] - max);  // 0 for a range of which the row sees no key
    sum += weight[i] * max_sum[2 * i + 1];
  }
  sum = block_sum(sum, sum_of_warp);
  static_assert(kThreads > kWarp);  // so block_sum passes a barrier, after which the weights are visible

  const int groups = p.head_dim / 4, stride = kThreads / groups;
  const int channel = threadIdx.x % groups * 4, share = threadIdx.x / groups;
  float output[4] = {};
  if (share < stride) {
    const float* from = p.partial_out + first * p.head_dim + channel;
#pragma unroll 8
    for (int i = share; i < splits; i += stride) {
      float partial[4];
      load<4>(from + static_cast<int64_t>(i) * p.head_dim, partial);
#pragma unroll
      for (int c = 0; c < 4; ++c) output[c] = fmaf(weight[i], partial[c], output[c]);
    }
    store<4>(sums + share * p.head_dim + channel, output);
  }
  __syncthreads();
  T* out = static_cast<T*>(p.out) + (part.row + row) * p.out_stride + static_cast<int64_t>(head) * p.head_dim;
  for (int d = threadIdx.x; d < p.head_dim; d += kThreads) {
    float total = 0.0f;
    for (int i = 0; i < stride; ++i) total += sums[i * p.head_dim + d];
    out[d] = from_float<T>(total / sum);
  }
}

// ---- Launchers -----------------------------------------------------------------------------

template <class T, int kQueries>
size_t shared_bytes_of(int head_dim) {
  using C = Tile<T, kQueries>;
  return C(nullptr, head_dim, C::pitch(head_dim)).bytes;
}

// The largest tile that the device has the shared memory for: of 32 queries, except for wide heads on small devices.
int most_queries(DType dtype, int head_dim) {
  const size_t most_bytes = device_facts().block_shared_bytes;
  int most = 4;
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    if (shared_bytes_of<T, 8>(head_dim) <= most_bytes) most = 8;
    if (shared_bytes_of<T, 16>(head_dim) <= most_bytes) most = 16;
    if (shared_bytes_of<T, 32>(head_dim) <= most_bytes) most = 32;
  });
  return most;
}

int queries_of(int64_t pairs, int most) {
  return std::min(most, pairs <= 4 ? 4 : pairs <= 8 ? 8 : pairs <= 16 ? 16 : 32);
}

// As many blocks as the current device holds at once, for tiles of `queries`.
int blocks_at_once(int queries) { return std::min(device_facts().sm_count, kMostSms) * blocks_an_sm(queries); }

// Adds a segment to the launch; returns false if it must wait for the next one.
bool add_part(AttentionLaunch& launch, const Segment& segment, int64_t first_row) {
  const int tiles = static_cast<int>(ceil_div(segment.rows * launch.group, launch.queries));
  const int64_t end = std::max(segment.first_position + segment.rows, segment.visible_end);
  const int64_t tile_rows =
      std::max<int64_t>(ceil_div(launch.queries, launch.group), segment.visible_end - segment.first_position);
  const int64_t keys = std::min<int64_t>(end, launch.window + tile_rows);  // of the tile that sees the most keys
  const int64_t wanted =
      std::max<int64_t>(1, blocks_at_once(launch.queries) / (static_cast<int64_t>(tiles) * launch.kv_heads));
  const int64_t split_keys = ceil_div(ceil_div(keys, wanted), kKeyStep) * kKeyStep;
  const int splits = static_cast<int>(ceil_div(keys, split_keys));
  const int pairs = splits > 1 ? static_cast<int>(segment.rows) * launch.heads : 0;
  if (launch.count == kPartsAtOnce || launch.partials + pairs * splits > kMaxPartials) return false;

  const Part before = launch.count > 0 ? launch.parts[launch.count - 1] : Part{};
  launch.parts[launch.count++] = {.sequence = segment.sequence,
                                  .row = segment.first_row - first_row,
                                  .rows = static_cast<int>(segment.rows),
                                  .first_position = static_cast<int>(segment.first_position),
                                  .visible_end = static_cast<int>(segment.visible_end),
                                  .tiles = tiles,
                                  .splits = splits,
                                  .split_keys = static_cast<int>(split_keys),
                                  .end_block = before.end_block + tiles * splits * launch.kv_heads,
                                  .end_merge = before.end_merge + pairs,
                                  .first_partial = launch.partials};
  launch.partials += pairs * splits;
  return true;
}

// Calls `call(launch)` for as many launches as the segments need. Segments of one tile size share launches; the size
// depends on the segment and the device alone.
template <class Call>
void for_each_launch(const AttentionParams& p, const Call& call) {
  AttentionLaunch launch{};
  launch.q = p.q;
  launch.out = p.out;
  launch.q_stride = p.q_stride;
  launch.out_stride = p.out_stride;
  launch.sinks = p.sinks;
  launch.cache = p.cache;
  launch.address = p.address;
  launch.scale = p.scale * kLog2E;
  launch.softcap = p.softcap * kLog2E;
  launch.window = p.window > 0 ? static_cast<int>(std::min<int64_t>(p.window, INT32_MAX)) : INT32_MAX;
  launch.heads = static_cast<int>(p.heads);
  launch.kv_heads = static_cast<int>(p.kv_heads);
  launch.group = static_cast<int>(p.heads / p.kv_heads);
  launch.head_dim = static_cast<int>(p.head_dim);
  const int most = most_queries(p.dtype, launch.head_dim);
  for (const int queries : {4, 8, 16, 32}) {
    launch.queries = queries;
    for (int64_t i = 0; i < p.num_segments; ++i) {
      const Segment& segment = p.segments[i];
      if (segment.rows == 0 || queries_of(segment.rows * launch.group, most) != queries) continue;
      if (add_part(launch, segment, p.first_row)) continue;
      call(launch);
      launch.count = launch.partials = 0;
      add_part(launch, segment, p.first_row);
    }
    if (launch.count > 0) call(launch);
    launch.count = launch.partials = 0;
  }
}

template <class T, int kQueries>
void launch_tiles(AttentionLaunch args, Stream stream) {
  using C = Tile<T, kQueries>;
  args.pitch = C::pitch(args.head_dim);
  args.key_shares = kThreads / (args.head_dim / C::kChannels) / C::kSides;
  const size_t shared_bytes = shared_bytes_of<T, kQueries>(args.head_dim);
  const auto blocks = static_cast<unsigned>(args.parts[args.count - 1].end_block);
  launch_early("attention", attention_kernel<T, kQueries>, dim3(blocks), dim3(kThreads), shared_bytes, stream, args);
}

size_t workspace_floats(const AttentionLaunch& launch) {
  return static_cast<size_t>(launch.partials) * (launch.head_dim + 2);
}

}  // namespace

size_t attention_workspace(const AttentionParams& p) {
  size_t floats = 0;
  for_each_launch(p, [&](const AttentionLaunch& launch) { floats = std::max(floats, workspace_floats(launch)); });
  return floats * sizeof(float);
}

void launch_attention(const AttentionParams& p, void* workspace, Stream stream) {
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const auto is_wide = [](const void* cache, const CacheStrides& strides) {
      return is_aligned(cache, strides.batch, sizeof(T)) && is_aligned(cache, strides.head, sizeof(T)) &&
             is_aligned(cache, strides.slot, sizeof(T));
    };
    for_each_launch(p, [&](AttentionLaunch args) {
      args.is_wide = is_wide(p.cache.key, p.cache.key_strides) && is_wide(p.cache.value, p.cache.value_strides);
      args.partial_out = static_cast<float*>(workspace);
      args.partial_max_sum = args.partial_out + static_cast<int64_t>(args.partials) * args.head_dim;
      switch (args.queries) {
        case 4:
          launch_tiles<T, 4>(args, stream);
          break;
        case 8:
          launch_tiles<T, 8>(args, stream);
          break;
        case 16:
          launch_tiles<T, 16>(args, stream);
          break;
        default:
          launch_tiles<T, 32>(args, stream);
      }
      const auto merges = static_cast<unsigned>(args.parts[args.count - 1].end_merge);
      if (merges > 0) launch_early("attention", merge_kernel<T>, dim3(merges), dim3(kThreads), 0, stream, args);
    });
  });
}

}  // namespace pop::cuda
