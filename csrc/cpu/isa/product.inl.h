// The product behind lora_linear and its gradients; kernels.h says what it computes.
//
// A task owns a range of outputs (and of tokens, where there are too few outputs to go round). For each block of
// features it decodes its part of the weight once, into panels that stay in the L2 cache, and walks over all tokens
// with register tiles; the low-rank terms are features of the last block, or a block of their own. Where one tile holds
// all tokens a panel is used once, so it is made small enough for the L1 cache, and the activations are packed once.
// The output is written once, by the tiles of the last block where nothing else is to be done to it: lines of the
// output that another core wrote last come from there, which takes long. Sums of earlier blocks stay in scratch of the
// thread. Sums run in a fixed order that depends on the shapes alone, so results do not depend on the number of
// threads.
#pragma once

constexpr int64_t kFeatureBlock = 320;                // 320 x 32 floats: a panel of 40 KB
constexpr int64_t kPairFeatureBlock = 640;            // the same of bfloat16: sums are added to half as often
constexpr int64_t kMaskedFeatureBlock = 32 * kLanes;  // of a weight under a mask: as many bits as RowMasks holds
constexpr int64_t kMostJoinedRank = 64;               // of low-rank terms that take part in the last block of features
constexpr int64_t kPanelsPerTask = 16;       // 640 KB of panels; the smallest L2 cache among AVX-512 servers has 1 MB
constexpr int64_t kFewFeatureBlock = 128;    // one tile of tokens, weight reduced along columns: 16 KB, one panel
constexpr int64_t kFewRowBlock = 32;         // one tile of tokens, weight reduced along rows: 4 KB a panel, all panels,
                                             // so that a row is decoded in one sweep over its cache lines
constexpr int64_t kLongestPacked = 1 << 15;  // terms of one tile that are packed at once: 2 MB of scratch
constexpr int64_t kTokenBlock = 512;         // bounds the scratch for sums; the weight is decoded once per block
// A task packs its activations and decodes its part of the weight for itself, so it should be large in both. Where a
// narrow weight meets many tokens, splitting the tokens costs less: decoding is cheap beside 128 tokens of arithmetic,
// packing an activation is not beside 64 outputs.
constexpr int64_t kTokensPerTask = 128;

#ifdef PEFTKERN_VECTOR_DECODE
static_assert(2 * kPanelsPerTask <= kMostVectorsOfRow);
#endif

struct Schedule {
  Precision form;
  int tile_rows;
  int64_t width;           // of a panel
  bool join_low_rank;      // the low-rank terms are more features of the last block, in the form of the others
  int64_t low_rank_width;  // of a panel of low-rank terms that are a product of their own, in float32
  int64_t panels;
  int64_t output_tasks;
  int64_t token_tasks;
  int64_t panels_per_task;  // at most: tasks differ by one
  int64_t tokens_per_task;  // at most, likewise
  bool straight;            // the last tiles write the output itself
  bool one_tile;            // every token of the product fits into one tile, and every term into the scratch
};

static Precision available_form(const Product& p) {
#ifdef PEFTKERN_VECTOR_FORMS
  return p.precision;
#else
  (void)p;
  return Precision::float32;
#endif
}

static int64_t longest_reduction(const Product& p) {
  int64_t longest = product_features(p);
  for (int64_t i = 0; i < p.low_rank_count; ++i) longest = maximum(longest, p.low_rank[i].rank);
  return longest;
}

// Of one term among the features of the last block: pairs of terms stay together.
static int64_t joined_steps(const LowRank& term) { return divide_up(term.rank, 2) * 2; }

static int64_t joined_steps(const LowRank* terms, int64_t count) {
  int64_t steps = 0;
  for (int64_t i = 0; i < count; ++i) steps += joined_steps(terms[i]);
  return steps;
}

