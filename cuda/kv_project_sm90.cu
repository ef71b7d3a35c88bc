// The independent KV projection of a run in one Hopper kernel: [k_j | v_j] = rstd(x) * (x . W_j^T) for all layers j of
// a run, then bias, k_norm, RoPE and the cache write. The product never goes to memory.
//
// Floor for Llama-3.1-8B, ten layers, 2048 tokens ([2048, 4096] x [20480, 4096]^T): 0.344 TFLOP, which take 0.435 ms at
// 790 TFLOP/s. Bytes: W 168 MB, x 17 MB, caches 84 MB, which take 0.063 ms at 4.3 TB/s. The tensor cores are the limit.
//
// A block computes tiles of 128 x 256 in steps of 64 along hidden_size. Its ring of 4 stages of 48 KiB takes 193 KiB in
// all, so a multiprocessor holds one block. One thread of the first warpgroup keeps the ring full with TMA. Two
// warpgroups multiply 64 x 256 each (wgmma m64n256k16, 128 accumulators per thread; 168 registers at launch, then 232,
// and 40 for the first warpgroup). They read x of each step a second time for the sums of squares of the rows, while
// the products run. Blocks are persistent, so the first stages of a tile load during the epilogue of the previous tile;
// the tensor cores still wait for the epilogue. Two blocks with adjacent rows form a cluster and share their tile of W,
// each loading half of it for both: a step then reads 32 KiB per block from the L2 instead of 48.
//
// Expected limits, in this order: shared memory (of the 1024 cycles that the products of a step take, operands are read
// in 640, TMA writes in 384 and the sums of squares read in 128, so passing rstd may be faster); the epilogue (2 to 3
// us after 45 us of products, before its loads were all issued ahead of its stores); 1280 tiles on 132 blocks (9.7
// rounds in 10, and 2.4 in 3 at 512 tokens). Tiles of 128 x 128 would fill 4.8 rounds of 5 there, but a step of one
// takes 640 cycles of shared memory (reads 384, TMA writes 256) for 512 of products: 5 rounds of theirs are 3.1 of
// ours. On request the tiles of the last round are cut along hidden_size instead (kv_project_tile.h, "The last round"):
// the steps stay as they are, and 3 rounds become 2.5. The two blocks of a cluster then exchange 64 KiB of sums through
// their shared memory, and a step reads 48 KiB per block from the L2. Measured rates are in docs/results/h200.md.
#include <algorithm>
#include <cstddef>

#include "cuda/kv_project_epilogue.cuh"
#if defined(POP_CUDA_SHIM)
#include "sm90_emulated.h"
#else
#include "cuda/sm90.cuh"
#endif

