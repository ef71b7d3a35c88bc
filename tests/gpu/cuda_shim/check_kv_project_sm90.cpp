// The whole kernel, on sm90_emulated.h or on a Hopper, against the formula: ring, tiles, accumulators, epilogue and
// cache.
#include "checks.h"
#include "cuda/kernels.h"
#include "cuda/kv_project_tile.h"

namespace {

using namespace pop;
using checks::Buffer;

struct Case {
  const char* name;
  int64_t rows, hidden, kv_heads, head_dim, layers;
  bool bias = false, norm = false, given_rstd = false, table = false;
  int64_t first_row = 0, x_padding = 0;
  bool in_races = false;  // also run under ThreadSanitizer: it has a wait that other cases do not have
  bool halves = false;    // tiles of the last round are halved; under the shim that needs an odd number of units
};

// Operands and outputs of one case.
struct Run {
  static constexpr int64_t kSequences = 3, kFirstPosition = 4;
  static constexpr float kEps = 1e-5f;

  const Case& c;
  int64_t batch_rows = c.first_row + c.rows;
  int64_t x_stride = c.hidden + c.x_padding;
  int64_t kv_dim = c.kv_heads * c.head_dim;
  int64_t capacity = kFirstPosition + batch_rows / kSequences + 9;
  std::mt19937 random{17};
  Buffer x{DType::bf16, c.rows * x_stride};
  Buffer weight{DType::bf16, c.layers * 2 * kv_dim * c.hidden};
  Buffer cos{DType::f32, batch_rows * c.head_dim / 2}, sin{DType::f32, batch_rows * c.head_dim / 2};
  checks::Vector<float> rstd = checks::Vector<float>(c.rows);
  checks::Vector<int64_t> sequence = checks::Vector<int64_t>(batch_rows), position = sequence, start = {2, 0, 5};
  checks::Vector<int32_t> slots = checks::Vector<int32_t>(kSequences * capacity);
  std::vector<Buffer> vectors;  // k_bias, v_bias, k_norm of every layer
  std::vector<Buffer> keys, values;
  std::vector<std::vector<float>> expected_keys, expected_values;

  explicit Run(const Case& given) : c(given) {
    x.fill_random(random);
    weight.fill_random(random, 0.1f);
    cos.fill_random(random);
    sin.fill_random(random);
    for (int64_t row = 0; row < batch_rows; ++row) {
      sequence[row] = row % kSequences;
      position[row] = kFirstPosition + row / kSequences;
    }
    for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int32_t>(capacity - 1 - i % capacity);
    for (int64_t i = 0; i < 3 * c.layers; ++i) {
      vectors.emplace_back(DType::bf16, i % 3 == 2 ? c.head_dim : kv_dim);
      vectors.back().fill_random(random);
    }
    for (int64_t layer = 0; layer < c.layers; ++layer) {
      keys.emplace_back(DType::bf16, kSequences * kv_dim * capacity);
      values.emplace_back(DType::bf16, kSequences * kv_dim * capacity);
    }
    const std::vector<float> untouched(kSequences * kv_dim * capacity, Buffer::kSentinel);
    expected_keys.assign(c.layers, untouched);
    expected_values.assign(c.layers, untouched);
  }

  CacheAddress address() const {
    return {.start = start.data(), .slot_table = c.table ? slots.data() : nullptr, .slot_table_stride = capacity};
  }
  // Keys [sequence, head, slot, channel], values [sequence, slot, head, channel].
  CacheStrides key_strides() const { return {kv_dim * capacity, capacity * c.head_dim, c.head_dim}; }
  CacheStrides value_strides() const { return {kv_dim * capacity, c.head_dim, kv_dim}; }

  const Buffer* vector(bool wanted, int64_t layer, int which) const {
    return wanted ? &vectors[3 * layer + which] : nullptr;
  }

  float row_scale(int64_t row) const {
    if (c.given_rstd) return rstd[row];
    float squares = 0.0f;
    for (int64_t k = 0; k < c.hidden; ++k) squares += x.get(row * x_stride + k) * x.get(row * x_stride + k);
    return rms_scale(squares, c.hidden, kEps);
  }

  // One head of one row, computed by the formula.
  void head(int64_t row, int64_t layer, bool is_value, int64_t h) {
    const int64_t dim = c.head_dim, batch_row = c.first_row + row;
    const float scale = row_scale(row);
    std::vector<float> head(dim);
    const Buffer* bias = vector(c.bias, layer, is_value ? 1 : 0);
    float squares = 0.0f;
    for (int64_t i = 0; i < dim; ++i) {
      const int64_t column = layer * 2 * kv_dim + (is_value ? kv_dim : 0) + h * dim + i;
      float sum = 0.0f;
      for (int64_t k = 0; k < c.hidden; ++k) sum += x.get(row * x_stride + k) * weight.get(column * c.hidden + k);
      head[i] = sum * scale + (bias == nullptr ? 0.0f : bias->get(h * dim + i));
      squares += head[i] * head[i];
    }
    if (!is_value && c.norm) {
      const float norm = rms_scale(squares, dim, kEps);
      for (int64_t i = 0; i < dim; ++i) head[i] *= norm * vector(true, layer, 2)->get(i);
    }
    for (int64_t i = 0; !is_value && i < dim / 2; ++i) {
      const int64_t angle = batch_row * dim / 2 + i;
      rope_rotate(head[i], head[i + dim / 2], cos.get(angle), sin.get(angle));
    }
    const CacheStrides strides = is_value ? value_strides() : key_strides();
    const int64_t offset = cache_offset(strides, address(), sequence[batch_row], h, position[batch_row]);
    auto& expected = is_value ? expected_values[layer] : expected_keys[layer];
    for (int64_t i = 0; i < dim; ++i) expected[offset + i] = checks::round_to(DType::bf16, head[i]);
  }

