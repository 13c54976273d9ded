// Scaled dot-product attention and its gradients; peftkern/ops/attention.py has the formulas.
//
// Rows (kernels.h says how queries become rows) are the lanes of a panel: scores are [keys][rows of a panel], so that
// maxima, exponentials and sums run along vectors, and each product reads the scores as they lie. For a block of keys,
// which is read once for all panels of a group,
//   scores = keys * turned queries,   turned out += values * scores
// and back,
//   grad_scores = values * turned grads,   turned grad_query += keys * grad_scores,
//   grad_key += grad_scores * queries,     grad_value += scores * grads.
// Queries are scaled as they are read. Blocks of keys that no row of a panel sees are passed over.
#pragma once

constexpr int64_t kPanelRows = 2 * kLanes;
constexpr int64_t kGroupPanels = kAttentionRows / kPanelRows;
constexpr int64_t kKeyBlock = (64 + kTileRows - 1) / kTileRows * kTileRows;
constexpr int64_t kMaskStride = (kKeyBlock + kLanes - 1) / kLanes * kLanes;

// One of batch * kv_heads, and how its queries become rows.
struct AttentionHead {
  int64_t batch, kv_head, shared;  // `shared` heads of queries

  AttentionHead(const Attention& a, int64_t head)
      : batch(head / a.kv_heads), kv_head(head % a.kv_heads), shared(a.heads / a.kv_heads) {}
  int64_t query(int64_t row) const { return row / shared; }
  int64_t head(int64_t row) const { return kv_head * shared + row % shared; }
};

// Rows of one panel.
struct RowRange {
  int64_t first, count;
};

struct AttentionPanel {
  float* queries;         // [rows][width], scaled
  float* turned_queries;  // [head_dim][rows]
  float* grads;           // of the output, as queries
  float* turned_grads;
  float* turned_sums;  // of the output, or of grad_query: [head_dim][rows]
  bool has_sums;
  float* shift;  // [rows]: the maximum so far, or logsumexp
  float* total;  // [rows]: the sum of exponentials so far, or the product of output and grad
};

struct AttentionScratch {
  AttentionPanel panels[kGroupPanels];
  float* rows;  // [rows][width], of one panel
  float* keys;  // [keys][width]
  float* values;
  float* packed_keys;  // in the order of the tiles
  float* packed_values;
  float* scores;  // [keys][rows]
  float* grad_scores;
  float* mask;       // [keys][rows]
  float* mask_rows;  // [rows][keys]
};

// Lays the parts out from `memory` on, and returns their size; with a null `memory` it only adds up.
static size_t lay_out(const Attention& a, bool backward, void* memory, AttentionScratch* scratch) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  uintptr_t next = begin;
  const auto take = [&](int64_t floats) {
    float* here = reinterpret_cast<float*>(next);
    next += static_cast<uintptr_t>(divide_up(floats, 16) * 64);
    return here;
  };
  const int64_t width = attention_width(a), panel = kPanelRows * width, block = kKeyBlock * width;
  for (AttentionPanel& p : scratch->panels) {
    p.queries = take(backward ? panel : 0);
    p.turned_queries = take(panel);
    p.grads = take(backward ? panel : 0);
    p.turned_grads = take(backward ? panel : 0);
    p.turned_sums = take(panel);
    p.shift = take(kPanelRows);
    p.total = take(kPanelRows);
  }
  scratch->rows = take(panel);
  scratch->keys = take(block);
  scratch->values = take(block);
  scratch->packed_keys = take(block + kLanes);
  scratch->packed_values = take(backward ? block + kLanes : 0);
  scratch->scores = take(kKeyBlock * kPanelRows);
  scratch->grad_scores = take(backward ? kKeyBlock * kPanelRows : 0);
  scratch->mask = take(kMaskStride * kPanelRows);
  scratch->mask_rows = take(kMaskStride * kPanelRows);
  return next - begin;
}

static size_t attention_scratch(const Attention& a, bool backward) {
  AttentionScratch unused;
  return lay_out(a, backward, nullptr, &unused);
}

// ---- rows in, rows out

static int64_t row_offset(const AttentionTensor& t, const AttentionHead& head, int64_t row) {
  return head.batch * t.strides[0] + head.head(row) * t.strides[1] + head.query(row) * t.strides[2];
}

