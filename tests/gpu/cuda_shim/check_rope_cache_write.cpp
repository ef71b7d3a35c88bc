// rope_cache_write and kv_epilogue against one head at a time, in the order of the formula.
#include "checks.h"
#include "cuda/kernels.h"

namespace {

using namespace pop;
using checks::Buffer;

constexpr int64_t kSequences = 3, kCapacity = 96;
constexpr float kEps = 1e-3f;

struct Shape {
  DType dtype;
  int64_t rows, kv_heads, head_dim, rotary_dim;
  int64_t first_row = 0;
  bool slot_table = false;
  bool heads_inside = false;  // caches [sequence, slot, head, channel] instead of [sequence, head, slot, channel]
  int64_t q_pad = 0, kv_pad = 0, cache_pad = 0;  // extra elements between rows, and between slots
  int64_t offset = 0;                            // of every operand from an aligned base
};

std::string name_of(const Shape& s) {
  return checks::name_of(s.dtype) + " rows " + std::to_string(s.rows) + " kv_heads " + std::to_string(s.kv_heads) +
         " head_dim " + std::to_string(s.head_dim) + " rotary " + std::to_string(s.rotary_dim) +
         (s.slot_table ? " table" : "") + (s.heads_inside ? " [B,S,H,D]" : "") + " pad " + std::to_string(s.q_pad) +
         "," + std::to_string(s.kv_pad) + "," + std::to_string(s.cache_pad) + " offset " + std::to_string(s.offset);
}

Buffer random_buffer(const Shape& s, int64_t count, std::mt19937& random) {
  Buffer buffer(s.dtype, count, s.offset);
  buffer.fill_random(random);
  return buffer;
}

// The row tables: alternating sequences, increasing positions, slots shuffled by a table.
struct Rows {
  checks::Vector<int64_t> sequence, position, start;
  checks::Vector<int32_t> table;
  std::vector<Buffer> cos, sin;  // of rope table 0, of table 1
  Batch batch;

  Rows(const Shape& s, std::mt19937& random)
      : cos(2, Buffer(DType::f32, (s.first_row + s.rows) * s.rotary_dim / 2)), sin(cos) {
    const int64_t rows = s.first_row + s.rows;
    for (int64_t row = 0; row < rows; ++row) {
      sequence.push_back((row + 1) % kSequences);
      position.push_back(row / kSequences);
    }
    for (int64_t i = 0; i < kSequences; ++i) start.push_back(2 * i + 1);
    for (int64_t i = 0; i < kSequences * kCapacity; ++i) table.push_back(static_cast<int32_t>((i * 7 + 3) % kCapacity));
    for (int table = 0; table < 2; ++table) {
      for (int64_t i = 0; i < cos[table].count(); ++i) {
        const float angle = std::uniform_real_distribution<float>(-3.0f, 3.0f)(random);
        cos[table].set(i, std::cos(angle));
        sin[table].set(i, std::sin(angle));
      }
    }
    batch = {.rows = rows,
             .sequences = kSequences,
             .row_sequence = sequence.data(),
             .row_position = position.data(),
             .row_source = nullptr,
             .cos = static_cast<const float*>(cos[0].data()),
             .sin = static_cast<const float*>(sin[0].data()),
             .cos_local = static_cast<const float*>(cos[1].data()),
             .sin_local = static_cast<const float*>(sin[1].data()),
             .address = {.start = start.data(),
                         .slot_table = s.slot_table ? table.data() : nullptr,
                         .slot_table_stride = kCapacity}};
  }

  int64_t slot(const Shape& s, int64_t row) const {
    return s.slot_table ? table[sequence[row] * kCapacity + position[row]] : start[sequence[row]] + position[row];
  }
};

// A cache of sentinels, and what it should hold after the call.
struct Cache {
  Buffer buffer;
  CacheStrides strides;
  std::vector<float> expected;