// A term under dropout is masked before it is added, and float16 would bring it to the scale of the weight.
static bool can_join(const Product& p, Precision form) {
  for (int64_t i = 0; i < p.low_rank_count; ++i)
    if (dropout_active(p.low_rank[i].dropout)) return false;
  const bool pairs_fit = form == Precision::float32 || product_features(p) % 2 == 0;
  return form != Precision::float16 && pairs_fit && joined_steps(p.low_rank, p.low_rank_count) <= kMostJoinedRank;
}

static int64_t greatest_common_divisor(int64_t a, int64_t b) { return b == 0 ? a : greatest_common_divisor(b, a % b); }

static Schedule make_schedule(const Product& p) {
  Schedule s;
  const int64_t outputs = product_outputs(p);
  s.form = available_form(p);
  s.tile_rows = kTileRows;
  s.width = outputs <= kLanes && s.form == Precision::float32 ? kLanes : 2 * kLanes;
  s.low_rank_width = s.width;
#ifdef PEFTKERN_VECTOR_FORMS
  if (s.form == Precision::float16) {
    s.tile_rows = kHalfTileRows;
    s.width = 2 * kHalfLanes;
  }
#endif
  s.panels = divide_up(outputs, s.width);
  const int64_t tasks = kTasksPerThread * p.threads;
  const int64_t most_panels = kPanelsPerTask * 2 * kLanes / s.width;
  const int64_t most_token_tasks = maximum(1, p.tokens / kTokensPerTask);
  s.output_tasks = maximum(divide_up(s.panels, most_panels), minimum(s.panels, divide_up(tasks, most_token_tasks)));
  s.token_tasks = minimum(most_token_tasks, divide_up(tasks, s.output_tasks));
  if (s.output_tasks * s.token_tasks < p.threads)
    s.token_tasks = maximum(1, minimum(divide_up(p.threads, s.output_tasks), p.tokens / s.tile_rows));
  // Nine equal tasks on two threads would leave one of them waiting for a tenth of the time.
  const int64_t token_step = p.threads / greatest_common_divisor(p.threads, s.output_tasks);
  const int64_t even_token_tasks = divide_up(s.token_tasks, token_step) * token_step;
  if (even_token_tasks <= most_token_tasks) s.token_tasks = even_token_tasks;
  s.panels_per_task = divide_up(s.panels, s.output_tasks);
  s.tokens_per_task = divide_up(p.tokens, s.token_tasks);
  s.one_tile = p.tokens <= s.tile_rows && longest_reduction(p) <= kLongestPacked;
  // float16 tiles store floats alone
  const bool own_dtype = s.form != Precision::float16 || p.out_dtype == DType::float32;
  s.straight = p.alpha == 1.0f && p.out_mask.bits == nullptr && product_features(p) > 0 && own_dtype;
  s.join_low_rank = !s.one_tile && can_join(p, s.form);
  return s;
}

// Tiles of nearly equal height: 16 tokens are 8 + 8, not 14 + 2.
static inline int tile_height(int64_t tokens, int tile_rows) {
  return static_cast<int>(divide_up(tokens, divide_up(tokens, tile_rows)));
}

static Tile find_tile(Precision form, int rows, int64_t width) {
#ifdef PEFTKERN_VECTOR_FORMS
  if (form == Precision::bfloat16) return TileTable<Bfloat16Step, 2, kTileRows>::get(rows);
  if (form == Precision::float16) return HalfTileTable<kHalfTileRows>::get(rows);
#else
  (void)form;
#endif
  if (width == kLanes) return TileTable<Float32Step, 1, kTileRows>::get(rows);
  return TileTable<Float32Step, 2, kTileRows>::get(rows);
}

// ---- memory of one task

struct Scratch {
  void* panels;
  float* panel_scales;  // float16 form
  float* staged;        // activations of one tile as floats, [row][feature]
  void* activations;    // the same in the order of the tile, [feature][row]; one block, or all where one_tile
  float* row_scales;    // float16 form: of the rows, for each block of features
  float* corner;        // a tile that does not fit into the output
  float* sums;          // of a block of outputs and tokens
};

static inline int64_t staged_stride() { return kPairFeatureBlock + kLanes; }

