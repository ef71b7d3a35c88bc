// The CUDA backend: chooses for each product and each segment of attention between a kernel of cuda/ and a library's.
#pragma once

#include <torch/csrc/stable/device.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "cuda/device.h"
#include "cuda/host/options.h"
#include "cuda/host/torch_cuda.h"
#include "cuda/kernels.h"

namespace pop {

// The backend of one call. Makes `device` the current one and works on torch's current stream of it.
class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(int device);
  CudaBackend(const CudaBackend&) = delete;
  CudaBackend& operator=(const CudaBackend&) = delete;

  void build_row_tables(const RowTablesParams&) override;
  void embed(const EmbedParams&) override;
  void add_features(const AddFeaturesParams&) override;
  void rms_norm(const RmsNormParams&) override;
  void quantize_rows(const QuantizeRowsParams&) override;
  std::string products_missing(Products products, DType dtype) const override;
  std::string prepack_missing(DType) const override { return "expected a model on a CPU, got one on a CUDA device"; }
  std::unique_ptr<PackedWeight> prepack(const PrepackParams&) const override { return nullptr; }
  void gemm(const GemmParams* products, int64_t count) override;
  bool accumulates(DType dtype, int64_t rows) const override;
  bool groups_products(const GroupedGemmParams&) const override;
  void grouped_gemm(const GroupedGemmParams&) override;
  bool joins_qkv() const override { return options_.qkv_in_one_product != 0; }
  void rope_cache_write(const RopeCacheWriteParams&) override;
  void kv_project(const KvProjectParams&) override;
  void attention(const AttentionParams&) override;
  void gated_act(const GatedActParams&) override;
  void to_float32(const ToFloat32Params&) override;
  void route(const RouteParams&) override;
  void group_rows(const GroupRowsParams&) override;
  void combine_rows(const CombineRowsParams&) override;
  size_t kv_project_workspace(DType dtype, int64_t rows, int64_t hidden_size, int64_t layers,
                              int64_t kv_dim) const override;
  void copy_rows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t row_bytes,
                 int64_t rows) noexcept override;

  static void check_reported_ids(int device);
  static std::string device_missing(int device);

 private:
  void library_gemm(const GemmParams&);
  void fused_kv_project(KvProjectParams);
  torch::stable::Device torch_device() const;
  void write_kv(const KvProjectParams&, const void* kv);
  void own_attention(const AttentionParams&, const std::vector<Segment>& segments);

  const CudaOptions options_;
  int device_;
  DeviceScope scope_;
  cuda::Stream stream_;
  std::optional<cuda::EarlyLaunches> early_launches_;
};

}  // namespace pop