namespace pop::cuda {

namespace {

using kv_tile::RingStep;
using kv_tile::Tile;
using kv_tile::Turn;

constexpr int kThreads = (1 + kv_tile::kConsumers) * kv_tile::kGroupThreads;
// The 64 K registers of a multiprocessor: 168 per thread at launch, then moved from the producer to the consumers.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kv_tile::kGroupThreads * (kProducerRegisters + kv_tile::kConsumers * kConsumerRegisters) <=
              168 * kThreads);

struct alignas(1024) Ring {  // boxes with a 128-byte swizzle begin at multiples of 1024
  unsigned char x[kv_tile::kStages][kv_tile::kXBytes];
  unsigned char w[kv_tile::kStages][kv_tile::kBoxes * kv_tile::kBoxBytes];
  sm90::Barrier full[kv_tile::kStages];   // the stage has landed
  sm90::Barrier empty[kv_tile::kStages];  // every consumer warp of the cluster has read the stage
};
constexpr size_t kSharedBytes = sizeof(Ring) + sm90::kSharedSlack;
static_assert(kSharedBytes <= 227 << 10, "the shared memory limit of a block");

// What a warpgroup sends to the other block of its cluster, in the place of the stages: the accumulators of each
// thread, four by four, and its sums of squares.
struct SentSums {
  float sums[kv_tile::kAccumulators / 4][kv_tile::kGroupThreads][4];
  float squares[kv_tile::kGroupThreads][4];  // of which two are used
};
static_assert(sizeof(SentSums) <= offsetof(Ring, full));

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(POP_CUDA_SHIM)

constexpr int kConsumerWarps = kv_tile::kConsumers * kv_tile::kGroupThreads / kWarp;

// ---- Turns ---------------------------------------------------------------------------------

template <bool kHalves>
__device__ __forceinline__ int turn_count(const KvProjectRun& run) {
  return kHalves ? kv_tile::turn_count(run.order, run.whole) : unit_count(run.order);
}

template <bool kHalves>
__device__ __forceinline__ Turn turn_of(const KvProjectRun& run, int turn, int rank) {
  const int steps = run.hidden / kv_tile::kDepth;
  if constexpr (kHalves) return kv_tile::turn_of(run.order, run.whole, steps, turn, rank);
  return {tile_of(run.order, turn, rank), 0, steps, false};
}

// True if the last turn of this cluster is half a tile per block. No turn before it is.
__device__ __forceinline__ bool ends_with_half(const KvProjectRun& run) {
  const int turns = turn_count<true>(run), first = sm90::cluster_index(), stride = sm90::cluster_count();
  return first < turns && first + (turns - 1 - first) / stride * stride >= run.whole;
}

// Both for all threads of a cluster, the producers too.
__device__ __forceinline__ void wait_for_free_rings() {
  sm90::cluster_sync();  // both blocks have read their last stage
}
__device__ __forceinline__ void wait_for_sent_sums() {
  sm90::cluster_sync();  // what the other block has sent is there
}

// ---- Producer ------------------------------------------------------------------------------

// Loads x of this block and its share of W: both boxes, or, if the blocks of a cluster share W, one box for both.
// Either way every block receives kStageBytes. The other block may send its box before this one expects it: the phase
// cannot complete without this block's own arrival.
__device__ __forceinline__ void load_stage(const sm90::TensorMap& x, const sm90::TensorMap& w, const Tile& tile,
                                           int column, bool shares_w, int rank, int stage, Ring& ring) {
  sm90::Barrier* full = &ring.full[stage];
  sm90::barrier_arrive_expecting(full, kv_tile::kStageBytes);
  sm90::load_box(x, ring.x[stage], full, tile.row * kv_tile::kRows, column);
  const int first = tile.column * kv_tile::kColumns;
  if (!shares_w) {
    for (int box = 0; box < kv_tile::kBoxes; ++box) {
      sm90::load_box(w, ring.w[stage] + box * kv_tile::kBoxBytes, full, first + box * kv_tile::kBoxRows, column);
    }
  } else {
    sm90::load_box_multicast(w, ring.w[stage] + rank * kv_tile::kBoxBytes, full, first + rank * kv_tile::kBoxRows,
                             column, 0b11);
  }
}

// Run by one thread: loads every step of every tile of the block, as far ahead as the ring allows. In a last turn of
// halves the blocks need different steps of W. They may then differ by one step in number, at the end of the last turn,
// where no wait for an empty stage depends on it.
template <bool kHalves>
__device__ __forceinline__ void produce(const sm90::TensorMap& x, const sm90::TensorMap& w, const KvProjectRun& run,
                                        Ring& ring) {
  const int rank = sm90::cluster_rank();
  uint32_t step = 0;
  for (int i = sm90::cluster_index(); i < turn_count<kHalves>(run); i += sm90::cluster_count()) {
    const Turn turn = turn_of<kHalves>(run, i, rank);
    const bool shares_w = run.order.cluster > 1 && !turn.is_half;
    for (int k = turn.begin; k < turn.end; ++k, ++step) {
      const RingStep at = kv_tile::ring_step(step);
      sm90::barrier_wait(&ring.empty[at.stage], at.parity ^ 1);
      load_stage(x, w, turn.tile, k * kv_tile::kDepth, shares_w, rank, at.stage, ring);
    }
  }
}

// ---- Consumers -----------------------------------------------------------------------------

// Adds the squares of 16 of the 64 elements of each of this thread's two rows; the four threads of its quad cover all
// of them. Eight adjacent lanes read eight different 16-byte banks.
__device__ __forceinline__ void add_squares(const unsigned char* x, const int (&row)[2], float (&squares)[2]) {
  const int q = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int chunk = 0; chunk < 2; ++chunk) {
      float element[8];
      load(reinterpret_cast<const BFloat16*>(x + kv_tile::swizzled_chunk(row[half], 2 * q + chunk)), element);
#pragma unroll
      for (int i = 0; i < 8; ++i) squares[half] += element[i] * element[i];
    }
  }
}