// Lays the parts out from `memory` on, and returns their size; with a null `memory` it only adds up.
static size_t carve(const Product& p, const Schedule& s, void* memory, Scratch* scratch) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  uintptr_t next = begin;
  const auto take = [&](int64_t bytes) {
    void* here = reinterpret_cast<void*>(next);
    next += static_cast<uintptr_t>(divide_up(bytes, 64) * 64);
    return here;
  };
  const int64_t rows = 16;
  const int64_t packed = s.one_tile ? longest_reduction(p) : kPairFeatureBlock;
  const int64_t tokens = minimum(s.tokens_per_task, kTokenBlock);
  scratch->panels = take(s.panels_per_task * s.width * (kFeatureBlock + kMostJoinedRank) * 4);
  scratch->panel_scales = static_cast<float*>(take(s.panels_per_task * 4));
  scratch->staged = static_cast<float*>(take(rows * staged_stride() * 4));
  scratch->activations = take((packed + kPairFeatureBlock) * rows * 4);
  scratch->row_scales = static_cast<float*>(take((packed / kFewRowBlock + 1) * rows * 4));
  scratch->corner = static_cast<float*>(take(rows * s.width * 4));
  scratch->sums = static_cast<float*>(take(tokens * s.panels_per_task * s.width * 4));
  return next - begin;
}

// ---- activations

static void stage_row(const Activations& a, int64_t token, int64_t k0, int64_t steps, float* staged) {
  const int64_t begin = token * a.token_stride + k0 * a.feature_stride;
  if (a.feature_stride == 1)
    read_floats(a.data, a.dtype, begin, steps, staged);
  else
    for (int64_t i = 0; i < steps; ++i) staged[i] = load_float(a.data, a.dtype, begin + i * a.feature_stride);
  if (dropout_active(a.dropout)) apply_dropout(staged, steps, a.dropout, token, k0);
}

#ifdef PEFTKERN_VECTOR_FORMS
// 2^n for a power of two that is clamped to what a float holds.
static float power_of_two(int32_t n) {
  const int32_t exponent = n < -126 ? -126 : n > 127 ? 127 : n;
  return bits_float(static_cast<uint32_t>(exponent + 127) << 23);
}

// A power of two that brings the largest finite magnitude to [2^(n-1), 2^n); 1 where all are zero or denormal.
static float half_scale(float largest, int32_t n) {
  const int32_t exponent = static_cast<int32_t>(float_bits(largest) >> 23);
  return exponent == 0 ? 1.0f : power_of_two(n - 1 - (exponent - 127));
}

static float larger_finite(float largest, float value) {
  const uint32_t magnitude = float_bits(value) & 0x7FFFFFFFu;
  return magnitude < 0x7F800000u && magnitude > float_bits(largest) ? bits_float(magnitude) : largest;
}

// Rows are brought below 512: 64 products with values below 1 then stay within float16, and small elements keep their
// precision.
static float half_row_scale(const float* row, int64_t steps) {
  float largest = 0.0f;
  for (int64_t i = 0; i < steps; ++i) largest = larger_finite(largest, row[i]);
  return half_scale(largest, 9);
}
#endif

// [rows][steps], rows `stride` apart, to [steps][rows], steps `out_stride` apart. Vector builds take at most kLanes
// rows, read whole vectors of a row and write whole ones of a step, and round the steps up to a vector.
#ifdef PEFTKERN_VECTOR_DECODE
static void turn_floats(const float* source, int64_t stride, int rows, int64_t steps, float* out, int64_t out_stride) {
  for (int64_t k = 0; k < steps; k += kLanes) {
    Int block[kLanes];
    for (int row = 0; row < kLanes; ++row) block[row] = load_int(source + (row < rows ? row : 0) * stride + k);
    transpose(block);
    for (int i = 0; i < kLanes; ++i) store_int(out + (k + i) * out_stride, block[i]);
  }
}
#else
static void turn_floats(const float* source, int64_t stride, int rows, int64_t steps, float* out, int64_t out_stride) {
  for (int64_t k = 0; k < steps; ++k)
    for (int row = 0; row < rows; ++row) out[k * out_stride + row] = source[row * stride + k];
}
#endif

