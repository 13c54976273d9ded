// Scaled dot-product attention and its gradients; peftkern/ops/attention.py has the formulas.
//
// Rows (kernels.h says how queries become rows) are the lanes of a panel: scores are [keys][rows of a panel], so that
// maxima, exponentials and sums run along vectors, and each product reads the scores as they lie. For a block of keys,
// which is read once for all panels of a group,
//   scores = keys * turned queries,   turned out += values * scores
// and back,
//   grad_scores = values * turned grads,   turned grad_query += keys * grad_scores,
//   grad_key += grad_scores * queries,     grad_value += scores * grads.
// Blocks of keys that no row of a panel sees are passed over.
//
// Of bfloat16, where the processor multiplies pairs of them, a matrix is made of words that each hold two terms of the
// sum that it is for: two numbers of one row, or numbers of two neighbouring rows. What is multiplied by scores is then
// multiplied by rounded ones; scores, their softmax and every sum are float32.
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
  float* queries;         // [rows][width]; of words of two rows, half as many
  float* turned_queries;  // [head_dim][rows]; of words, half as many
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
  float* raw;   // [keys or rows][width], as they are read
  float* keys;  // [keys][width]; of words of two rows, half as many
  float* values;
  float* packed_keys;  // in the order of the tiles
  float* packed_values;
  float* scores;  // [keys][rows]
  float* grad_scores;
  float* score_pairs;  // [keys / 2][rows]: words of two keys
  float* score_rows;   // [keys][rows / 2]: words of two rows
  float* mask;         // [keys][rows]
  float* mask_rows;    // [rows][keys]
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
  scratch->raw = take(maximum(panel, block));
  scratch->keys = take(block);
  scratch->values = take(block);
  scratch->packed_keys = take(block + kLanes);
  scratch->packed_values = take(backward ? block + kLanes : 0);
  scratch->scores = take(kKeyBlock * kPanelRows);
  scratch->grad_scores = take(backward ? kKeyBlock * kPanelRows : 0);
  scratch->score_pairs = take((kKeyBlock / 2 + 1) * kPanelRows);
  scratch->score_rows = take(kKeyBlock * kPanelRows / 2);
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

static void multiply_floats(float factor, int64_t count, float* values) {
  for (int64_t i = 0; i < count; ++i) values[i] *= factor;
}