// Zeros where the panel has no row, and behind the numbers of each.
static void read_rows(const Attention& a, const AttentionTensor& t, const AttentionHead& head, const RowRange& rows,
                      float* out) {
  const int64_t width = attention_width(a);
  std::memset(out, 0, static_cast<size_t>(kPanelRows * width) * sizeof(float));
  for (int64_t i = 0; i < rows.count; ++i)
    read_floats(t.data, a.dtype, row_offset(t, head, rows.first + i), a.head_dim, out + i * width);
}

static void multiply_floats(float factor, int64_t count, float* values) {
  for (int64_t i = 0; i < count; ++i) values[i] *= factor;
}

static void turn_rows(const Attention& a, const float* rows, float* turned) {
  const int64_t width = attention_width(a);
  for (int64_t lane = 0; lane < kPanelRows; lane += kLanes)
    turn_floats(rows + lane * width, width, kLanes, a.head_dim, turned + lane, kPanelRows);
}

static void write_turned(const Attention& a, const AttentionTensor& t, const AttentionHead& head, const RowRange& rows,
                         const float* turned, float* buffer) {
  const int64_t width = attention_width(a);
  for (int64_t i = 0; i < a.head_dim; i += kLanes)
    turn_floats(turned + i * kPanelRows, kPanelRows, kLanes, kPanelRows, buffer + i, width);
  for (int64_t i = 0; i < rows.count; ++i)
    write_floats(t.data, a.dtype, row_offset(t, head, rows.first + i), a.head_dim, buffer + i * width);
}

static float* logsumexp_at(const Attention& a, const AttentionHead& head, int64_t row) {
  return a.logsumexp + (head.batch * a.heads + head.head(row)) * a.queries + head.query(row);
}

// ---- products

struct KeyBlock {
  int64_t first, count;
  int height;  // of the tiles that it is packed in
};

static void read_keys(const Attention& a, const AttentionTensor& t, const AttentionHead& head, const KeyBlock& block,
                      float* out) {
  const int64_t width = attention_width(a), base = head.batch * t.strides[0] + head.kv_head * t.strides[1];
  for (int64_t i = 0; i < block.count; ++i) {
    read_floats(t.data, a.dtype, base + (block.first + i) * t.strides[2], a.head_dim, out + i * width);
    std::memset(out + i * width + a.head_dim, 0, static_cast<size_t>(width - a.head_dim) * sizeof(float));
  }
}

static int block_rows(const KeyBlock& block, int64_t row0) {
  return static_cast<int>(minimum(block.height, block.count - row0));
}

static void pack_keys(const Attention& a, const KeyBlock& block, const float* keys, float* packed) {
  const int64_t width = attention_width(a);
  for (int64_t row0 = 0; row0 < block.count; row0 += block.height) {
    const int rows = block_rows(block, row0);
    turn_floats(keys + row0 * width, width, rows, a.head_dim, packed + row0 * width, rows);
  }
}

// out = packed keys * turned rows, for at least `keys` keys.
static void multiply_packed(const Attention& a, const KeyBlock& block, int64_t keys, const float* packed,
                            const float* turned, float* out) {
  TileArguments t;
  t.panel = turned;
  t.panel_step = t.out_stride = kPanelRows;
  t.steps = a.head_dim;
  t.accumulate = false;
  for (int64_t row0 = 0; row0 < keys; row0 += block.height) {
    const int rows = block_rows(block, row0);
    t.activations = packed + row0 * attention_width(a);
    t.activation_step = rows;
    t.out = out + row0 * kPanelRows;
    TileTable<Float32Step, 2, kTileRows>::get(rows)(t);
  }
}

// turned sums (+)= keys, turned, * scores
static void multiply_turned(const Attention& a, int64_t keys, const float* left, const float* scores, bool accumulate,
                            float* sums) {
  TileArguments t;
  t.panel = scores;
  t.activation_step = attention_width(a);
  t.panel_step = t.out_stride = kPanelRows;
  t.steps = keys;
  t.accumulate = accumulate;
  const int height = tile_height(a.head_dim, kTileRows);
  for (int64_t row0 = 0; row0 < a.head_dim; row0 += height) {
    t.activations = left + row0;
    t.out = sums + row0 * kPanelRows;
    TileTable<Float32Step, 2, kTileRows>::get(static_cast<int>(minimum(height, a.head_dim - row0)))(t);
  }
}