  // Calls `use` with the parameters of the case.
  template <class Use>
  void with_params(const Use& use) {
    const Batch batch = {.rows = batch_rows,
                         .sequences = kSequences,
                         .row_sequence = sequence.data(),
                         .row_position = position.data(),
                         .row_source = nullptr,
                         .cos = static_cast<const float*>(cos.data()),
                         .sin = static_cast<const float*>(sin.data()),
                         .cos_local = nullptr,
                         .sin_local = nullptr,
                         .address = address()};
    std::vector<LayerCache> caches;
    std::vector<const void*> k_bias, v_bias, k_norm;
    for (int64_t layer = 0; layer < c.layers; ++layer) {
      caches.push_back({keys[layer].data(), values[layer].data(), key_strides(), value_strides()});
      k_bias.push_back(vector(true, layer, 0)->data());
      v_bias.push_back(vector(true, layer, 1)->data());
      k_norm.push_back(vector(true, layer, 2)->data());
    }
    const KvProjectParams p = {.dtype = DType::bf16,
                               .first_row = c.first_row,
                               .rows = c.rows,
                               .hidden_size = c.hidden,
                               .kv_heads = c.kv_heads,
                               .head_dim = c.head_dim,
                               .rotary_dim = c.head_dim,
                               .x = x.data(),
                               .x_stride = x_stride,
                               .rstd = c.given_rstd ? rstd.data() : nullptr,
                               .layers = c.layers,
                               .weight = weight.data(),
                               .k_bias = c.bias ? k_bias.data() : nullptr,
                               .v_bias = c.bias ? v_bias.data() : nullptr,
                               .k_norm = c.norm ? k_norm.data() : nullptr,
                               .eps = kEps,
                               .batch = &batch,
                               .caches = caches.data(),
                               .workspace = nullptr};
    use(p);
  }

  void launch() {
    with_params([&](const KvProjectParams& p) {
      if (!cuda::kv_project_sm90_fits(p)) throw std::runtime_error(std::string(c.name) + ": expected to fit");
#if defined(POP_CUDA_SHIM)
      if (cuda::kv_project_sm90_supports(p)) throw std::runtime_error("no CPU is a Hopper");
#else
      if (!cuda::kv_project_sm90_supports(p)) throw std::runtime_error("needs a GPU of compute capability 9.0");
#endif
      cuda::launch_kv_project_sm90(p, c.halves, nullptr);
      checks::finish();
    });
  }

  // The case is one that its name says.
  void expect_halves() const {
    using namespace cuda::kv_tile;
    constexpr int kClusters = 2;  // of the emulation
    const int rows = static_cast<int>(ceil_div<int64_t>(c.rows, kRows));
    const TileOrder order = {rows, static_cast<int>(ceil_div<int64_t>(c.layers * 2 * kv_dim, kColumns)),
                             cluster_for(rows)};
    if (whole_units(order, static_cast<int>(c.hidden) / kDepth, kClusters) == unit_count(order)) {
      throw std::runtime_error(std::string(c.name) + ": expected halves");
    }
  }