// Rounds the steps up to a pair at least: joined terms stand at even steps, and what lies between them is multiplied
// with the zeros of a panel.
#ifdef PEFTKERN_VECTOR_DECODE
static void turn_activations(const float* source, int64_t stride, Precision form, int rows, int64_t steps,
                             void* packed) {
  if (rows == 1 && form == Precision::float32) {
    std::memcpy(packed, source, static_cast<size_t>(divide_up(steps, 2) * 2) * sizeof(float));
    return;
  }
  if (form == Precision::float32) return turn_floats(source, stride, rows, steps, static_cast<float*>(packed), rows);
#ifdef PEFTKERN_VECTOR_FORMS
  for (int64_t k = 0; k < steps; k += kLanes) {
    Int block[kLanes];
    for (int row = 0; row < kLanes; ++row) block[row] = load_int(source + (row < rows ? row : 0) * stride + k);
    transpose(block);
    if (form == Precision::bfloat16) {
      float* pairs = static_cast<float*>(packed) + k / 2 * rows;
      for (int i = 0; i < kLanes; i += 2)
        store_int(pairs + i / 2 * rows, pair_bfloat16(as_float(block[i]), as_float(block[i + 1])));
      continue;
    }
    uint16_t* halves = static_cast<uint16_t*>(packed) + k * rows;
    for (int i = 0; i < kLanes; ++i) store_halves(halves + i * rows, as_float(block[i]));
  }
#endif
}
#else
static void turn_activations(const float* source, int64_t stride, Precision, int rows, int64_t steps, void* packed) {
  turn_floats(source, stride, rows, divide_up(steps, 2) * 2, static_cast<float*>(packed), rows);
}
#endif

// Where the block of features that begins at k0 lies among the packed activations, and its row scales.
static inline void* packed_at(void* activations, Precision form, int rows, int64_t k0) {
  return static_cast<uint8_t*>(activations) + k0 * rows * (form == Precision::float32 ? 4 : 2);
}

// Packs `rows` tokens and `steps` features from k0 on.
static void pack_activations(const Activations& a, float* stage, Precision form, int64_t token, int rows, int64_t k0,
                             int64_t steps, void* packed, float* row_scales) {
  const bool unchanged = a.feature_stride == 1 && !dropout_active(a.dropout);
  const int64_t begin = token * a.token_stride + k0;
  if (unchanged && a.dtype == DType::float32 && form != Precision::float16 && steps % kLanes == 0)
    return turn_activations(static_cast<const float*>(a.data) + begin, a.token_stride, form, rows, steps, packed);
  // Two bfloat16 that lie side by side are a pair already, of the size of a float.
  const bool pairs = a.dtype == DType::bfloat16 && form == Precision::bfloat16;
  if (unchanged && pairs && steps % (2 * kLanes) == 0 && a.token_stride % 2 == 0 && begin % 2 == 0)
    return turn_activations(static_cast<const float*>(a.data) + begin / 2, a.token_stride / 2, Precision::float32, rows,
                            steps / 2, packed);
  for (int row = 0; row < rows; ++row) {
    float* staged = stage + row * staged_stride();
    stage_row(a, token + row, k0, steps, staged);
    std::memset(staged + steps, 0, kLanes * sizeof(float));
#ifdef PEFTKERN_VECTOR_FORMS
    if (form == Precision::float16) {
      const float scale = half_row_scale(staged, steps);
      for (int64_t i = 0; i < steps; ++i) staged[i] *= scale;
      row_scales[row] = 1.0f / scale;
    }
#else
    (void)row_scales;
#endif
  }
  turn_activations(stage, staged_stride(), form, rows, steps, packed);
}

static inline int64_t tile_steps(Precision form, int64_t steps) {
  return form == Precision::bfloat16 ? divide_up(steps, 2) : steps;
}

// ---- one block of features for all tokens of a task

