// Prefill-only pruning, once, for every backend: the layer-skipping loop.
#pragma once

#include <cstddef>

#include "backend/backend.h"
#include "runtime/batch.h"
#include "runtime/model.h"

namespace pop {

// Told when a stage begins and ends, so that a profiler can show what ran.
class StageObserver {
 public:
  virtual ~StageObserver() = default;
  virtual void begin(const char* stage) = 0;
  virtual void end() = 0;
};

// What a vision tower adds to the rows of its tokens after one of the first layers (DeepStack).
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
  const float *cos_local, *sin_local;  // the same, of layers with rope table 1; null without them
  int64_t rope_stride;
  CacheAddress address;           // host
  const LayerCache* caches;       // host [num_layers]
  bool window_only;               // omitted layers with a window: project what it lets later rows see, no more
  const int64_t* feature_index;   // [packed rows] row of every LayerFeatures, or -1; null without them
  const LayerFeatures* features;  // host [feature_layers]: those of layer l are added after it
  int64_t feature_layers;
  void* hidden_states;  // [wanted rows, hidden_size]: the result, final norm applied
  void* workspace;      // workspace_bytes(...) bytes, aligned to kAlignment
};

// With what `call` says of its rows; its pointers to memory of the device are not looked at.
size_t workspace_bytes(const Model& model, const PrefillCall& call, const Backend& backend);

void prefill(const Model& model, const PrefillCall& call, Backend& backend, StageObserver& observer);

}  // namespace pop