// Tells the producer of every block that writes to the stage that this warp has read it.
__device__ __forceinline__ void release(Ring& ring, int stage, int cluster) {
  __syncwarp();  // all lanes have read it
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane < cluster) sm90::barrier_arrive_at(&ring.empty[stage], lane);
}

// sums = x . W^T for the 64 rows of warpgroup `group`, over the steps of the turn, and, unless rstd is given, this
// thread's part of the sums of squares of its two rows. `step` counts the steps of the block.
__device__ __forceinline__ void multiply(const KvProjectRun& run, const Turn& turn, Ring& ring, int group,
                                         const int (&row)[2], uint32_t& step, float (&sums)[kv_tile::kAccumulators],
                                         float (&squares)[2]) {
  const int cluster = run.order.cluster;
  int previous = -1;
  for (int i = turn.begin; i < turn.end; ++i, ++step) {
    const RingStep at = kv_tile::ring_step(step);
    sm90::barrier_wait(&ring.full[at.stage], at.parity);
    const unsigned char* x = ring.x[at.stage] + group * kv_tile::kGroupRows * kv_tile::kLineBytes;
    const uint64_t a = kv_tile::tile_descriptor(sm90::shared_address(x));
    const uint64_t b = kv_tile::tile_descriptor(sm90::shared_address(ring.w[at.stage]));
    sm90::multiply_fence();
#pragma unroll
    for (int k = 0; k < kv_tile::kDepth / 16; ++k) {
      constexpr int kNext = 16 * kv_tile::kElement / 16;  // descriptors count units of 16 bytes
      sm90::multiply_64x256x16(sums, a + k * kNext, b + k * kNext, i != turn.begin || k != 0);
    }
    sm90::multiply_commit();
    sm90::multiply_wait<1>();  // the products of the previous stage are done; this stage's may still run
    if (previous >= 0) release(ring, previous, cluster);
    if (run.rstd == nullptr) add_squares(x, row, squares);
    previous = at.stage;
  }
  sm90::multiply_wait<0>();
  sm90::multiply_done(sums);
  release(ring, previous, cluster);
}

// The rstd of a row if it is given.
__device__ __forceinline__ float given_scale(const KvProjectRun& run, const KvRow& row) {
  return run.rstd == nullptr ? 0.0f : run.rstd[row.batch_row - run.first_row];
}

// Adds the sums of the two halves of a tile. Block r of the cluster gets those of the rows of warpgroup r, and the
// other warpgroup sends. Returns whether this one has got sums. The order of the two does not change a sum.
__device__ __forceinline__ bool add_halves(Ring& ring, int group, int rank, float (&sums)[kv_tile::kAccumulators],
                                           float (&squares)[2]) {
  const int thread = static_cast<int>(threadIdx.x) % kv_tile::kGroupThreads;
  SentSums& sent = *reinterpret_cast<SentSums*>(&ring);
  wait_for_free_rings();
  if (group != rank) {
#pragma unroll
    for (int i = 0; i < kv_tile::kAccumulators; i += 4) {
      sm90::store_at(sent.sums[i / 4][thread], group, sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
    }
    sm90::store_at(sent.squares[thread], group, squares[0], squares[1], 0.0f, 0.0f);
  }
  wait_for_sent_sums();
  if (group != rank) return false;
#pragma unroll
  for (int i = 0; i < kv_tile::kAccumulators; i += 4) {
    float other[4];
    load(sent.sums[i / 4][thread], other);
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[i + j] += other[j];
  }
  float other[4];
  load(sent.squares[thread], other);
  squares[0] += other[0];
  squares[1] += other[1];
  return true;
}

template <int kHeadDim, bool kHalves>
__device__ __forceinline__ void consume(const KvProjectRun& run, Ring& ring, int group) {
  const int thread = static_cast<int>(threadIdx.x) % kv_tile::kGroupThreads;
  const int row[2] = {kv_tile::accumulator_row(thread, 0), kv_tile::accumulator_row(thread, 1)};
  const int rank = sm90::cluster_rank();
  uint32_t step = 0;
  for (int i = sm90::cluster_index(); i < turn_count<kHalves>(run); i += sm90::cluster_count()) {
    const Turn turn = turn_of<kHalves>(run, i, rank);
    const int first = turn.tile.row * kv_tile::kRows + group * kv_tile::kGroupRows;
    // These loads overlap with the products.
    const KvRow rows[2] = {kv_row(run, first + row[0]), kv_row(run, first + row[1])};
    float scale[2] = {given_scale(run, rows[0]), given_scale(run, rows[1])};
    float sums[kv_tile::kAccumulators];
    float squares[2] = {};
    multiply(run, turn, ring, group, row, step, sums, squares);
    if constexpr (kHalves) {
      if (turn.is_half && !add_halves(ring, group, rank, sums, squares)) return;  // it was the last turn
    }
    if (run.rstd == nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half) scale[half] = rms_scale(warp_sum<4>(squares[half]), run.hidden, run.eps);
    }
    write_tile<kHeadDim>(run, turn.tile.column, sums, rows, scale);
  }
}