struct Block {
  int64_t output0, outputs;  // of the task
  int64_t token0, tokens;    // of the token block
  float* sums;               // where element (token0, output0) is accumulated
  int64_t stride;
  const Product& product;
};

// What becomes of the products of one block of features.
struct Pass {
  bool first;  // nothing is to be added to them
  bool last;   // they go to the output itself
};

static void keep_outputs(const BitMask& mask, int64_t row, int64_t column, int64_t count, float* values) {
  int64_t i = 0;
#ifdef PEFTKERN_VECTOR_DECODE
  const uint8_t* bits = mask.bits + row * mask.row_stride + column / 8;  // tasks begin at whole panels
  for (; i + kLanes <= count; i += kLanes) store(values + i, keep_lanes(load(values + i), bits + i / 8));
#endif
  for (; i < count; ++i)
    if (!keeps(mask, row, column + i)) values[i] = 0.0f;
}

// Finishes `count` sums of one row, from `column` of the task on, and writes them out.
static void write_outputs(const Block& block, int64_t row, int64_t column, int64_t count, float* sums) {
  const Product& p = block.product;
  const int64_t token = block.token0 + row, output = block.output0 + column;
  if (p.alpha != 1.0f)
    for (int64_t i = 0; i < count; ++i) sums[i] *= p.alpha;
  if (p.bias != nullptr)
    for (int64_t i = 0; i < count; ++i) sums[i] += p.bias[output + i];
  if (p.out_mask.bits != nullptr) keep_outputs(p.out_mask, token, output, count, sums);
  write_floats(p.out, p.out_dtype, token * p.out_stride + output, count, sums);
}

static void add_corner(const float* corner, int64_t width, const Block& block, int64_t row0, int rows, int64_t column,
                       int64_t columns, Pass pass) {
  for (int row = 0; row < rows; ++row) {
    float* sums = block.sums + (row0 + row) * block.stride + column;
    const float* in = corner + row * width;
    for (int64_t i = 0; i < columns; ++i) sums[i] = pass.first ? in[i] : sums[i] + in[i];
    if (pass.last) write_outputs(block, row0 + row, column, columns, sums);
  }
}

// Sends the sums of a tile to their place.
static void aim(const Block& block, int64_t row0, int64_t column, Pass pass, TileArguments* tile) {
  const Product& p = block.product;
  float* sums = block.sums + row0 * block.stride + column;
  if (!pass.first) tile->before = sums;
  tile->before_stride = block.stride;
  tile->out = sums;
  tile->out_stride = block.stride;
  if (!pass.last) return;
  const int64_t output = block.output0 + column, element = (block.token0 + row0) * p.out_stride + output;
  if (p.bias != nullptr) tile->bias = p.bias + output;
  tile->out = static_cast<uint8_t*>(p.out) + element * (p.out_dtype == DType::float32 ? 4 : 2);
  tile->out_stride = p.out_stride;
  tile->out_dtype = p.out_dtype;
}

static inline void* panel_at(const Panels& panels, Precision form, int64_t panel, int64_t step = 0) {
  const int64_t elements = (panel * panels.allocated + step) * panels.width;
  const int64_t bytes = form == Precision::float32 ? 4 : 2;
  return static_cast<uint8_t*>(panels.data) + elements * bytes;
}

// One tile of packed tokens against every panel.
static void multiply_tile(const void* packed, const float* row_scales, const Panels& panels, Precision form,
                          int64_t row0, int rows, const Scratch& scratch, const Block& block, Pass pass,
                          const Dropout* mask) {
  const Tile tile = find_tile(form, rows, panels.width);
  TileArguments common;
  common.activations = packed;
  common.activation_step = rows;
  common.panel_step = panels.width;
  common.steps = tile_steps(form, panels.steps);
  common.row_scales = row_scales;
  common.out = scratch.corner;
  common.out_stride = panels.width;
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    TileArguments arguments = common;
    const int64_t column = panels.column + panel * panels.width;
    const int64_t columns = minimum(panels.width, block.outputs - column);
    const bool direct = columns == panels.width && mask == nullptr;
    arguments.panel = panel_at(panels, form, panel);
    arguments.panel_scale = form == Precision::float16 ? 1.0f / panels.scales[panel] : 1.0f;
    if (direct) aim(block, row0, column, pass, &arguments);
    tile(arguments);
    if (direct) continue;
    if (mask != nullptr)
      for (int row = 0; row < rows; ++row)
        apply_dropout(scratch.corner + row * panels.width, columns, *mask, block.token0 + row0 + row,
                      block.output0 + column);
    add_corner(scratch.corner, panels.width, block, row0, rows, column, columns, pass);
  }
}