  explicit Cache(const Shape& s)
      : buffer(s.dtype, kSequences * (kCapacity * s.kv_heads) * (s.head_dim + s.cache_pad), s.offset),
        expected(buffer.count(), Buffer::kSentinel) {
    const int64_t step = s.head_dim + s.cache_pad;
    strides = {.batch = kCapacity * s.kv_heads * step,
               .head = s.heads_inside ? step : kCapacity * step,
               .slot = s.heads_inside ? s.kv_heads * step : step};
  }
};

struct HeadInput {
  const Buffer& raw;
  int64_t at;  // of channel 0 in `raw`
  const Buffer* bias;
  int64_t bias_at;
  const Buffer* norm;
  float scale;
  bool turns;
  int64_t rope_table = 0;
  float norm_offset = 0.0f;
  RopeForm rope;
};

std::vector<float> reference(const Shape& s, const Rows& rows, int64_t row, const HeadInput& head) {
  std::vector<double> value(s.head_dim);
  for (int64_t i = 0; i < s.head_dim; ++i) {
    value[i] = static_cast<double>(head.raw.get(head.at + i)) * head.scale;
    if (head.bias != nullptr) value[i] += head.bias->get(head.bias_at + i);
  }
  const auto normalise = [&] {
    if (head.norm == nullptr) return;
    double squares = 0.0;
    for (const double v : value) squares += v * v;
    const double rstd = 1.0 / std::sqrt(squares / static_cast<double>(s.head_dim) + kEps);
    for (int64_t i = 0; i < s.head_dim; ++i) value[i] *= rstd * (head.norm->get(i) + head.norm_offset);
  };
  if (!head.rope.norm_after) normalise();
  const int64_t half = head.turns ? s.rotary_dim / 2 : 0;
  for (int64_t i = 0; i < half; ++i) {
    const double cos = rows.cos[head.rope_table].get(row * half + i);
    const double sin = rows.sin[head.rope_table].get(row * half + i);
    double& first = value[head.rope.interleaved ? 2 * i : i];
    double& second = value[head.rope.interleaved ? 2 * i + 1 : i + half];
    const double turned = first * cos - second * sin;
    second = second * cos + first * sin;
    first = turned;
  }
  if (head.rope.norm_after) normalise();
  return {value.begin(), value.end()};
}

void write(const std::vector<float>& head, std::vector<float>& to, int64_t at) {
  std::copy(head.begin(), head.end(), to.begin() + at);
}

void write(const Shape& s, const Rows& rows, int64_t row, int64_t head, const std::vector<float>& value, Cache& cache) {
  write(value, cache.expected,
        rows.sequence[row] * cache.strides.batch + head * cache.strides.head + rows.slot(s, row) * cache.strides.slot);
}

void expect(const Shape& s, const std::string& name, const Buffer& buffer, const std::vector<float>& expected) {
  checks::expect_close(name, buffer, expected, 1e-5f, checks::rounding(s.dtype) / 2 + 1e-5f);
}

struct Given {
  bool q = true, bias = true, q_norm = true, k_norm = true, row_scale = true, kv = true;
  int64_t rope_table = 0;
  float norm_offset = 0.0f;
  RopeForm rope = {};
  int64_t q_rope_table = rope_table;
};

void check_rope(const Shape& s, int64_t heads, const Given& given) {
  std::mt19937 random(static_cast<unsigned>(s.rows * 131 + s.head_dim));
  const Rows rows(s, random);
  const int64_t kv_dim = s.kv_heads * s.head_dim, q_dim = heads * s.head_dim;
  const int64_t q_stride = q_dim + s.q_pad, kv_stride = kv_dim + s.kv_pad;
  Buffer q = random_buffer(s, s.rows * q_stride, random);
  const Buffer q_before = q, k = random_buffer(s, s.rows * kv_stride, random);
  const Buffer v = random_buffer(s, s.rows * kv_stride, random), q_bias = random_buffer(s, q_dim, random);
  const Buffer k_bias = random_buffer(s, kv_dim, random), v_bias = random_buffer(s, kv_dim, random);
  const Buffer q_norm = random_buffer(s, s.head_dim, random), k_norm = random_buffer(s, s.head_dim, random);
  Buffer scale(DType::f32, s.rows);
  scale.fill_random(random);
  Cache key(s), value(s);
  std::vector<float> q_expected;
  for (int64_t i = 0; i < q.count(); ++i) q_expected.push_back(q.get(i));

  const auto if_given = [](bool yes, const Buffer& buffer) { return yes ? &buffer : nullptr; };
  const auto data = [](const Buffer* buffer) { return buffer == nullptr ? nullptr : buffer->data(); };
  for (int64_t i = 0; i < s.rows; ++i) {
    const int64_t row = s.first_row + i;
    for (int64_t h = 0; h < heads && given.q; ++h) {
      const int64_t at = i * q_stride + h * s.head_dim;
      write(reference(s, rows, row,
                      {q_before, at, if_given(given.bias, q_bias), h * s.head_dim, if_given(given.q_norm, q_norm), 1.0f,
                       true, given.q_rope_table, given.norm_offset, given.rope}),
            q_expected, at);
    }
    const float row_scale = given.row_scale ? scale.get(i) : 1.0f;
    for (int64_t h = 0; h < s.kv_heads && given.kv; ++h) {
      const int64_t at = i * kv_stride + h * s.head_dim;
      write(s, rows, row, h,
            reference(s, rows, row,
                      {k, at, if_given(given.bias, k_bias), h * s.head_dim, if_given(given.k_norm, k_norm), row_scale,
                       true, given.rope_table, given.norm_offset, given.rope}),
            key);
      write(s, rows, row, h,
            reference(s, rows, row, {v, at, if_given(given.bias, v_bias), h * s.head_dim, nullptr, row_scale, false}),
            value);
    }
  }
  cuda::launch_rope_cache_write({.dtype = s.dtype,
                                 .heads = heads,
                                 .kv_heads = s.kv_heads,
                                 .head_dim = s.head_dim,
                                 .rotary_dim = s.rotary_dim,
                                 .first_row = s.first_row,
                                 .rows = s.rows,
                                 .q = given.q ? q.data() : nullptr,
                                 .q_stride = q_stride,
                                 .k = given.kv ? k.data() : nullptr,
                                 .v = given.kv ? v.data() : nullptr,
                                 .kv_stride = kv_stride,
                                 .q_bias = data(if_given(given.bias, q_bias)),
                                 .k_bias = data(if_given(given.bias, k_bias)),
                                 .v_bias = data(if_given(given.bias, v_bias)),
                                 .q_norm = data(if_given(given.q_norm, q_norm)),
                                 .k_norm = data(if_given(given.k_norm, k_norm)),
                                 .norm_eps = kEps,
                                 .norm_offset = given.norm_offset,
                                 .rope_table = given.rope_table,
                                 .q_rope_table = given.q_rope_table,
                                 .rope = given.rope,
                                 .row_scale = given.row_scale ? static_cast<const float*>(scale.data()) : nullptr,
                                 .batch = &rows.batch,
                                 .cache = {key.buffer.data(), value.buffer.data(), key.strides, value.strides}},
                                nullptr);
  checks::finish();
  const std::string name = "rope_cache_write " + name_of(s) + " heads " + std::to_string(heads);
  expect(s, name + ": q", q, q_expected);
  expect(s, name + ": key", key.buffer, key.expected);
  expect(s, name + ": value", value.buffer, value.expected);
}

// Every second layer has no norm and no bias, since a run may mix layers. With `local_every`, every so many layers use
// RoPE table 0 and the others table 1, and norms have an offset.
void check_epilogue(const Shape& s, int64_t layers, bool vectors, bool with_rstd, int64_t local_every = 0,
                    RopeForm rope = {}) {
  std::mt19937 random(static_cast<unsigned>(s.rows * 131 + layers));
  const Rows rows(s, random);
  const int64_t kv_dim = s.kv_heads * s.head_dim, stride = layers * 2 * kv_dim + s.kv_pad;
  const Buffer kv = random_buffer(s, s.rows * stride, random);
  Buffer rstd(DType::f32, s.rows);
  rstd.fill_random(random);
  std::vector<Cache> keys(layers, Cache(s)), values(layers, Cache(s));
  std::vector<Buffer> k_bias, v_bias, k_norm;
  std::vector<const void*> k_bias_data, v_bias_data, k_norm_data;
  std::vector<LayerCache> caches;
  std::vector<int64_t> rope_table;
  const float norm_offset = local_every > 0 ? 1.0f : 0.0f;
  for (int64_t j = 0; j < layers; ++j) {
    rope_table.push_back(local_every > 0 && j % local_every != local_every - 1 ? 1 : 0);
    k_bias.push_back(random_buffer(s, kv_dim, random));
    v_bias.push_back(random_buffer(s, kv_dim, random));
    k_norm.push_back(random_buffer(s, s.head_dim, random));
    caches.push_back({keys[j].buffer.data(), values[j].buffer.data(), keys[j].strides, values[j].strides});
  }
  for (int64_t j = 0; j < layers; ++j) {
    k_bias_data.push_back(j % 2 == 0 ? k_bias[j].data() : nullptr);
    v_bias_data.push_back(j % 2 == 1 ? v_bias[j].data() : nullptr);
    k_norm_data.push_back(j % 2 == 0 ? k_norm[j].data() : nullptr);
    for (int64_t i = 0; i < s.rows; ++i) {
      const int64_t row = s.first_row + i;
      const float scale = with_rstd ? rstd.get(i) : 1.0f;
      for (int64_t h = 0; h < s.kv_heads; ++h) {
        const int64_t at = i * stride + j * 2 * kv_dim + h * s.head_dim;
        const bool even = vectors && j % 2 == 0, odd = vectors && j % 2 == 1;
        write(s, rows, row, h,
              reference(s, rows, row,
                        {kv, at, even ? &k_bias[j] : nullptr, h * s.head_dim, even ? &k_norm[j] : nullptr, scale, true,
                         rope_table[j], norm_offset, rope}),
              keys[j]);
        write(s, rows, row, h,
              reference(s, rows, row,
                        {kv, at + kv_dim, odd ? &v_bias[j] : nullptr, h * s.head_dim, nullptr, scale, false}),
              values[j]);
      }
    }
  }
  cuda::launch_kv_epilogue({.dtype = s.dtype,
                            .first_row = s.first_row,
                            .rows = s.rows,
                            .kv_heads = s.kv_heads,
                            .head_dim = s.head_dim,
                            .rotary_dim = s.rotary_dim,
                            .layers = layers,
                            .kv = kv.data(),
                            .kv_stride = stride,
                            .rstd = with_rstd ? static_cast<const float*>(rstd.data()) : nullptr,
                            .k_bias = vectors ? k_bias_data.data() : nullptr,
                            .v_bias = vectors ? v_bias_data.data() : nullptr,
                            .k_norm = vectors ? k_norm_data.data() : nullptr,
                            .eps = kEps,
                            .norm_offset = norm_offset,
                            .rope_table = local_every > 0 ? rope_table.data() : nullptr,
                            .rope = rope,
                            .batch = &rows.batch,
                            .caches = caches.data()},
                           nullptr);
  checks::finish();
  for (int64_t j = 0; j < layers; ++j) {
    const std::string name = "kv_epilogue " + name_of(s) + " layer " + std::to_string(j);
    expect(s, name + ": key", keys[j].buffer, keys[j].expected);
    expect(s, name + ": value", values[j].buffer, values[j].expected);
  }
}

// Cases with and without 16-byte accesses, because of shape, strides or bases.
std::vector<Shape> shapes(DType dtype) {
  return {
      {.dtype = dtype, .rows = 2, .kv_heads = 2, .head_dim = 64, .rotary_dim = 64},
      {.dtype = dtype, .rows = 5, .kv_heads = 1, .head_dim = 80, .rotary_dim = 80, .first_row = 3},
      {.dtype = dtype, .rows = 2, .kv_heads = 2, .head_dim = 128, .rotary_dim = 128, .slot_table = true},
      {.dtype = dtype, .rows = 2, .kv_heads = 2, .head_dim = 256, .rotary_dim = 256, .heads_inside = true},
      {.dtype = dtype,
       .rows = 3,
       .kv_heads = 2,
       .head_dim = 96,
       .rotary_dim = 48,
       .first_row = 1,
       .slot_table = true,
       .heads_inside = true,
       .q_pad = 8,
       .kv_pad = 16,
       .cache_pad = 8},
      {.dtype = dtype, .rows = 2, .kv_heads = 1, .head_dim = 8, .rotary_dim = 0},
      {.dtype = dtype,
       .rows = 2,
       .kv_heads = 3,
       .head_dim = 72,
       .rotary_dim = 16},  // an item with one range of channels
      {.dtype = dtype, .rows = 2, .kv_heads = 2, .head_dim = 64, .rotary_dim = 64, .offset = 1},
      {.dtype = dtype, .rows = 3, .kv_heads = 2, .head_dim = 64, .rotary_dim = 32, .first_row = 2, .q_pad = 3},
      {.dtype = dtype, .rows = 3, .kv_heads = 2, .head_dim = 64, .rotary_dim = 64, .kv_pad = 3},
      {.dtype = dtype, .rows = 3, .kv_heads = 2, .head_dim = 64, .rotary_dim = 64, .cache_pad = 3},
      {.dtype = dtype, .rows = 3, .kv_heads = 2, .head_dim = 19, .rotary_dim = 6, .heads_inside = true},
      {.dtype = dtype, .rows = 1, .kv_heads = 1, .head_dim = 1, .rotary_dim = 0},
      {.dtype = dtype, .rows = 2, .kv_heads = 1, .head_dim = 72, .rotary_dim = 36},
      {.dtype = dtype, .rows = 2, .kv_heads = 2, .head_dim = 129, .rotary_dim = 126, .slot_table = true},
  };
}

void rope() {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    checks::Turns turns(dtype);
    const auto run_rope = [&](const Shape& shape, int64_t heads, const Given& given) {
      if (turns.next()) check_rope(shape, heads, given);
    };
    for (const Shape& shape : shapes(dtype)) {
      run_rope(shape, 5, {});
      run_rope(shape, 2, {.bias = false, .q_norm = false, .k_norm = false, .row_scale = false});
    }
    const Shape one = {.dtype = dtype, .rows = 2, .kv_heads = 2, .head_dim = 64, .rotary_dim = 64, .first_row = 1};
    for (int given = 0; given < 64; given += checks::kRaces ? 21 : 1) {
      const auto bit = [&](int i) { return (given >> i & 1) != 0; };
      run_rope(one, 4, {bit(0), bit(1), bit(2), bit(3), bit(4), bit(5)});
    }
    for (const Shape& shape : shapes(dtype)) {
      run_rope(shape, 3, {.rope_table = 1, .norm_offset = 1.0f});
      run_rope(shape, 3, {.rope = {.interleaved = true}});
      run_rope(shape, 3, {.norm_offset = 1.0f, .rope = {.norm_after = true}});
      run_rope(shape, 3, {.rope = {.interleaved = true, .norm_after = true}, .q_rope_table = 1});
    }
    Shape none = one;
    none.rows = 0;
    run_rope(none, 4, {});
  }
  if (checks::kRaces) return;  // would take minutes on host threads
  // Enough rows to fill a device, so that a group processes several heads.
  check_rope({.dtype = DType::f32, .rows = 257, .kv_heads = 1, .head_dim = 40, .rotary_dim = 40}, 254, {.bias = false});
  check_rope({.dtype = DType::bf16, .rows = 131, .kv_heads = 2, .head_dim = 19, .rotary_dim = 6}, 254, {.bias = false});
}