  void check() {
    if (c.halves) expect_halves();
    for (int64_t row = 0; row < c.rows; ++row) rstd[row] = 0.5f + 0.01f * static_cast<float>(row % 100);
    for (int64_t row = 0; row < c.rows; ++row) {
      for (int64_t layer = 0; layer < c.layers; ++layer) {
        for (int64_t h = 0; h < c.kv_heads; ++h) {
          head(row, layer, false, h);
          head(row, layer, true, h);
        }
      }
    }
    launch();
    for (int64_t layer = 0; layer < c.layers; ++layer) {
      const std::string where = std::string(c.name) + ", layer " + std::to_string(layer);
      const float relative = checks::rounding(DType::bf16);
      checks::expect_close(where + ", keys", keys[layer], expected_keys[layer], 2e-3f, relative);
      checks::expect_close(where + ", values", values[layer], expected_values[layer], 2e-3f, relative);
    }
  }
};

// Rings that wrap within a tile and between tiles; tiles that end within a block, a cluster or a head's columns; more
// tiles than blocks; more layers than fit in one launch.
const Case kCases[] = {
    {.name = "one row", .rows = 1, .hidden = 64, .kv_heads = 1, .head_dim = 64, .layers = 1, .in_races = true},
    {.name = "a cluster, two column tiles",
     .rows = 129,
     .hidden = 320,
     .kv_heads = 2,
     .head_dim = 128,
     .layers = 1,
     .in_races = true},
    {.name = "three row tiles without a cluster",
     .rows = 300,
     .hidden = 192,
     .kv_heads = 1,
     .head_dim = 128,
     .layers = 2,
     .bias = true,
     .norm = true,
     .given_rstd = true,
     .in_races = true},
    {.name = "heads of 64, a last column tile half full",
     .rows = 130,
     .hidden = 128,
     .kv_heads = 3,
     .head_dim = 64,
     .layers = 1,
     .bias = true,
     .table = true,
     .first_row = 7,
     .x_padding = 8},
    {.name = "heads of 256",
     .rows = 33,
     .hidden = 640,
     .kv_heads = 1,
     .head_dim = 256,
     .layers = 2,
     .norm = true,
     .table = true},
    {.name = "a last cluster whose second block has no rows",
     .rows = 2049,
     .hidden = 64,
     .kv_heads = 1,
     .head_dim = 64,
     .layers = 1,
     .in_races = true},
    {.name = "after a whole unit, halves of three steps and two",
     .rows = 129,
     .hidden = 320,
     .kv_heads = 3,
     .head_dim = 128,
     .layers = 1,
     .in_races = true,
     .halves = true},
    {.name = "halves alone, of more steps than the ring has",
     .rows = 200,
     .hidden = 704,
     .kv_heads = 1,
     .head_dim = 64,
     .layers = 2,
     .bias = true,
     .norm = true,
     .given_rstd = true,
     .table = true,
     .first_row = 3,
     .halves = true},
    {.name = "a half of one step, of a block without rows",
     .rows = 2049,
     .hidden = 128,
     .kv_heads = 1,
     .head_dim = 64,
     .layers = 1,
     .in_races = true,
     .halves = true},
    {.name = "more layers than a launch takes",
     .rows = 5,
     .hidden = 64,
     .kv_heads = 1,
     .head_dim = 64,
     .layers = 34,
     .norm = true,
     .first_row = 3},
};

void run() {
  for (const Case& each : kCases) {
    if (each.in_races || !checks::kRaces) Run(each).check();
  }
}

// Unsupported calls are refused before anything is launched.
void refusals() {
  const Case plain = {
      .name = "plain", .rows = 5, .hidden = 64, .kv_heads = 1, .head_dim = 64, .layers = 1, .bias = true};
  const auto refused = [&](const char* what, const auto& change) {
    Run(plain).with_params([&](KvProjectParams p) {
      change(p);
      if (cuda::kv_project_sm90_fits(p)) throw std::runtime_error(std::string("expected to be refused: ") + what);
    });
  };
  const auto moved = [](const void* from, int64_t bytes) -> const void* {
    return static_cast<const char*>(from) + bytes;
  };
  refused("float16", [](auto& p) { p.dtype = DType::f16; });
  refused("head_dim 96", [](auto& p) { p.head_dim = p.rotary_dim = 96; });
  refused("partial RoPE", [](auto& p) { p.rotary_dim = 32; });
  refused("rows that are not normalised", [](auto& p) { p.normalise = false; });
  refused("an offset of k_norm", [](auto& p) {
    p.k_norm = p.k_bias;
    p.norm_offset = 1.0f;
  });
  refused("k_norm over all heads", [](auto& p) { p.norm_over_heads = true; });
  refused("a second table of RoPE", [](auto& p) {
    static constexpr int64_t kLocal = 1;
    p.rope_table = &kLocal;
  });
  refused("interleaved RoPE", [](auto& p) { p.rope.interleaved = true; });
  refused("k_norm after RoPE", [](auto& p) {
    p.k_norm = p.k_bias;
    p.rope.norm_after = true;
  });
  refused("hidden 96", [](auto& p) { p.hidden_size = 96; });
  refused("x at 8 bytes", [&](auto& p) { p.x = moved(p.x, 8); });
  refused("a row stride of 68", [](auto& p) { p.x_stride = 68; });
  refused("W at 8 bytes", [&](auto& p) { p.weight = moved(p.weight, 8); });
  refused("too many rows", [](auto& p) { p.rows = int64_t{1} << 40; });
  refused("a cache at 8 bytes", [](auto& p) {
    static LayerCache cache;
    cache = p.caches[0];
    cache.key = static_cast<char*>(cache.key) + 8;
    p.caches = &cache;
  });
  refused("a slot stride of 68", [](auto& p) {
    static LayerCache cache;
    cache = p.caches[0];
    cache.value_strides.slot = 68;
    p.caches = &cache;
  });
  refused("a bias at 2 bytes", [&](auto& p) {
    static const void* bias;
    bias = moved(p.k_bias[0], 2);
    p.k_bias = &bias;
  });
}

const checks::Check check("kv_project_sm90", run);
const checks::Check check_refusals("kv_project_sm90 refusals", refusals);

}  // namespace