// sums += scores * rows
static void multiply_scores(const Attention& a, int64_t keys, const float* scores, int64_t rows, const float* right,
                            float* sums) {
  TileArguments t;
  t.activation_step = 1;
  t.panel_step = t.out_stride = attention_width(a);
  t.steps = rows;
  t.accumulate = true;
  const int height = tile_height(keys, kTileRows);
  for (int64_t row0 = 0; row0 < keys; row0 += height) {
    const int height_here = static_cast<int>(minimum(height, keys - row0));
    t.activations = scores + row0 * kPanelRows;
    for (int64_t column = 0; column < a.head_dim; column += 2 * kLanes) {
      t.panel = right + column;
      t.out = sums + row0 * t.out_stride + column;
      if (a.head_dim - column > kLanes)
        TileTable<Float32Step, 2, kTileRows, kPanelRows>::get(height_here)(t);
      else
        TileTable<Float32Step, 1, kTileRows, kPanelRows>::get(height_here)(t);
    }
  }
}

// ---- which key is seen

static void boolean_terms(const uint8_t* seen, int64_t stride, int64_t count, float* terms) {
  for (int64_t i = 0; i < count; ++i) terms[i] = seen[i * stride] != 0 ? 0.0f : -__builtin_inff();
}

static void mask_terms(const AttentionMask& m, int64_t base, int64_t count, float* terms) {
  if (m.boolean) return boolean_terms(static_cast<const uint8_t*>(m.data) + base, m.strides[3], count, terms);
  if (m.strides[3] == 1) return read_floats(m.data, m.dtype, base, count, terms);
  for (int64_t i = 0; i < count; ++i) terms[i] = load_float(m.data, m.dtype, base + i * m.strides[3]);
}

enum class Seen { nothing, everything, some };

static Seen what_is_seen(const float* terms, int64_t count) {
  int hidden = 0, plain = 0;
  for (int64_t i = 0; i < count; ++i) {
    hidden += terms[i] == -__builtin_inff();
    plain += terms[i] == 0.0f;
  }
  return hidden == count ? Seen::nothing : plain == count ? Seen::everything : Seen::some;
}

// The mask's terms for a panel and the first `keys` keys of a block, turned where they have to be added.
static Seen read_mask(const Attention& a, const AttentionHead& head, const RowRange& rows, int64_t first_key,
                      int64_t keys, const AttentionScratch& s) {
  const AttentionMask& m = a.mask;
  if (m.data == nullptr) return Seen::everything;
  Seen all = Seen::nothing;
  int64_t before = -1;
  for (int64_t i = 0; i < kPanelRows; ++i) {
    float* terms = s.mask_rows + i * kMaskStride;
    if (i >= rows.count) {
      std::memset(terms, 0, static_cast<size_t>(keys) * sizeof(float));
      continue;
    }
    const int64_t row = rows.first + i, base = head.batch * m.strides[0] + head.head(row) * m.strides[1] +
                                               head.query(row) * m.strides[2] + first_key * m.strides[3];
    if (base == before) {  // heads share a mask
      std::memcpy(terms, terms - kMaskStride, static_cast<size_t>(keys) * sizeof(float));
      continue;
    }
    before = base;
    mask_terms(m, base, keys, terms);
    const Seen here = what_is_seen(terms, keys);
    all = i == 0 || here == all ? here : Seen::some;
  }
  if (all == Seen::some)
    for (int64_t lane = 0; lane < kPanelRows; lane += kLanes)
      turn_floats(s.mask_rows + lane * kMaskStride, kMaskStride, kLanes, keys, s.mask + lane, kPanelRows);
  return all;
}

static void hide_later(const int32_t* places, int64_t first_key, int64_t keys, float* scores) {
  for (int64_t key = 0; key < keys; ++key) {
    const int32_t place = static_cast<int32_t>(first_key + key);
    for (int64_t j = 0; j < kPanelRows; ++j) {
      float& score = scores[key * kPanelRows + j];
      score = places[j] < place ? -__builtin_inff() : score;
    }
  }
}