#endif

static_assert(2 * sizeof(sm90::TensorMap) + sizeof(KvProjectRun) <= 4096,
              "the parameter size that every driver accepts");

// ---- Kernel --------------------------------------------------------------------------------

// kHalves: clusters may end with a turn of halves.
template <int kHeadDim, bool kHalves>
__global__ void __launch_bounds__(kThreads, 1)
    kv_project_sm90_kernel(const __grid_constant__ sm90::TensorMap x, const __grid_constant__ sm90::TensorMap w,
                           const __grid_constant__ KvProjectRun run) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(POP_CUDA_SHIM)
  Ring& ring = sm90::shared_memory<Ring>();
  if (threadIdx.x == 0) {
    sm90::prefetch(x);
    sm90::prefetch(w);
    for (int stage = 0; stage < kv_tile::kStages; ++stage) {
      sm90::barrier_init(&ring.full[stage], 1);
      sm90::barrier_init(&ring.empty[stage], kConsumerWarps * run.order.cluster);
    }
    sm90::barrier_init_fence();
  }
  sm90::cluster_sync();
  const int group = static_cast<int>(threadIdx.x) / kv_tile::kGroupThreads;
  if (group == 0) {
    sm90::give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<kHalves>(x, w, run, ring);
    if constexpr (kHalves) {
      if (ends_with_half(run)) {
        wait_for_free_rings();
        wait_for_sent_sums();
      }
    }
  } else {
    sm90::take_registers<kConsumerRegisters>();
    consume<kHeadDim, kHalves>(run, ring, group - 1);
  }
  // The other block still arrives at this block's barriers and sends it boxes of W, so neither block may exit first.
  sm90::cluster_sync();
#else
  __trap();  // code for another GPU, which kv_project_sm90_supports() never launches
#endif
}

// ---- Launch --------------------------------------------------------------------------------

template <int kHeadDim>
void launch_run(const KvProjectParams& p, KvProjectRun& run, const void* weight, bool halve_last_round, Stream stream) {
  constexpr auto kName = "kv_project_sm90";
  const int64_t columns = static_cast<int64_t>(run.heads) * kHeadDim;
  run.order.column_tiles = static_cast<int>(ceil_div(columns, kv_tile::kColumns));
  const auto x_map = sm90::tensor_map(p.x, p.rows, p.hidden_size, p.x_stride, kv_tile::kRows);
  const auto w_map = sm90::tensor_map(weight, columns, p.hidden_size, p.hidden_size, kv_tile::kBoxRows);
  const sm90::ClusterShape shape = {run.order.cluster, kThreads, kSharedBytes};
  const auto plain = kv_project_sm90_kernel<kHeadDim, false>, halves = kv_project_sm90_kernel<kHeadDim, true>;
  const int units = unit_count(run.order);
  run.whole = units;
  if (halve_last_round) {
    run.whole =
        kv_tile::whole_units(run.order, run.hidden / kv_tile::kDepth, sm90::resident_clusters(kName, halves, shape));
  }
  sm90::launch_clusters(kName, run.whole < units ? halves : plain, kv_tile::turn_count(run.order, run.whole), shape,
                        stream, x_map, w_map, run);
}

template <class T>
const T* layer_vector(const void* const* vectors, int64_t layer) {
  return vectors == nullptr ? nullptr : static_cast<const T*>(vectors[layer]);
}

