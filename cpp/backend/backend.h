// The interface of a backend: the kernels of a prefill. The loop that calls them is runtime/prefill.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "backend/params.h"

namespace pop {

// Calls run in the order in which they are made. A device may run them later than the call returns, except where a
// function says otherwise.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual void build_row_tables(const RowTablesParams&) = 0;
  virtual void embed(const EmbedParams&) = 0;
  virtual void add_features(const AddFeaturesParams&) = 0;
  virtual void rms_norm(const RmsNormParams&) = 0;
  virtual void rope_cache_write(const RopeCacheWriteParams&) = 0;
  virtual void attention(const AttentionParams&) = 0;
  virtual void gated_act(const GatedActParams&) = 0;

  // `count` products that do not depend on each other: those of few rows may share a launch, of few columns
  // the threads.
  virtual void gemm(const GemmParams* products, int64_t count) = 0;
  // True if products of so many rows should add to the residual stream themselves (GemmParams::accumulate), so that the
  // next norm has nothing to add.
  virtual bool accumulates(DType /*dtype*/, int64_t /*rows*/) const { return false; }

  // True if q, k and v should come from one product where their weights are adjacent rows (LayerWeights::qkv_adjacent).
  virtual bool joins_qkv() const { return false; }

  virtual void kv_project(const KvProjectParams&) = 0;
  // Bytes of KvProjectParams::workspace for a call of at most `rows` rows.
  virtual size_t kv_project_workspace(DType dtype, int64_t rows, int64_t hidden_size, int64_t layers,
                                      int64_t kv_dim) const = 0;

  virtual void quantize_rows(const QuantizeRowsParams&) = 0;
  // The reason why this backend computes no fp8 or int8 products with results of `dtype`; empty if it does.
  virtual std::string products_missing(Products products, DType dtype) const = 0;
  // The two products of a gated MLP and its activation.
  virtual void gated_gemm(const GatedGemmParams& p) {
    const GemmParams products[] = {p.gate, p.up};
    gemm(products, 2);
    gated_act(p.act);
  }

  // The reason why this backend cannot prepack weights of `dtype`; empty if it can.
  virtual std::string prepack_missing(DType dtype) const = 0;
  // Call only if prepack_missing is empty.
  virtual std::unique_ptr<PackedWeight> prepack(const PrepackParams&) const = 0;

  // Rows of a dense MLP to compute at a time for the best speed; at most kMlpChunkRows are used.
  virtual int64_t mlp_rows(DType /*dtype*/, Products /*products*/) const { return kMlpChunkRows; }

  virtual void to_float32(const ToFloat32Params&) = 0;
  virtual void route(const RouteParams&) = 0;
  // Waits for the device, unless host_begin is null: it is filled on return.
  virtual void group_rows(const GroupRowsParams&) = 0;
  // True if grouped_gemm computes such products. Then the host need not know how many rows each group has. `begin` may
  // not be filled yet.
  virtual bool groups_products(const GroupedGemmParams&) const { return false; }
  virtual void grouped_gemm(const GroupedGemmParams&) { throw std::logic_error("pop: grouped_gemm: not supported"); }
  virtual void combine_rows(const CombineRowsParams&) = 0;

  // Copies rows of `row_bytes` each, strides in bytes. Restores a cache after a failed call, so it never throws.
  virtual void copy_rows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t row_bytes,
                         int64_t rows) noexcept = 0;
};

}  // namespace pop