#ifdef PEFTKERN_VECTOR_FORMS
// float16 form: brings the largest scale of a panel below 1. Outputs of one panel share it: those that are more than
// 2^14 times smaller than their largest neighbour lose precision.
static float half_panel_scale(const Weight& weight, bool transposed, int64_t output0, int64_t outputs, int64_t k0,
                              int64_t steps) {
  const int64_t row0 = transposed ? k0 : output0, rows = transposed ? steps : outputs;
  const int64_t column0 = transposed ? output0 : k0, columns = transposed ? outputs : steps;
  float largest = 0.0f;
  for (int64_t row = row0; row < row0 + rows; ++row) {
    int64_t fetched = -1;
    for (int64_t column = column0; column < column0 + columns; ++column) {
      if (!weight_quantized(weight)) {
        if (keeps(weight.mask, row, column)) largest = larger_finite(largest, weight_value(weight, row, column));
        continue;
      }
      const int64_t block = weight_block(weight, row, column);
      if (block == fetched) continue;
      fetched = block;
      largest =
          larger_finite(largest, weight_scale(weight, block) * (weight.encoding == Encoding::int8 ? 128.0f : 1.0f));
    }
  }
  return half_scale(largest, 0);
}
#endif

static void decode_form(const Weight& weight, bool transposed, int64_t output0, int64_t k0, Precision form,
                        const Panels& panels) {
#ifdef PEFTKERN_VECTOR_FORMS
  if (form == Precision::bfloat16) return decode_panels<Precision::bfloat16>(weight, transposed, output0, k0, panels);
  if (form == Precision::float16) return decode_panels<Precision::float16>(weight, transposed, output0, k0, panels);
#else
  (void)form;
#endif
  decode_panels<Precision::float32>(weight, transposed, output0, k0, panels);
}

// One operand pair: activations * weight, into the sums of a block.
struct Pair {
  const Activations& activations;
  const Weight& weight;
  const Dropout& weight_dropout;
  bool transposed;
  Precision form;
  int tile_rows;
  int64_t width;
  const Dropout* mask;
  const LowRank* joined;  // terms that are more features of the last block
  int64_t joined_count;
  bool first, last;  // of the pairs of a product; the last one writes the output, unless there is more to do to it
};

// The right factor of a term as the weight that it is.
static Weight right_factor(const LowRank& term, bool transposed, int64_t outputs) {
  Weight right;
  right.data = term.right;
  right.row_stride = term.right_stride;
  right.rows = transposed ? term.rank : outputs;
  right.columns = transposed ? outputs : term.rank;
  return right;
}

static Activations left_factor(const LowRank& term) {
  Activations left;
  left.data = term.left;
  left.token_stride = term.left_stride;
  return left;
}

static Panels decode_block(const Pair& pair, const Scratch& scratch, const Block& block, int64_t column,
                           int64_t columns, int64_t k0, int64_t steps, int64_t joined = 0) {
  Panels panels;
  panels.data = scratch.panels;
  panels.width = pair.width;
  panels.column = column;
  panels.count = divide_up(columns, pair.width);
  panels.steps = steps;
  panels.allocated = divide_up(steps + joined, 2) * 2;
  panels.scales = scratch.panel_scales;
#ifdef PEFTKERN_VECTOR_FORMS
  if (pair.form == Precision::float16)
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t first = panel * panels.width;
      scratch.panel_scales[panel] = half_panel_scale(pair.weight, pair.transposed, block.output0 + column + first,
                                                     minimum(panels.width, columns - first), k0, steps);
    }