static float dot_floats(const float* a, const float* b, int64_t count) {
  Float sums[4] = {zero(), zero(), zero(), zero()};
  int64_t j = 0;
  for (; j + 4 * kLanes <= count; j += 4 * kLanes)
    for (int k = 0; k < 4; ++k) sums[k] = fma(load(a + j + k * kLanes), load(b + j + k * kLanes), sums[k]);
  float sum = sum_of(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  for (; j < count; ++j) sum += a[j] * b[j];
  return sum;
}

// What the loop reads and writes never overlaps: the compiler vectorises it.
static void add_floats(const float* __restrict values, int64_t count, float* __restrict out) {
  for (int64_t j = 0; j < count; ++j) out[j] += values[j];
}

// ---- matrices in the form of their products

// Words of one number each.
struct Singles {
  static constexpr int64_t kTerms = 1;
  using Step = Float32Step;

  static void read(const Attention& a, const void* data, int64_t begin, float* out) {
    read_floats(data, a.dtype, begin, a.head_dim, out);
    std::memset(out + a.head_dim, 0, static_cast<size_t>(attention_width(a) - a.head_dim) * sizeof(float));
  }
  // Where rows are read that `step_by_rows` brings to `steps`, [rows][width], of which a row is a step of a sum.
  static float* raw_for(float*, float* steps) { return steps; }
  static void step_by_rows(const float*, int64_t, int64_t, float*) {}
  static const float* pair_columns(const AttentionScratch&, const float* scores, int64_t) { return scores; }
  static const float* narrow_rows(const AttentionScratch&, const float* scores, int64_t) { return scores; }
};

#ifdef __AVX512BF16__
// Words of two bfloat16 each.
struct Pairs {
  static constexpr int64_t kTerms = 2;
  using Step = Bfloat16Step;

  static void read(const Attention& a, const void* data, int64_t begin, float* out) {
    uint16_t* const halves = reinterpret_cast<uint16_t*>(out);
    std::memcpy(halves, static_cast<const uint16_t*>(data) + begin, static_cast<size_t>(a.head_dim) * 2);
    std::memset(halves + a.head_dim, 0, static_cast<size_t>(attention_width(a) - a.head_dim) * 2);
  }
  static float* raw_for(float* raw, float*) { return raw; }
  static void step_by_rows(const float* raw, int64_t rows, int64_t width, float* steps) {
    const uint16_t* const halves = reinterpret_cast<const uint16_t*>(raw);
    for (int64_t row = 0; row < rows; row += 2, steps += width)
      for (int64_t i = 0; i < width; i += kLanes) {
        const Int first = expand_words(halves + row * width + i);
        const Int second = row + 1 < rows ? expand_words(halves + (row + 1) * width + i) : int_zero();
        store_int(steps + i, _mm512_or_si512(first, shift_left<16>(second)));
      }
  }
  static const float* pair_columns(const AttentionScratch& s, const float* scores, int64_t keys) {
    for (int64_t key = 0; key < keys; key += 2)
      for (int64_t lane = 0; lane < kPanelRows; lane += kLanes) {
        const float* const first = scores + key * kPanelRows + lane;
        const Float second = key + 1 < keys ? load(first + kPanelRows) : zero();
        store_int(s.score_pairs + key / 2 * kPanelRows + lane, pair_bfloat16(load(first), second));
      }
    return s.score_pairs;
  }
  static const float* narrow_rows(const AttentionScratch& s, const float* scores, int64_t keys) {
    uint16_t* const halves = reinterpret_cast<uint16_t*>(s.score_rows);
    for (int64_t i = 0; i < keys * kPanelRows; i += kLanes) store_bfloat16(halves + i, load(scores + i));
    return s.score_rows;
  }
};
#endif

// Zeros where the panel has no row, and behind the numbers of each.
template <class Form>
static void read_rows(const Attention& a, const AttentionTensor& t, const AttentionHead& head, const RowRange& rows,
                      float* raw) {
  const int64_t words = attention_width(a) / Form::kTerms;
  for (int64_t i = 0; i < rows.count; ++i) Form::read(a, t.data, row_offset(t, head, rows.first + i), raw + i * words);
  std::memset(raw + rows.count * words, 0, static_cast<size_t>((kPanelRows - rows.count) * words) * sizeof(float));
}

template <class Form>
static void turn_rows(const Attention& a, const float* raw, float* turned) {
  const int64_t words = attention_width(a) / Form::kTerms;
  for (int64_t lane = 0; lane < kPanelRows; lane += kLanes)
    turn_floats(raw + lane * words, words, kLanes, divide_up(a.head_dim, Form::kTerms), turned + lane, kPanelRows);
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

template <class Form>
static void read_keys(const Attention& a, const AttentionTensor& t, const AttentionHead& head, const KeyBlock& block,
                      float* raw) {
  const int64_t base = head.batch * t.strides[0] + head.kv_head * t.strides[1];
  for (int64_t i = 0; i < block.count; ++i)
    Form::read(a, t.data, base + (block.first + i) * t.strides[2], raw + i * (attention_width(a) / Form::kTerms));
}

static int block_rows(const KeyBlock& block, int64_t row0) {
  return static_cast<int>(minimum(block.height, block.count - row0));
}

template <class Form>
static void pack_keys(const Attention& a, const KeyBlock& block, const float* raw, float* packed) {
  const int64_t words = attention_width(a) / Form::kTerms;
  for (int64_t row0 = 0; row0 < block.count; row0 += block.height) {
    const int rows = block_rows(block, row0);
    turn_floats(raw + row0 * words, words, rows, divide_up(a.head_dim, Form::kTerms), packed + row0 * words, rows);
  }
}

// out = packed keys * turned rows, for at least `keys` keys.
template <class Form>
static void multiply_packed(const Attention& a, const KeyBlock& block, int64_t keys, const float* packed,
                            const float* turned, float* out) {
  TileArguments t;
  t.panel = turned;
  t.panel_step = t.out_stride = kPanelRows;
  t.steps = divide_up(a.head_dim, Form::kTerms);
  for (int64_t row0 = 0; row0 < keys; row0 += block.height) {
    const int rows = block_rows(block, row0);
    t.activations = packed + row0 * (attention_width(a) / Form::kTerms);
    t.activation_step = rows;
    t.out = out + row0 * kPanelRows;
    TileTable<typename Form::Step, 2, kTileRows>::get(rows)(t);
  }
}

// turned sums (+)= keys, turned, * scores
template <class Form>
static void multiply_turned(const Attention& a, int64_t keys, const float* left, const float* scores, bool accumulate,
                            float* sums) {
  TileArguments t;
  t.panel = scores;
  t.activation_step = attention_width(a);
  t.panel_step = t.before_stride = t.out_stride = kPanelRows;
  t.steps = divide_up(keys, Form::kTerms);
  const int height = tile_height(a.head_dim, kTileRows);
  for (int64_t row0 = 0; row0 < a.head_dim; row0 += height) {
    t.activations = left + row0;
    t.out = sums + row0 * kPanelRows;
    t.before = accumulate ? sums + row0 * kPanelRows : nullptr;
    TileTable<typename Form::Step, 2, kTileRows>::get(static_cast<int>(minimum(height, a.head_dim - row0)))(t);
  }
}

// sums += scores * rows
template <class Form>
static void multiply_scores(const Attention& a, int64_t keys, const float* scores, const float* right, float* sums) {
  constexpr int kStride = kPanelRows / Form::kTerms;
  TileArguments t;
  t.activation_step = 1;
  t.panel_step = t.before_stride = t.out_stride = attention_width(a);
  t.steps = kStride;
  const int height = tile_height(keys, kTileRows);
  for (int64_t row0 = 0; row0 < keys; row0 += height) {
    const int rows = static_cast<int>(minimum(height, keys - row0));
    t.activations = scores + row0 * kStride;
    for (int64_t column = 0; column < a.head_dim; column += 2 * kLanes) {
      t.panel = right + column;
      t.before = sums + row0 * t.before_stride + column;
      t.out = sums + row0 * t.out_stride + column;
      if (a.head_dim - column > kLanes)
        TileTable<typename Form::Step, 2, kTileRows, kStride>::get(rows)(t);
      else
        TileTable<typename Form::Step, 1, kTileRows, kStride>::get(rows)(t);
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

template <class Form>
static PanelBlock scores_of(const Attention& a, const AttentionHead& head, const RowRange& rows, const KeyBlock& block,
                            const AttentionPanel& p, const AttentionScratch& s) {
  PanelBlock of = {block.count, Seen::nothing};
  if (a.causal) of.keys = minimum(of.keys, head.query(rows.first + rows.count - 1) + 1 - block.first);
  if (of.keys <= 0) return of;
  of.seen = read_mask(a, head, rows, block.first, of.keys, s);
  if (of.seen == Seen::nothing) return of;
  multiply_packed<Form>(a, block, of.keys, s.packed_keys, p.turned_queries, s.scores);
  multiply_floats(a.scale, of.keys * kPanelRows, s.scores);
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
template <class Form>
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
  multiply_turned<Form>(a, of.keys, s.values, Form::pair_columns(s, s.scores, of.keys), p.has_sums, p.turned_sums);
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

template <class Form>
static void attend_group(const Attention& a, const AttentionHead& head, int64_t group,
                         const AttentionScratch& scratch) {
  AttentionScratch s = scratch;
  const int64_t panels = group_panels(a, group), end = group_keys(a, head, group);
  for (int64_t panel = 0; panel < panels; ++panel) {
    AttentionPanel& p = s.panels[panel];
    read_rows<Form>(a, a.query, head, panel_rows(a, group, panel), s.raw);
    turn_rows<Form>(a, s.raw, p.turned_queries);
    p.has_sums = false;
    for (int64_t j = 0; j < kPanelRows; ++j) {
      p.shift[j] = -__builtin_inff();
      p.total[j] = 0.0f;
    }
  }
  for (int64_t first = 0; first < end; first += kKeyBlock) {
    const KeyBlock block = key_block(first, end);
    read_keys<Form>(a, a.key, head, block, s.raw);
    pack_keys<Form>(a, block, s.raw, s.packed_keys);
    float* const values = Form::raw_for(s.raw, s.values);
    read_keys<Form>(a, a.value, head, block, values);
    Form::step_by_rows(values, block.count, attention_width(a), s.values);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const PanelBlock of = scores_of<Form>(a, head, panel_rows(a, group, panel), block, s.panels[panel], s);
      if (of.seen != Seen::nothing) add_block<Form>(a, of, s.panels[panel], s);
    }
  }
  for (int64_t panel = 0; panel < panels; ++panel)
    finish_rows(a, head, panel_rows(a, group, panel), s.panels[panel], s.rows);
}

static void attention_group(const Attention& a, int64_t index, int64_t group, void* memory) {
  AttentionScratch s;
  lay_out(a, false, memory, &s);
#ifdef __AVX512BF16__
  if (a.dtype == DType::bfloat16) return attend_group<Pairs>(a, AttentionHead(a, index), group, s);
#endif
  attend_group<Singles>(a, AttentionHead(a, index), group, s);
}

// ---- backward

static float output_times_grad(const Attention& a, const AttentionHead& head, int64_t row) {
  alignas(64) float outs[kAttentionHeadDim], grads[kAttentionHeadDim];
  const float* out = floats_of(a.out.data, a.dtype, row_offset(a.out, head, row), a.head_dim, outs);
  const float* grad = floats_of(a.grad_out.data, a.dtype, row_offset(a.grad_out, head, row), a.head_dim, grads);
  return dot_floats(out, grad, a.head_dim);
}

template <class Form>
static void read_twice(const Attention& a, const AttentionTensor& t, const AttentionHead& head, const RowRange& rows,
                       float* raw, float* steps, float* turned) {
  raw = Form::raw_for(raw, steps);
  read_rows<Form>(a, t, head, rows, raw);
  Form::step_by_rows(raw, kPanelRows, attention_width(a), steps);
  turn_rows<Form>(a, raw, turned);
}

// A row that sees no key, or that is none, has weights of zero: an infinite logsumexp.
template <class Form>
static void read_panel(const Attention& a, const AttentionHead& head, const RowRange& rows, AttentionPanel& p,
                       float* raw) {
  read_twice<Form>(a, a.query, head, rows, raw, p.queries, p.turned_queries);
  read_twice<Form>(a, a.grad_out, head, rows, raw, p.grads, p.turned_grads);
  p.has_sums = false;
  for (int64_t j = 0; j < kPanelRows; ++j) {
    p.total[j] = j < rows.count ? output_times_grad(a, head, rows.first + j) : 0.0f;
    p.shift[j] = j < rows.count ? *logsumexp_at(a, head, rows.first + j) : __builtin_inff();
    if (p.shift[j] == -__builtin_inff()) p.shift[j] = __builtin_inff();
  }
}

// scores become weights; grad_scores, which are those of the weights, become those of the products of queries and keys.
static void softmax_gradient(float* __restrict scores, float* __restrict grad_scores, const float* __restrict shift,
                             const float* __restrict total, float scale, int64_t keys) {
  for (int64_t key = 0; key < keys; ++key)
    for (int64_t j = 0; j < kPanelRows; ++j) {
      const int64_t at = key * kPanelRows + j;
      const float weight = exp_of_negative(scores[at] - shift[j]);
      scores[at] = weight;
      grad_scores[at] = scale * weight * (grad_scores[at] - total[j]);
    }
}

template <class Form>
static void add_gradients(const Attention& a, const KeyBlock& block, const PanelBlock& of, AttentionPanel& p,
                          const AttentionScratch& s, float* sums) {
  float* const key_sums = sums + block.first * attention_width(a);
  float* const value_sums = key_sums + attention_sums(a) / 2;
  multiply_packed<Form>(a, block, of.keys, s.packed_values, p.turned_grads, s.grad_scores);
  softmax_gradient(s.scores, s.grad_scores, p.shift, p.total, a.scale, of.keys);
  if (a.grad_value.data != nullptr)
    multiply_scores<Form>(a, of.keys, Form::narrow_rows(s, s.scores, of.keys), p.grads, value_sums);
  if (a.grad_key.data != nullptr)
    multiply_scores<Form>(a, of.keys, Form::narrow_rows(s, s.grad_scores, of.keys), p.queries, key_sums);
  if (a.grad_query.data != nullptr)
    multiply_turned<Form>(a, of.keys, s.keys, Form::pair_columns(s, s.grad_scores, of.keys), p.has_sums, p.turned_sums);
  p.has_sums = true;
}

template <class Form>
static void add_group(const Attention& a, const AttentionHead& head, int64_t group, const AttentionScratch& scratch,
                      float* sums) {
  AttentionScratch s = scratch;
  const int64_t panels = group_panels(a, group), end = group_keys(a, head, group);
  for (int64_t panel = 0; panel < panels; ++panel)
    read_panel<Form>(a, head, panel_rows(a, group, panel), s.panels[panel], s.raw);
  for (int64_t first = 0; first < end; first += kKeyBlock) {
    const KeyBlock block = key_block(first, end);
    float* const keys = Form::raw_for(s.raw, s.keys);
    read_keys<Form>(a, a.key, head, block, keys);
    Form::step_by_rows(keys, block.count, attention_width(a), s.keys);
    pack_keys<Form>(a, block, keys, s.packed_keys);
    read_keys<Form>(a, a.value, head, block, s.raw);
    pack_keys<Form>(a, block, s.raw, s.packed_values);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const PanelBlock of = scores_of<Form>(a, head, panel_rows(a, group, panel), block, s.panels[panel], s);
      if (of.seen != Seen::nothing) add_gradients<Form>(a, block, of, s.panels[panel], s, sums);
    }
  }
  for (int64_t panel = 0; panel < panels && a.grad_query.data != nullptr; ++panel) {
    const AttentionPanel& p = s.panels[panel];
    if (!p.has_sums) std::memset(p.turned_sums, 0, static_cast<size_t>(a.head_dim * kPanelRows) * sizeof(float));
    write_turned(a, a.grad_query, head, panel_rows(a, group, panel), p.turned_sums, s.rows);
  }
}

static void attention_backward_part(const Attention& a, int64_t index, int64_t part, void* memory, float* sums) {
  AttentionScratch s;
  lay_out(a, true, memory, &s);
  const AttentionHead head(a, index);
  std::memset(sums, 0, static_cast<size_t>(attention_sums(a)) * sizeof(float));
  for (int64_t group = part; group < attention_groups(a); group += attention_parts(a)) {
#ifdef __AVX512BF16__
    if (a.dtype == DType::bfloat16) {
      add_group<Pairs>(a, head, group, s, sums);
      continue;
    }
#endif
    add_group<Singles>(a, head, group, s, sums);
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
