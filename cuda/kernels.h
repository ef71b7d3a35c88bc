// The launchers of the CUDA kernels, over the structs of backend/params.h; one file per kernel. Pointers that are not
// marked "host" are to device memory. A launcher returns when its kernels are in the stream, throws std::runtime_error
// if the launch failed, never synchronises, and reads no host memory after it returned. Empty calls launch nothing.
#pragma once

#include "backend/params.h"

struct CUstream_st;

namespace pop::cuda {

using Stream = CUstream_st*;  // cudaStream_t, without the toolkit's headers

// build_row_tables.cu
void launch_build_row_tables(const RowTablesParams&, Stream);

// embed.cu. Clamps ids outside of the vocabulary and sets `bad_id` (device or mapped host memory, or null) to 1.
void launch_embed(const EmbedParams&, int32_t* bad_id, Stream);

// add_features.cu
void launch_add_features(const AddFeaturesParams&, Stream);

// rms_norm.cu
void launch_rms_norm(const RmsNormParams&, Stream);

// gated_act.cu
void launch_gated_act(const GatedActParams&, Stream);

// rope_cache_write.cu
void launch_rope_cache_write(const RopeCacheWriteParams&, Stream);

// quantize_rows.cu
void launch_quantize_rows(const QuantizeRowsParams&, Stream);

// The epilogue of a run's stacked GEMM, for every layer in one launch.
struct KvEpilogueParams {
  DType dtype;
  int64_t first_row, rows;  // rows of the batch; row 0 of kv and rstd is `first_row`
  int64_t kv_heads, head_dim, rotary_dim;
  int64_t layers;
  const void* kv;  // [rows, layers * 2 * kv_heads * head_dim]: K of the first layer, its V, K of the second, ...
  int64_t kv_stride;
  const float* rstd;          // [rows], or null: the rows were normalised before the GEMM
  const void* const* k_bias;  // host [layers] of [kv_dim], or null
  const void* const* v_bias;  // host [layers] of [kv_dim], or null
  const void* const* k_norm;  // host [layers] of [head_dim], or null
  float eps;
  float norm_offset = 0.0f;             // added to k_norm
  const int64_t* rope_table = nullptr;  // host [layers] of 0 and 1, or null: 0 in all
  RopeForm rope;
  const Batch* batch;        // host struct of device pointers
  const LayerCache* caches;  // host [layers]
};
void launch_kv_epilogue(const KvEpilogueParams&, Stream);  // rope_cache_write.cu

// route.cu. launch_group_rows does not fill host_begin.
void launch_to_float32(const ToFloat32Params&, Stream);
void launch_route(const RouteParams&, Stream);
void launch_group_rows(const GroupRowsParams&, Stream);
void launch_combine_rows(const CombineRowsParams&, Stream);

// skinny_gemm.cu: out = a . w^T for few rows, bound by the bytes of w; one to three matrices that share `a` in one
// launch. Any m gives the right result; from about 8 rows on a library GEMM is expected to be faster (see there).
inline constexpr int64_t kSkinnyRows = 64;
void launch_skinny_gemm(const GemmParams* products, int64_t count, Stream);

// skinny_mma.cu: the same on the tensor cores, for up to kSkinnyRows rows of 16-bit elements. Launch only products that
// fit.
bool skinny_mma_fits(const GemmParams&);
void launch_skinny_mma(const GemmParams* products, int64_t count, Stream);

// kv_project_sm90.cu: the projection of a run in one kernel, on Hopper only, without a workspace. `fits` checks dtype,
// shapes and alignments, `supports` the current device as well. Launch only supported calls. `halve_last_round`: cut
// the tiles that do not fill a round in two along hidden_size, where that makes it shorter.
bool kv_project_sm90_fits(const KvProjectParams&);
bool kv_project_sm90_supports(const KvProjectParams&);
void launch_kv_project_sm90(const KvProjectParams&, bool halve_last_round, Stream);

// attention.cu: attention over the cache for any dtype, split along the keys so that few rows fill the GPU too.
// `workspace` has attention_workspace(...) bytes, at most 17 MiB, aligned to 16.
size_t attention_workspace(const AttentionParams&);
void launch_attention(const AttentionParams&, void* workspace, Stream);

}  // namespace pop::cuda