// Minus infinity where a key is not seen, and the terms of the mask.
static void hide_keys(const Attention& a, const AttentionHead& head, const RowRange& rows, int64_t first_key,
                      int64_t keys, Seen seen, const AttentionScratch& s) {
  if (seen == Seen::some) add_floats(s.mask, keys * kPanelRows, s.scores);
  const int64_t begin = maximum(0, head.query(rows.first) + 1 - first_key);
  if (!a.causal || begin >= keys) return;
  int32_t places[kPanelRows];
  for (int64_t j = 0; j < kPanelRows; ++j) places[j] = static_cast<int32_t>(head.query(rows.first + j));
  hide_later(places, first_key + begin, keys - begin, s.scores + begin * kPanelRows);
}

// ---- blocks of keys

struct PanelBlock {
  int64_t keys;  // the first ones of the block, behind which the panel sees none
  Seen seen;
};

static PanelBlock scores_of(const Attention& a, const AttentionHead& head, const RowRange& rows, const KeyBlock& block,
                            const AttentionPanel& p, const AttentionScratch& s) {
  PanelBlock of = {block.count, Seen::nothing};
  if (a.causal) of.keys = minimum(of.keys, head.query(rows.first + rows.count - 1) + 1 - block.first);
  if (of.keys <= 0) return of;
  of.seen = read_mask(a, head, rows, block.first, of.keys, s);
  if (of.seen == Seen::nothing) return of;
  multiply_packed(a, block, of.keys, s.packed_keys, p.turned_queries, s.scores);
  hide_keys(a, head, rows, block.first, of.keys, of.seen, s);
  return of;
}

static RowRange panel_rows(const Attention& a, int64_t group, int64_t panel) {
  const int64_t first = group * kAttentionRows + panel * kPanelRows;
  return {first, minimum(kPanelRows, attention_rows(a) - first)};
}

static int64_t group_panels(const Attention& a, int64_t group) {
  return minimum(kGroupPanels, divide_up(attention_rows(a) - group * kAttentionRows, kPanelRows));
}

// Behind it no row of the group sees a key.
static int64_t group_keys(const Attention& a, const AttentionHead& head, int64_t group) {
  if (!a.causal) return a.keys;
  return minimum(a.keys, head.query(minimum((group + 1) * kAttentionRows, attention_rows(a)) - 1) + 1);
}

static KeyBlock key_block(int64_t first, int64_t end) {
  const int64_t count = minimum(kKeyBlock, end - first);
  return {first, count, tile_height(count, kTileRows)};
}

// ---- forward

static void column_maxima(const float* scores, int64_t keys, float* maxima) {
  for (int64_t lane = 0; lane < kPanelRows; lane += kLanes) {
    Float maximum = load(maxima + lane);
    for (int64_t key = 0; key < keys; ++key) maximum = larger(load(scores + key * kPanelRows + lane), maximum);
    store(maxima + lane, maximum);
  }
}

static void add_columns(const float* scores, int64_t keys, float* sums) {
  for (int64_t lane = 0; lane < kPanelRows; lane += kLanes) {
    Float sum = zero();
    for (int64_t key = 0; key < keys; ++key) sum = add(sum, load(scores + key * kPanelRows + lane));
    store(sums + lane, add(load(sums + lane), sum));
  }
}

static void exponentials(float* scores, const float* shift, int64_t keys) {
  for (int64_t key = 0; key < keys; ++key)
    for (int64_t j = 0; j < kPanelRows; ++j)
      scores[key * kPanelRows + j] = exp_of_negative(scores[key * kPanelRows + j] - shift[j]);
}

static void multiply_columns(const float* factors, int64_t steps, float* turned) {
  for (int64_t i = 0; i < steps; ++i)
    for (int64_t j = 0; j < kPanelRows; ++j) turned[i * kPanelRows + j] *= factors[j];
}