void epilogue() {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    checks::Turns turns(dtype);
    const auto run_epilogue = [&](const Shape& shape, int64_t layers, bool vectors, bool with_rstd, int64_t local = 0,
                                  RopeForm rope = {}) {
      if (turns.next()) check_epilogue(shape, layers, vectors, with_rstd, local, rope);
    };
    for (const Shape& shape : shapes(dtype)) {
      run_epilogue(shape, 3, true, true);
      run_epilogue(shape, 3, true, true, 2, {.interleaved = true, .norm_after = true});
    }
    const Shape one = {.dtype = dtype, .rows = 3, .kv_heads = 2, .head_dim = 64, .rotary_dim = 64, .first_row = 1};
    for (const bool vectors : {false, true}) {
      for (const bool with_rstd : {false, true}) run_epilogue(one, 2, vectors, with_rstd);
    }
    run_epilogue(one, 1, true, true);
    Shape narrow = one;
    narrow.head_dim = narrow.rotary_dim = 16;
    run_epilogue(narrow, 32, true, true);
    run_epilogue(narrow, 67, true, true);  // three launches
    run_epilogue(narrow, 1, true, true, 2);
    run_epilogue(one, 7, true, true, 3);        // one launch for consecutive layers with the same table
    run_epilogue(narrow, 80, true, false, 36);  // more of them than fit in one launch
  }
}

const checks::Check rope_check("rope_cache_write", rope);
const checks::Check epilogue_check("kv_epilogue", epilogue);

}  // namespace