#endif
  decode_form(pair.weight, pair.transposed, block.output0 + column, k0, pair.form, panels);
  if (dropout_active(pair.weight_dropout)) drop_panels(pair.weight_dropout, block.output0 + column, k0, panels);
  return panels;
}

// Decodes the joined terms behind the features of the last block.
static void join_panels(const Pair& pair, const Block& block, Panels& panels) {
  for (int64_t i = 0; i < pair.joined_count; ++i) {
    const LowRank& term = pair.joined[i];
    Panels behind = panels;
    behind.data = panel_at(panels, pair.form, 0, panels.steps);
    behind.steps = term.rank;
    decode_form(right_factor(term, pair.transposed, block.output0 + block.outputs), pair.transposed, block.output0, 0,
                pair.form, behind);
    panels.steps += joined_steps(term);
  }
}

static void join_activations(const Pair& pair, const Scratch& scratch, int64_t token, int rows, int64_t steps) {
  for (int64_t i = 0; i < pair.joined_count; ++i) {
    const LowRank& term = pair.joined[i];
    pack_activations(left_factor(term), scratch.staged, pair.form, token, rows, 0, term.rank,
                     packed_at(scratch.activations, pair.form, rows, steps), nullptr);
    steps += joined_steps(term);
  }
}

// Blocks of nearly equal length, so that the output is added to as seldom as can be. Vectors of any encoding fit in.
static int64_t block_length(int64_t features, const Pair& pair) {
  constexpr int64_t kStep = 32;
  int64_t most = pair.form == Precision::bfloat16 ? kPairFeatureBlock : kFeatureBlock;
  if (pair.weight.mask.bits != nullptr) most = minimum(most, kMaskedFeatureBlock);
  return divide_up(divide_up(features, divide_up(features, most)), kStep) * kStep;
}

static void accumulate_many_tokens(const Pair& pair, int64_t features, const Scratch& scratch, const Block& block) {
  const int height = tile_height(block.tokens, pair.tile_rows);
  const int64_t feature_block = block_length(features, pair);
  for (int64_t k0 = 0; k0 < features; k0 += feature_block) {
    const int64_t steps = minimum(feature_block, features - k0);
    const bool last = k0 + steps == features;
    Panels panels = decode_block(pair, scratch, block, 0, block.outputs, k0, steps,
                                 last ? joined_steps(pair.joined, pair.joined_count) : 0);
    if (last) join_panels(pair, block, panels);
    for (int64_t row0 = 0; row0 < block.tokens; row0 += height) {
      const int rows = static_cast<int>(minimum(height, block.tokens - row0));
      pack_activations(pair.activations, scratch.staged, pair.form, block.token0 + row0, rows, k0, steps,
                       scratch.activations, scratch.row_scales);
      if (last) join_activations(pair, scratch, block.token0 + row0, rows, steps);
      const Pass pass = {pair.first && k0 == 0, pair.last && last};
      multiply_tile(scratch.activations, scratch.row_scales, panels, pair.form, row0, rows, scratch, block, pass,
                    pair.mask);
    }
  }
}

static void accumulate_one_tile(const Pair& pair, int64_t features, const Scratch& scratch, const Block& block) {
  const int rows = static_cast<int>(block.tokens);
  const int64_t feature_block = pair.transposed ? kFewRowBlock : kFewFeatureBlock;
  const int64_t columns_at_once = pair.transposed ? block.outputs : pair.width;
  for (int64_t k0 = 0; k0 < features; k0 += feature_block)
    pack_activations(pair.activations, scratch.staged, pair.form, block.token0, rows, k0,
                     minimum(feature_block, features - k0), packed_at(scratch.activations, pair.form, rows, k0),
                     scratch.row_scales + k0 / feature_block * rows);
  for (int64_t column = 0; column < block.outputs; column += columns_at_once) {
    const int64_t columns = minimum(columns_at_once, block.outputs - column);
    for (int64_t k0 = 0; k0 < features; k0 += feature_block) {
      const int64_t steps = minimum(feature_block, features - k0);
      const Panels panels = decode_block(pair, scratch, block, column, columns, k0, steps);
      const Pass pass = {pair.first && k0 == 0, pair.last && k0 + steps == features};
      multiply_tile(packed_at(scratch.activations, pair.form, rows, k0), scratch.row_scales + k0 / feature_block * rows,
                    panels, pair.form, 0, rows, scratch, block, pass, pair.mask);
    }
  }
}