// The running softmax: what was summed with an earlier maximum is brought to the new one.
static void add_block(const Attention& a, const PanelBlock& of, AttentionPanel& p, const AttentionScratch& s) {
  alignas(64) float maxima[kPanelRows], shift[kPanelRows], factors[kPanelRows];
  std::memcpy(maxima, p.shift, sizeof maxima);
  column_maxima(s.scores, of.keys, maxima);
  bool changes = false;
  for (int64_t j = 0; j < kPanelRows; ++j) {
    shift[j] = maxima[j] == -__builtin_inff() ? 0.0f : maxima[j];
    factors[j] = exp_of_negative(p.shift[j] - shift[j]);
    changes |= factors[j] != 1.0f;
  }
  std::memcpy(p.shift, maxima, sizeof maxima);
  exponentials(s.scores, shift, of.keys);
  if (p.has_sums && changes) {
    multiply_columns(factors, 1, p.total);
    multiply_columns(factors, a.head_dim, p.turned_sums);
  }
  add_columns(s.scores, of.keys, p.total);
  multiply_turned(a, of.keys, s.values, s.scores, p.has_sums, p.turned_sums);
  p.has_sums = true;
}

// A row that sees no key becomes zeros, and its logsumexp minus infinity.
static void finish_rows(const Attention& a, const AttentionHead& head, const RowRange& rows, const AttentionPanel& p,
                        float* buffer) {
  if (!p.has_sums) std::memset(p.turned_sums, 0, static_cast<size_t>(a.head_dim * kPanelRows) * sizeof(float));
  alignas(64) float factors[kPanelRows];
  for (int64_t j = 0; j < kPanelRows; ++j) factors[j] = p.total[j] == 0.0f ? 0.0f : 1.0f / p.total[j];
  multiply_columns(factors, a.head_dim, p.turned_sums);
  write_turned(a, a.out, head, rows, p.turned_sums, buffer);
  for (int64_t j = 0; j < rows.count; ++j)
    *logsumexp_at(a, head, rows.first + j) = p.shift[j] + __builtin_logf(p.total[j]);
}

static void attention_group(const Attention& a, int64_t index, int64_t group, void* memory) {
  AttentionScratch s;
  lay_out(a, false, memory, &s);
  const AttentionHead head(a, index);
  const int64_t panels = group_panels(a, group), end = group_keys(a, head, group), width = attention_width(a);
  for (int64_t panel = 0; panel < panels; ++panel) {
    AttentionPanel& p = s.panels[panel];
    read_rows(a, a.query, head, panel_rows(a, group, panel), s.rows);
    multiply_floats(a.scale, kPanelRows * width, s.rows);
    turn_rows(a, s.rows, p.turned_queries);
    p.has_sums = false;
    for (int64_t j = 0; j < kPanelRows; ++j) {
      p.shift[j] = -__builtin_inff();
      p.total[j] = 0.0f;
    }
  }
  for (int64_t first = 0; first < end; first += kKeyBlock) {
    const KeyBlock block = key_block(first, end);
    read_keys(a, a.key, head, block, s.keys);
    pack_keys(a, block, s.keys, s.packed_keys);
    read_keys(a, a.value, head, block, s.values);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const PanelBlock of = scores_of(a, head, panel_rows(a, group, panel), block, s.panels[panel], s);
      if (of.seen != Seen::nothing) add_block(a, of, s.panels[panel], s);
    }
  }
  for (int64_t panel = 0; panel < panels; ++panel)
    finish_rows(a, head, panel_rows(a, group, panel), s.panels[panel], s.rows);
}

// ---- backward

// A row that sees no key, or that is none, has weights of zero: an infinite logsumexp.
static void read_panel(const Attention& a, const AttentionHead& head, const RowRange& rows, AttentionPanel& p,
                       float* buffer) {
  const int64_t width = attention_width(a);
  read_rows(a, a.query, head, rows, p.queries);
  multiply_floats(a.scale, kPanelRows * width, p.queries);
  turn_rows(a, p.queries, p.turned_queries);
  read_rows(a, a.grad_out, head, rows, p.grads);
  turn_rows(a, p.grads, p.turned_grads);
  read_rows(a, a.out, head, rows, buffer);
  p.has_sums = false;
  for (int64_t j = 0; j < kPanelRows; ++j) {
    p.total[j] = dot_floats(buffer + j * width, p.grads + j * width, width);
    p.shift[j] = j < rows.count ? *logsumexp_at(a, head, rows.first + j) : __builtin_inff();
    if (p.shift[j] == -__builtin_inff()) p.shift[j] = __builtin_inff();
  }
}

