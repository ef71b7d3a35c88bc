#include <algorithm>
#include <cmath>

#include "checks.h"
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace {

using namespace pop;
using checks::Buffer;

struct Rows {
  int64_t rows, first_position;
  int64_t visible_end = 0;
};

enum class Layout {
  kHeadsFirst,  // [sequence, head, slot, channel]
  kSlotsFirst,  // [sequence, slot, head, channel]
  kUnaligned,   // heads first, with a gap of one element from slot to slot
};

struct Case {
  int64_t heads, kv_heads, head_dim;
  std::vector<Rows> segments;
  int64_t window = 0;
  Layout layout = Layout::kHeadsFirst;
  bool has_slot_table = false;
  float scale = 0.0f;  // 0: 1 / sqrt(head_dim)
  float softcap = 0.0f;
  std::vector<float> sinks = {};  // repeated over the heads; empty: none
};

std::string name_of(DType dtype, const Case& c) {
  std::string name = std::string(checks::name_of(dtype)) + " heads=" + std::to_string(c.heads) + "/" +
                     std::to_string(c.kv_heads) + " head_dim=" + std::to_string(c.head_dim) +
                     " window=" + std::to_string(c.window) + " layout=" + std::to_string(static_cast<int>(c.layout)) +
                     " table=" + std::to_string(c.has_slot_table) + " softcap=" + std::to_string(c.softcap) +
                     " sinks=" + std::to_string(c.sinks.size());
  for (const Rows& s : c.segments) {
    name += " " + std::to_string(s.rows) + "@" + std::to_string(s.first_position);
    if (s.visible_end > 0) name += ">" + std::to_string(s.visible_end);
  }
  return name;
}

// The operands of one call. Keys that no row sees, and the cache outside of the sequences, hold NaN.
class Problem {
 public:
  Problem(DType dtype, const Case& c)
      : case_(c),
        sequences_(static_cast<int64_t>(c.segments.size())),
        capacity_(capacity_of(c)),
        slot_(c.head_dim + (c.layout == Layout::kUnaligned ? 1 : 0)),
        k_(dtype, sequences_ * c.kv_heads * capacity_ * slot_, offset()),
        v_(dtype, sequences_ * c.kv_heads * capacity_ * slot_, 2 * offset()),
        q_(dtype, rows_of(c) * q_stride(), offset()),
        out_(dtype, rows_of(c) * out_stride(), offset()),
        sinks_(dtype, c.heads) {
    for (int64_t i = 0; i < c.heads; ++i) sinks_.set(i, c.sinks.empty() ? NAN : c.sinks[i % c.sinks.size()]);
    for (int64_t i = 0; i < k_.count(); ++i) k_.set(i, NAN), v_.set(i, NAN);
    place();
    std::mt19937 random(11);
    q_.fill_random(random);
    random.seed(12);
    std::normal_distribution<float> normal;
    for (const Segment& s : segments_) {
      for (int64_t p = first_visible(s.first_position); p < end_of(s); ++p) {
        for (int64_t i = 0; i < c.kv_heads * c.head_dim; ++i) {
          const int64_t at = offset_of(s.sequence, i / c.head_dim, p) + i % c.head_dim;
          k_.set(at, 1.5f * normal(random));  // steep enough for the running maximum to matter
          v_.set(at, normal(random));
        }
      }
    }
  }

  void run(const std::string& name) {
    const CacheStrides strides = strides_of();
    const AttentionParams p = {
        .dtype = q_.dtype(),
        .heads = case_.heads,
        .kv_heads = case_.kv_heads,
        .head_dim = case_.head_dim,
        .scale = scale(),
        .softcap = case_.softcap,
        .window = case_.window,
        .sinks = case_.sinks.empty() ? nullptr : sinks_.data(),
        .segments = segments_.data(),
        .num_segments = sequences_,
        .first_row = kFirstRow,
        .q = q_.data(),
        .q_stride = q_stride(),
        .out = out_.data(),
        .out_stride = out_stride(),
        .cache = {.key = k_.data(), .value = v_.data(), .key_strides = strides, .value_strides = strides},
        .address = {.start = start_.data(),
                    .slot_table = case_.has_slot_table ? table_.data() : nullptr,
                    .slot_table_stride = case_.has_slot_table ? capacity_ : 0}};
    const size_t bytes = cuda::attention_workspace(p);
    Buffer workspace(DType::f32, static_cast<int64_t>(bytes / sizeof(float)));
    cuda::launch_attention(p, workspace.data(), nullptr);
    checks::finish();
    if (!workspace.guards_intact()) throw std::runtime_error(name + ": wrote outside the workspace");
    checks::expect_close(name, out_, expected(), 1e-4f, checks::rounding(q_.dtype()));
  }

  const Buffer& out() const { return out_; }

 private:
  static constexpr int64_t kFirstRow = 5;

  static int64_t rows_of(const Case& c) {
    int64_t rows = 0;
    for (const Rows& s : c.segments) rows += s.rows;
    return rows;
  }
  static int64_t capacity_of(const Case& c) {
    int64_t longest = 0;
    for (const Rows& s : c.segments) longest = std::max({longest, s.first_position + s.rows, s.visible_end});
    return longest + 3;
  }

  // Sequences in reverse order, each with its own start. With a slot table, positions are in reverse order, and those
  // that no row sees have an invalid slot.
  void place() {
    int64_t row = kFirstRow;
    for (int64_t i = 0; i < sequences_; ++i) {
      const int64_t sequence = sequences_ - 1 - i;
      segments_.push_back({.sequence = sequence,
                           .first_row = row,
                           .rows = case_.segments[i].rows,
                           .first_position = case_.segments[i].first_position,
                           .first_source = 0,
                           .cache_start = sequence % 3,
                           .visible_end = case_.segments[i].visible_end});
      row += case_.segments[i].rows;
    }
    table_.assign(sequences_ * capacity_, 1 << 30);
    for (int64_t i = 0; i < sequences_; ++i) start_.push_back(i % 3);
    for (const Segment& s : segments_) {
      for (int64_t p = first_visible(s.first_position); p < end_of(s); ++p) {
        table_[s.sequence * capacity_ + p] = static_cast<int32_t>(capacity_ - 1 - p);
      }
    }
  }

  int64_t offset() const { return case_.layout == Layout::kUnaligned ? 1 : 0; }
  int64_t q_stride() const { return case_.heads * case_.head_dim + 3; }
  int64_t out_stride() const { return case_.heads * case_.head_dim + 5; }
  float scale() const { return case_.scale != 0.0f ? case_.scale : 1.0f / std::sqrt(float(case_.head_dim)); }

  CacheStrides strides_of() const {
    if (case_.layout == Layout::kSlotsFirst) {
      return {.batch = capacity_ * case_.kv_heads * slot_, .head = slot_, .slot = case_.kv_heads * slot_};
    }
    return {.batch = case_.kv_heads * capacity_ * slot_, .head = capacity_ * slot_, .slot = slot_};
  }
  int64_t offset_of(int64_t sequence, int64_t head, int64_t position) const {
    const int64_t slot = case_.has_slot_table ? capacity_ - 1 - position : start_[sequence] + position;
    const CacheStrides s = strides_of();
    return sequence * s.batch + head * s.head + slot * s.slot;
  }
  static int64_t end_of(const Segment& s) { return std::max(s.first_position + s.rows, s.visible_end); }
  int64_t first_visible(int64_t position) const {
    return case_.window > 0 ? std::max<int64_t>(0, position - case_.window + 1) : 0;
  }

  std::vector<float> expected() const {
    std::vector<float> out(out_.count(), Buffer::kSentinel);
    for (const Segment& s : segments_) {
      for (int64_t i = 0; i < s.rows * case_.heads; ++i) {
        const int64_t row = s.first_row - kFirstRow + i / case_.heads, head = i % case_.heads;
        attend(s, s.first_position + i / case_.heads, head, row * q_stride() + head * case_.head_dim,
               &out[row * out_stride() + head * case_.head_dim]);
      }
    }
    return out;
  }

  void attend(const Segment& s, int64_t position, int64_t head, int64_t q_at, float* out) const {
    const int64_t kv_head = head / (case_.heads / case_.kv_heads), first = first_visible(position);
    const int64_t last = std::max(position, s.visible_end - 1);
    std::vector<double> weights, sums(case_.head_dim);
    double top = case_.sinks.empty() ? -INFINITY : double(sinks_.get(head)), total = 0;
    const double sink = top;
    for (int64_t p = first; p <= last; ++p) {
      double score = 0;
      const int64_t at = offset_of(s.sequence, kv_head, p);
      for (int64_t d = 0; d < case_.head_dim; ++d) score += double(q_.get(q_at + d)) * k_.get(at + d);
      score *= scale();
      weights.push_back(case_.softcap > 0.0f ? case_.softcap * std::tanh(score / case_.softcap) : score);
      top = std::max(top, weights.back());
    }
    total += std::exp(sink - top);
    for (int64_t p = first; p <= last; ++p) {
      const double weight = std::exp(weights[p - first] - top);
      total += weight;
      const int64_t at = offset_of(s.sequence, kv_head, p);
      for (int64_t d = 0; d < case_.head_dim; ++d) sums[d] += weight * v_.get(at + d);
    }
    for (int64_t d = 0; d < case_.head_dim; ++d) out[d] = static_cast<float>(sums[d] / total);
  }

  const Case case_;
  const int64_t sequences_, capacity_, slot_;
  Buffer k_, v_, q_, out_, sinks_;
  std::vector<Segment> segments_;
  checks::Vector<int64_t> start_;
  checks::Vector<int32_t> table_;
};

void run_all(const std::vector<Case>& cases) {
  const DType dtypes[] = {DType::f32, DType::bf16, DType::f16};
  checks::Turns turns[] = {checks::Turns(dtypes[0]), checks::Turns(dtypes[1]), checks::Turns(dtypes[2])};
  for (const Case& c : cases) {
    for (size_t d = 0; d < 3; ++d) {
      if (turns[d].next()) Problem(dtypes[d], c).run(name_of(dtypes[d], c));
    }
  }
}

// One tile of 4, 8, 16 and 32 queries each, with and without a split along the keys.
void run_boundary() {
  run_all({
      {.heads = 4, .kv_heads = 1, .head_dim = 128, .segments = {{1, 0}}},
      {.heads = 4, .kv_heads = 1, .head_dim = 64, .segments = {{1, 200}}},
      {.heads = 8, .kv_heads = 1, .head_dim = 80, .segments = {{1, 130}}},
      {.heads = 6, .kv_heads = 2, .head_dim = 128, .segments = {{2, 65}}},
      {.heads = 2, .kv_heads = 2, .head_dim = 256, .segments = {{3, 127}}},
      {.heads = 8, .kv_heads = 2, .head_dim = 8, .segments = {{3, 90}}},
      {.heads = 5, .kv_heads = 1, .head_dim = 96, .segments = {{3, 62}}},
      {.heads = 7, .kv_heads = 1, .head_dim = 64, .segments = {{4, 126}}},
  });
}

// Rows from the start of a sequence: several tiles at the diagonal, the last one not full.
void run_prefill() {
  run_all({
      {.heads = 2, .kv_heads = 1, .head_dim = 64, .segments = {{67, 0}}},
      {.heads = 1, .kv_heads = 1, .head_dim = 256, .segments = {{33, 40}}},
      {.heads = 8, .kv_heads = 1, .head_dim = 80, .segments = {{9, 3}}},
  });
  if (checks::kRaces) return;
  // So many KV heads that keys are not split.
  Problem(DType::bf16, {.heads = 300, .kv_heads = 300, .head_dim = 8, .segments = {{2, 70}}}).run("many heads");
}

void run_windows() {
  std::vector<Case> cases = {{.heads = 1, .kv_heads = 1, .head_dim = 32, .segments = {{40, 100}}, .window = 30}};
  for (const int64_t window : {1, 63, 64, 65, 130}) {
    cases.push_back({.heads = 2, .kv_heads = 1, .head_dim = 64, .segments = {{1, 129}}, .window = window});
  }
  for (const int64_t position : {15, 16, 17}) {
    cases.push_back({.heads = 4, .kv_heads = 2, .head_dim = 16, .segments = {{5, position}}, .window = 17});
  }
  run_all(cases);
}

// Soft caps far above, near and below the scores, in tiles of every size, with and without a split along the keys.
void run_softcaps() {
  std::vector<Case> cases;
  for (const float softcap : {0.5f, 5.0f, 50.0f}) {
    if (checks::kRaces && softcap != 5.0f) continue;
    cases.push_back({.heads = 4, .kv_heads = 1, .head_dim = 64, .segments = {{1, 200}}, .softcap = softcap});
    cases.push_back({.heads = 8, .kv_heads = 1, .head_dim = 40, .segments = {{1, 130}}, .softcap = softcap});
    cases.push_back({.heads = 2, .kv_heads = 2, .head_dim = 256, .segments = {{9, 40}}, .softcap = softcap});
    cases.push_back({.heads = 2,
                     .kv_heads = 1,
                     .head_dim = 24,
                     .segments = {{33, 3}, {1, 70}},
                     .window = 17,
                     .has_slot_table = true,
                     .scale = -0.9f,
                     .softcap = softcap});
  }
  run_all(cases);
}

// Sinks near, far above and far below the scores, in tiles of every size, with and without a split along the keys.
void run_sinks() {
  const std::vector<float> sinks = {1.0f, -2.0f, 6.0f, -1e4f, 1e4f, -INFINITY};
  std::vector<Case> cases = {
      {.heads = 4, .kv_heads = 1, .head_dim = 64, .segments = {{1, 200}}, .sinks = {1.0f, 3.0f}},
      {.heads = 8, .kv_heads = 2, .head_dim = 64, .segments = {{1, 0}, {2, 190}}, .window = 70, .sinks = sinks},
      {.heads = 8, .kv_heads = 1, .head_dim = 40, .segments = {{1, 130}, {4, 60}}, .sinks = sinks},
      {.heads = 6, .kv_heads = 2, .head_dim = 24, .segments = {{33, 3}, {1, 70}}, .window = 17, .sinks = sinks},
  };
  if (!checks::kRaces)
    cases.push_back({.heads = 2, .kv_heads = 2, .head_dim = 256, .segments = {{9, 40}}, .sinks = sinks});
  run_all(cases);
}

// Sequences of different lengths and tile sizes, every cache layout, and scales of either sign.
void run_layouts() {
  std::vector<Rows> segments = {{1, 70}, {1, 66}, {1, 0}, {9, 60}, {0, 7}, {2, 1}};
  if (checks::kRaces) segments = {{1, 70}, {9, 60}, {0, 7}};
  std::vector<Case> cases;
  for (const Layout layout : {Layout::kHeadsFirst, Layout::kSlotsFirst, Layout::kUnaligned}) {
    if (checks::kRaces && layout == Layout::kSlotsFirst) continue;  // same code path as kHeadsFirst
    cases.push_back({.heads = 4, .kv_heads = 2, .head_dim = 40, .segments = segments, .layout = layout});
    cases.push_back({.heads = 4,
                     .kv_heads = 2,
                     .head_dim = 24,
                     .segments = segments,
                     .window = 33,
                     .layout = layout,
                     .has_slot_table = true,
                     .scale = -0.3f});
  }
  run_all(cases);
}

// Images: whole ones, parts of one, and a few rows of a long one, with windows shorter and longer than the image.
void run_images() {
  std::vector<Case> cases;
  for (const int64_t window : {0, 5, 40, 300}) {
    if (checks::kRaces && (window == 5 || window == 300)) continue;
    cases.push_back({.heads = 4, .kv_heads = 2, .head_dim = 64, .segments = {{40, 7, 47}}, .window = window});
    cases.push_back(
        {.heads = 2, .kv_heads = 1, .head_dim = 40, .segments = {{9, 30, 71}, {3, 0, 3}}, .window = window});
    cases.push_back({.heads = 4, .kv_heads = 1, .head_dim = 32, .segments = {{2, 140, 191}, {5, 9}}, .window = window});
  }
  run_all(cases);
}

// More segments than fit in one launch.
void run_many_segments() {
  std::vector<Rows> segments;
  for (int64_t i = 0; i < 50; ++i) segments.push_back({1, i % 20 == 3 ? 70 : i % 5});
  Problem(DType::bf16, {.heads = 2, .kv_heads = 1, .head_dim = 16, .segments = segments}).run("many segments");
}

// The bits of a row do not depend on the other sequences of the call.
void run_alone() {
  const Case alone = {.heads = 4, .kv_heads = 1, .head_dim = 64, .segments = {{1, 150}}};
  Case first = alone;
  first.segments = {{1, 150}, {1, 30}, {6, 90}};
  Problem a(DType::f32, alone), b(DType::f32, first);
  a.run("alone");
  b.run("with others");
  // Problem draws the first row's q and keys first.
  for (int64_t i = 0; i < 4 * 64; ++i) {
    if (a.out().get(i) != b.out().get(i)) throw std::runtime_error("a row depends on other sequences");
  }
}

#if defined(POP_CUDA_SHIM)

// Wide heads on devices that have too little shared memory for a tile of 32 queries, of 8 or 16, or for any.
void run_small_devices() {
  if (checks::kRaces) return;  // other checks run these tiles
  struct Restored {
    size_t bytes = cuda::device_facts().block_shared_bytes;
    ~Restored() { cuda_shim::set_block_shared_bytes(bytes); }
  } restored;
  const std::vector<Rows> segments = {{33, 40}, {1, 130}, {9, 0}};
  for (const size_t bytes : {99 << 10, 79 << 10}) {  // of compute capability 8.6, 8.9 and 12.0; of none
    cuda_shim::set_block_shared_bytes(bytes);
    run_all({{.heads = 2, .kv_heads = 1, .head_dim = 256, .segments = segments}});
  }
  cuda_shim::set_block_shared_bytes(1000);
  const std::string expected = "CUDA: attention: expected at most 1000 bytes of shared memory per block";
  try {
    run_all({{.heads = 2, .kv_heads = 1, .head_dim = 64, .segments = segments}});
  } catch (const std::runtime_error& error) {
    if (std::string(error.what()).find(expected) != std::string::npos) return;
    throw;
  }
  throw std::runtime_error("a launch with more shared memory than the device has is accepted");
}

// The number of SMs decides how keys are cut. Beyond 256 it has no effect.
void run_other_sizes() {
  if (checks::kRaces) return;  // other checks run these kernels
  struct Restored {
    int count = cuda::device_facts().sm_count;
    ~Restored() { cuda_shim::set_sm_count(count); }
  } restored;
  Segment segment{};
  segment.rows = 1;
  segment.first_position = 100000;
  AttentionParams params{};
  params.dtype = DType::bf16;
  params.heads = 4, params.kv_heads = 1, params.head_dim = 64;
  params.segments = &segment;
  params.num_segments = 1;
  std::vector<size_t> bytes;
  for (const int count : {1, 20, 132, 256, 1000}) {
    cuda_shim::set_sm_count(count);
    run_all({{.heads = 4, .kv_heads = 1, .head_dim = 64, .segments = {{1, 1500}, {40, 700}, {7, 130}}}});
    bytes.push_back(cuda::attention_workspace(params));
  }
  if (!(bytes[0] < bytes[1] && bytes[1] < bytes[2] && bytes[2] < bytes[3] && bytes[3] == bytes[4])) {
    throw std::runtime_error("the workspace does not follow the number of SMs");
  }
}

#endif

// The workspace depends on the parameters and the device alone, and is bounded.
void run_workspace() {
  Segment segment{};
  segment.rows = 8;
  segment.first_position = 131000;
  const std::vector<Segment> segments(200, segment);
  AttentionParams p{};
  p.heads = 32, p.kv_heads = 8, p.head_dim = 256;
  p.segments = segments.data();
  size_t before = 0;
  for (p.num_segments = 0; p.num_segments <= 200; ++p.num_segments) {
    const size_t bytes = cuda::attention_workspace(p);
    if (bytes < before || bytes > size_t{17} << 20) throw std::runtime_error("workspace of " + std::to_string(bytes));
    before = bytes;
  }
  if (before == 0) throw std::runtime_error("long sequences are not cut");
}

const checks::Check boundary("attention of boundary rows", run_boundary);
const checks::Check prefill("attention of many rows", run_prefill);
const checks::Check windows("attention in a window", run_windows);
const checks::Check softcaps("attention with capped scores", run_softcaps);
const checks::Check sinks("attention with sinks", run_sinks);
const checks::Check images("attention of rows that see ahead", run_images);
const checks::Check layouts("attention over cache layouts", run_layouts);
const checks::Check many("attention of many segments", run_many_segments);
const checks::Check alone("attention of a row alone", run_alone);
#if defined(POP_CUDA_SHIM)
const checks::Check small_devices("attention on devices with little shared memory", run_small_devices);
const checks::Check other_sizes("attention on devices with other numbers of SMs", run_other_sizes);
#endif
const checks::Check workspace("attention workspace", run_workspace);

}  // namespace