static void accumulate_pair(const Pair& pair, const Schedule& s, const Scratch& scratch, const Block& block) {
  const int64_t features = pair.transposed ? pair.weight.rows : pair.weight.columns;
  if (s.one_tile && block.tokens <= pair.tile_rows)
    accumulate_one_tile(pair, features, scratch, block);
  else
    accumulate_many_tokens(pair, features, scratch, block);
}

static void accumulate_low_rank(const LowRank& term, bool transposed, const Schedule& s, const Scratch& scratch,
                                const Block& block, bool first) {
  const Activations left = left_factor(term);
  const Weight right = right_factor(term, transposed, block.output0 + block.outputs);
  const Dropout none;
  const Dropout* mask = dropout_active(term.dropout) ? &term.dropout : nullptr;
  accumulate_pair(
      {left, right, none, transposed, Precision::float32, kTileRows, s.low_rank_width, mask, nullptr, 0, first, false},
      s, scratch, block);
}

static int64_t product_tasks(const Product& p) {
#ifdef PEFTKERN_VECTOR_FORMS
  if (const Narrow kind = narrow_kind(p); kind != Narrow::no) return narrow_tasks(p, kind);
#endif
  const Schedule s = make_schedule(p);
  return s.output_tasks * s.token_tasks;
}

static size_t product_scratch(const Product& p) {
#ifdef PEFTKERN_VECTOR_FORMS
  if (const Narrow kind = narrow_kind(p); kind != Narrow::no) return narrow_scratch(p, kind);
#endif
  Scratch unused;
  return carve(p, make_schedule(p), nullptr, &unused);
}

static void product_task(const Product& p, int64_t task, void* memory) {
#ifdef PEFTKERN_VECTOR_FORMS
  if (const Narrow kind = narrow_kind(p); kind != Narrow::no) return narrow_task(p, kind, task, memory);
#endif
  const Schedule s = make_schedule(p);
  Scratch scratch;
  carve(p, s, memory, &scratch);
  const int64_t output_task = task % s.output_tasks, token_task = task / s.output_tasks;
  const int64_t output_begin = output_task * s.panels / s.output_tasks * s.width;
  const int64_t output_end = minimum((output_task + 1) * s.panels / s.output_tasks * s.width, product_outputs(p));
  const int64_t token_begin = token_task * p.tokens / s.token_tasks;
  const int64_t token_end = (token_task + 1) * p.tokens / s.token_tasks;
  for (int64_t token0 = token_begin; token0 < token_end; token0 += kTokenBlock) {
    const int64_t tokens = minimum(kTokenBlock, token_end - token0);
    const int64_t outputs = output_end - output_begin;
    const Block block = {output_begin, outputs, token0, tokens, scratch.sums, s.panels_per_task * s.width, p};
    const int64_t apart = s.join_low_rank ? 0 : p.low_rank_count;
    for (int64_t i = 0; i < apart; ++i) accumulate_low_rank(p.low_rank[i], p.transposed, s, scratch, block, i == 0);
    accumulate_pair({p.activations, p.weight, p.weight_dropout, p.transposed, s.form, s.tile_rows, s.width, nullptr,
                     p.low_rank, p.low_rank_count - apart, apart == 0, s.straight},
                    s, scratch, block);
    if (s.straight) continue;
    for (int64_t row = 0; row < tokens; ++row) write_outputs(block, row, 0, outputs, block.sums + row * block.stride);
  }
}