KvProjectRun run_of(const KvProjectParams& p, int64_t first_layer, int64_t layers) {
  const int row_tiles = static_cast<int>(ceil_div(p.rows, kv_tile::kRows));
  KvProjectRun run{};
  run.order = {.row_tiles = row_tiles, .column_tiles = 0, .cluster = kv_tile::cluster_for(row_tiles)};
  run.rows = static_cast<int>(p.rows);
  run.hidden = static_cast<int>(p.hidden_size);
  run.kv_heads = static_cast<int>(p.kv_heads);
  run.heads = static_cast<int>(layers * 2 * p.kv_heads);
  run.eps = p.eps;
  run.rstd = p.rstd;
  run.first_row = p.first_row;
  run.batch = *p.batch;
  for (int64_t i = 0; i < layers; ++i) {
    const int64_t layer = first_layer + i;
    run.layers[i] = {.k_bias = layer_vector<BFloat16>(p.k_bias, layer),
                     .v_bias = layer_vector<BFloat16>(p.v_bias, layer),
                     .k_norm = layer_vector<BFloat16>(p.k_norm, layer),
                     .cache = p.caches[layer]};
  }
  return run;
}

}  // namespace

bool kv_project_sm90_fits(const KvProjectParams& p) {
  constexpr int64_t kMost = 1 << 30;  // tile, row and column numbers are ints
  const auto rows_aligned = [](const void* base, const CacheStrides& strides) {
    return is_aligned(base, strides.batch, 2) && is_aligned(base, strides.head, 2) && is_aligned(base, strides.slot, 2);
  };
  const auto pairs_aligned = [&](const void* const* vectors) {
    if (vectors == nullptr) return true;
    return std::all_of(vectors, vectors + p.layers, [](const void* vector) { return is_aligned(vector, 0, 2, 4); });
  };
  if (p.dtype != DType::bf16 || (p.head_dim != 64 && p.head_dim != 128 && p.head_dim != 256)) return false;
  if (p.rotary_dim != p.head_dim || p.hidden_size <= 0 || p.hidden_size % kv_tile::kDepth != 0) return false;
  if (p.rope.interleaved || (p.rope.norm_after && p.k_norm != nullptr)) return false;
  if (!p.normalise || p.norm_over_heads || (p.norm_offset != 0.0f && p.k_norm != nullptr)) return false;
  if (p.rope_table != nullptr && std::any_of(p.rope_table, p.rope_table + p.layers, [](int64_t t) { return t != 0; })) {
    return false;
  }
  if (p.rows > kMost || p.kv_heads > kMost) return false;
  if (p.x_stride < p.hidden_size) return false;  // a tensor map's rows do not overlap
  const int64_t columns = std::min<int64_t>(p.layers, kRunLayers) * 2 * p.kv_heads * p.head_dim;
  if (ceil_div(p.rows, kv_tile::kRows) * ceil_div(columns, kv_tile::kColumns) * p.hidden_size > kMost) return false;
  if (!is_aligned(p.x, p.x_stride, 2) || !is_aligned(p.weight, p.hidden_size, 2)) return false;
  if (!is_aligned(p.batch->cos, 0, 4, 8) || !is_aligned(p.batch->sin, 0, 4, 8)) return false;
  if (!pairs_aligned(p.k_bias) || !pairs_aligned(p.v_bias) || !pairs_aligned(p.k_norm)) return false;
  return std::all_of(p.caches, p.caches + p.layers, [&](const LayerCache& cache) {
    return rows_aligned(cache.key, cache.key_strides) && rows_aligned(cache.value, cache.value_strides);
  });
}

bool kv_project_sm90_supports(const KvProjectParams& p) {
#if defined(POP_CUDA_SM90A)
  return kv_project_sm90_fits(p) && sm90::available();
#else
  static_cast<void>(p);
  return false;  // built without 90a: the kernel is a trap
#endif
}

void launch_kv_project_sm90(const KvProjectParams& p, bool halve_last_round, Stream stream) {
  if (p.rows == 0) return;
  for (int64_t first = 0; first < p.layers; first += kRunLayers) {
    const int64_t layers = std::min<int64_t>(kRunLayers, p.layers - first);
    KvProjectRun run = run_of(p, first, layers);
    const int64_t offset = first * 2 * p.kv_heads * p.head_dim * p.hidden_size;
    const void* weight = static_cast<const BFloat16*>(p.weight) + offset;
    switch (p.head_dim) {
      case 64:
        launch_run<64>(p, run, weight, halve_last_round, stream);
        break;
      case 128:
        launch_run<128>(p, run, weight, halve_last_round, stream);
        break;
      case 256:
        launch_run<256>(p, run, weight, halve_last_round, stream);
        break;
      default:
        throw std::runtime_error("pop: CUDA: kv_project_sm90: head_dim " + std::to_string(p.head_dim));
    }
  }
}

}  // namespace pop::cuda
