// Prefill with Prefill-Only Pruning (arXiv 2602.03295): the layer-skipping loop, for every backend.
#pragma once

#include <cstddef>

#include "backend/backend.h"
#include "runtime/batch.h"
#include "runtime/model.h"

namespace pop {

// Watches a prefill.
class PrefillObserver {
 public:
  virtual ~PrefillObserver() = default;
  // The begin and the end of each stage, for profilers.
  virtual void begin(const char* stage) = 0;
  virtual void end() = 0;
  // After each layer, or run of omitted layers. An exception ends the call.
  virtual void after_layers() = 0;
};

// Features of a vision tower that are added to the rows of its tokens after one of the first layers (DeepStack).
struct LayerFeatures {
  const void* data;  // [rows, hidden_size]
  int64_t rows, stride;
};

struct PrefillCall {
  const BatchLayout* layout;
  const int64_t* ids;  // [packed rows], or null when `embeds` is given
  const void* embeds;  // [packed rows, hidden_size] or null
  int64_t embeds_stride;
  const float *cos, *sin;              // [packed rows, >= rotary_dim / 2]
  const float *cos_local, *sin_local;  // the same for layers with RoPE table 1; null if there are none
  int64_t rope_stride;
  CacheAddress address;           // host
  const LayerCache* caches;       // host [num_layers]
  bool window_only;               // omitted layers with a window: project only the rows that later rows can see
  const int64_t* feature_index;   // [packed rows] row of LayerFeatures::data, or -1; null if there are no features
  const LayerFeatures* features;  // host [feature_layers]; entry l is added after layer l
  int64_t feature_layers;
  void* hidden_states;  // [wanted rows, hidden_size]: the result, final norm applied
  void* workspace;      // workspace_bytes(...) bytes, aligned to kAlignment
};

// Bytes of PrefillCall::workspace. Reads the layout and the address of `call`; workspace and hidden_states may be null.
size_t workspace_bytes(const Model& model, const PrefillCall& call, const Backend& backend);

void prefill(const Model& model, const PrefillCall& call, Backend& backend, PrefillObserver& observer);

}  // namespace pop