// scores become weights, and grad_scores, which are those of the weights, those of the scores.
static void softmax_gradient(float* __restrict scores, float* __restrict grad_scores, const float* __restrict shift,
                             const float* __restrict total, int64_t keys) {
  for (int64_t key = 0; key < keys; ++key)
    for (int64_t j = 0; j < kPanelRows; ++j) {
      const int64_t at = key * kPanelRows + j;
      const float weight = exp_of_negative(scores[at] - shift[j]);
      scores[at] = weight;
      grad_scores[at] = weight * (grad_scores[at] - total[j]);
    }
}

static void add_gradients(const Attention& a, const KeyBlock& block, const PanelBlock& of, AttentionPanel& p,
                          const AttentionScratch& s, float* key_sums, float* value_sums) {
  const int64_t offset = block.first * attention_width(a);
  multiply_packed(a, block, of.keys, s.packed_values, p.turned_grads, s.grad_scores);
  softmax_gradient(s.scores, s.grad_scores, p.shift, p.total, of.keys);
  if (a.grad_value.data != nullptr) multiply_scores(a, of.keys, s.scores, kPanelRows, p.grads, value_sums + offset);
  if (a.grad_key.data != nullptr) multiply_scores(a, of.keys, s.grad_scores, kPanelRows, p.queries, key_sums + offset);
  if (a.grad_query.data != nullptr) multiply_turned(a, of.keys, s.keys, s.grad_scores, p.has_sums, p.turned_sums);
  p.has_sums = true;
}

static void write_grad_query(const Attention& a, const AttentionHead& head, const RowRange& rows,
                             const AttentionPanel& p, float* buffer) {
  const int64_t count = a.head_dim * kPanelRows;
  if (!p.has_sums) std::memset(p.turned_sums, 0, static_cast<size_t>(count) * sizeof(float));
  multiply_floats(a.scale, count, p.turned_sums);
  write_turned(a, a.grad_query, head, rows, p.turned_sums, buffer);
}

static void attention_backward_part(const Attention& a, int64_t index, int64_t part, void* memory, float* sums) {
  AttentionScratch s;
  lay_out(a, true, memory, &s);
  const AttentionHead head(a, index);
  float *key_sums = sums, *value_sums = sums + attention_sums(a) / 2;
  std::memset(sums, 0, static_cast<size_t>(attention_sums(a)) * sizeof(float));
  for (int64_t group = part; group < attention_groups(a); group += attention_parts(a)) {
    const int64_t panels = group_panels(a, group), end = group_keys(a, head, group);
    for (int64_t panel = 0; panel < panels; ++panel)
      read_panel(a, head, panel_rows(a, group, panel), s.panels[panel], s.rows);
    for (int64_t first = 0; first < end; first += kKeyBlock) {
      const KeyBlock block = key_block(first, end);
      read_keys(a, a.key, head, block, s.keys);
      pack_keys(a, block, s.keys, s.packed_keys);
      read_keys(a, a.value, head, block, s.values);
      pack_keys(a, block, s.values, s.packed_values);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const PanelBlock of = scores_of(a, head, panel_rows(a, group, panel), block, s.panels[panel], s);
        if (of.seen != Seen::nothing) add_gradients(a, block, of, s.panels[panel], s, key_sums, value_sums);
      }
    }
    for (int64_t panel = 0; panel < panels && a.grad_query.data != nullptr; ++panel)
      write_grad_query(a, head, panel_rows(a, group, panel), s.panels[panel], s.rows);
  }
}

static void attention_gradients(const Attention& a, int64_t index, const float* sums) {
  alignas(64) float total[kAttentionHeadDim];
  const AttentionHead head(a, index);
  const int64_t width = attention_width(a), half = attention_sums(a) / 2;
  const AttentionTensor* const results[] = {&a.grad_key, &a.grad_value};
  for (int64_t i = 0; i < 2; ++i) {
    const AttentionTensor& t = *results[i];
    if (t.data == nullptr) continue;
    const int64_t base = head.batch * t.strides[0] + head.kv_head * t.strides[1];
    for (int64_t key = 0; key < a.keys; ++key) {
      const float* parts = sums + i * half + key * width;
      std::memcpy(total, parts, static_cast<size_t>(a.head_dim) * sizeof(float));
      for (int64_t part = 1; part < attention_parts(a); ++part)
        add_floats(parts + part * attention_sums(a), a.head_dim, total);
      write_floats(t.data, a.dtype, base + key * t.strides[2], a.head_dim, total);
    }
  }
}
