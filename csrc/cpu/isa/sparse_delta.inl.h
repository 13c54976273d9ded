// A sparse matrix times activations, and the gradient of its entries; kernels.h, struct SparseProduct, says what.
//
// Tokens are taken in blocks. The source is turned into a panel [features][tokens of the block], so that an entry is
// one multiplication over contiguous tokens, its value being the same for all. The gradient of an entry is the dot
// product of its row of the panel with the pair's feature, which is turned on the way: the panel is read once for both.
#pragma once

// ---- how the tokens of a block lie in registers

// A block of whole vectors.
template <int kWidth>
struct BlockVectors {
  using Vector = Float;
  static constexpr int kElements = kLanes;
  static constexpr int kCount = kWidth / kLanes;
  static inline Vector zeros() { return zero(); }
  static inline Vector read(const float* p) { return load(p); }
  static inline void write(float* p, Vector v) { store(p, v); }
  static inline Vector spread(float v) { return broadcast(v); }
  static inline Vector product(Vector a, Vector b) { return mul(a, b); }
  static inline Vector add_product(Vector a, Vector b, Vector sum) { return fma(a, b, sum); }
};

// Few tokens, less than a vector of this instruction set.
template <int kWidth>
struct ShortVector {
  typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));
  static constexpr int kElements = kWidth;
  static constexpr int kCount = 1;
  static inline Vector zeros() { return Vector{}; }
  static inline Vector read(const float* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static inline void write(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }
  static inline Vector spread(float v) { return Vector{} + v; }
  static inline Vector product(Vector a, Vector b) { return a * b; }
  static inline Vector add_product(Vector a, Vector b, Vector sum) { return a * b + sum; }
};

// ---- between activations, [tokens, features], and panels

static inline void transpose_floats(Float r[kLanes]) {
#ifdef PEFTKERN_VECTOR_DECODE
  Int bits[kLanes];
  for (int i = 0; i < kLanes; ++i) bits[i] = as_int(r[i]);
  transpose(bits);
  for (int i = 0; i < kLanes; ++i) r[i] = as_float(bits[i]);
#else
  float values[kLanes * kLanes], turned[kLanes * kLanes];
  for (int i = 0; i < kLanes; ++i) store(values + i * kLanes, r[i]);
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) turned[i * kLanes + j] = values[j * kLanes + i];
  for (int i = 0; i < kLanes; ++i) r[i] = load(turned + i * kLanes);
#endif
}

template <DType kType>
static inline Float read_lanes(const void* data, int64_t index, int64_t count) {
  if (count == kLanes) return load_elements<kType>(data, index);
  alignas(64) float values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = load_float(data, kType, index + i);
  return load(values);
}

template <DType kType>
static inline void write_lanes(void* data, int64_t index, int64_t count, Float v) {
  if (count == kLanes) return store_elements<kType>(data, index, v);
  alignas(64) float values[kLanes];
  store(values, v);
  for (int64_t i = 0; i < count; ++i) store_float(data, kType, index + i, values[i]);
}

constexpr int64_t kRowPrefetchBytes = 256;

// Some tokens and at most kLanes features of activations.
struct TokenTile {
  TokenRows rows;
  int64_t token;
  int64_t tokens;
  int64_t feature;
  int64_t features;

  int64_t index(int64_t row) const { return (token + row) * rows.token_stride + feature; }

  // What the next tiles of the row will take: the processor does not foresee so many rows at once.
  void prefetch(int64_t row) const {
    const int64_t bytes = rows.dtype == DType::float32 ? 4 : 2;
    __builtin_prefetch(static_cast<const char*>(rows.data) + index(row) * bytes + kRowPrefetchBytes);
  }
};

// kLanes tokens from `first` on to [features][width]; those that are not there are zeros.
template <DType kType>
static void turn_tile(const TokenTile& tile, int64_t first, int64_t width, float* out) {
  Float r[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    r[lane] = zero();
    if (first + lane >= tile.tokens) continue;
    tile.prefetch(first + lane);
    r[lane] = read_lanes<kType>(tile.rows.data, tile.index(first + lane), tile.features);
  }
  transpose_floats(r);
  if (width >= kLanes) {
    for (int64_t i = 0; i < tile.features; ++i) store(out + i * width + first, r[i]);
    return;
  }
  alignas(64) float values[kLanes];
  for (int64_t i = 0; i < tile.features; ++i) {
    store(values, r[i]);
    std::memcpy(out + i * width, values, static_cast<size_t>(width) * sizeof(float));
  }
}

static void turn_tile(const TokenTile& tile, int64_t first, int64_t width, float* out) {
  if (tile.rows.dtype == DType::float32) return turn_tile<DType::float32>(tile, first, width, out);
  if (tile.rows.dtype == DType::bfloat16) return turn_tile<DType::bfloat16>(tile, first, width, out);
  return turn_tile<DType::float16>(tile, first, width, out);
}

// tile += scaling * sums for kLanes tokens from `first` on; sums is [kLanes][width] with kLanes floats behind.
template <DType kType>
static void add_turned(const TokenTile& tile, int64_t first, int64_t width, float scaling, const float* sums) {
  const Float factor = broadcast(scaling);
  Float r[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) r[i] = load(sums + i * width + first);
  transpose_floats(r);
  const int64_t lanes = minimum(kLanes, tile.tokens - first);
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int64_t index = tile.index(first + lane);
    tile.prefetch(first + lane);
    const Float before = read_lanes<kType>(tile.rows.data, index, tile.features);
    write_lanes<kType>(tile.rows.data, index, tile.features, fma(factor, r[lane], before));
  }
}

static void add_turned(const TokenTile& tile, int64_t first, int64_t width, float scaling, const float* sums) {
  if (tile.rows.dtype == DType::float32) return add_turned<DType::float32>(tile, first, width, scaling, sums);
  if (tile.rows.dtype == DType::bfloat16) return add_turned<DType::bfloat16>(tile, first, width, scaling, sums);
  return add_turned<DType::float16>(tile, first, width, scaling, sums);
}

static TokenTile token_tile(const SparseProduct& p, const TokenRows& rows, int64_t features, int64_t block,
                            int64_t feature) {
  const int64_t width = sparse_block_tokens(p), token = block * width;
  return {rows, token, minimum(width, p.tokens - token), feature, minimum(kLanes, features - feature)};
}

// ---- panels

// A vector of tokens at a time: more rows at once are more than the processor reads ahead.
static void fill_panel(const SparseProduct& p, int64_t block, float* panel) {
  const int64_t width = sparse_block_tokens(p);
  for (int64_t first = 0; first < width; first += kLanes)
    for (int64_t feature = 0; feature < p.source_features; feature += kLanes) {
      const TokenTile tile = token_tile(p, p.source, p.source_features, block, feature);
      if (p.source_offsets[feature] == p.source_offsets[feature + tile.features]) continue;  // nobody reads it
      turn_tile(tile, first, width, panel + feature * width);
    }
}

// ---- products

// Products of entries, each a vector over tokens, that wait to be summed.
template <class Block>
struct EntrySums {
  static constexpr int64_t kRoom = 64;
  float* place;
  bool accumulate;
  int64_t count = 0;
  alignas(64) float products[kRoom * Block::kElements];

  EntrySums(float* place_, bool accumulate_) : place(place_), accumulate(accumulate_) {}

  void finish() {
    alignas(64) float sums[kRoom];
    if constexpr (Block::kElements == kLanes) {
      for (int64_t e = 0; e < count; e += kLanes) {
        Float r[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) r[i] = load(products + (e + i) * kLanes);
        store(sums + e, sum_lanes(r));
      }
    } else {
      for (int64_t e = 0; e < count; ++e) {
        const float* product = products + e * Block::kElements;
        sums[e] = product[0];
        for (int i = 1; i < Block::kElements; ++i) sums[e] += product[i];
      }
    }
    for (int64_t e = 0; e < count; ++e) place[e] = accumulate ? place[e] + sums[e] : sums[e];
    place += count;
    count = 0;
  }
};

// The entries of one feature of the target.
struct EntryRange {
  int64_t count;
  const int32_t* others;
  const float* values;
};

// sums: of the feature, [width], written where kTarget; pair: of the feature, [width], read where kPair.
template <class Block, bool kTarget, bool kPair>
static inline void sparse_feature(const EntryRange& entries, const float* panel, float* sums, const float* pair,
                                  EntrySums<Block>& entry_sums) {
  using Vector = typename Block::Vector;
  Vector totals[Block::kCount], pairs[Block::kCount];
#pragma GCC unroll 16
  for (int v = 0; v < Block::kCount; ++v) {
    totals[v] = Block::zeros();
    pairs[v] = kPair ? Block::read(pair + v * Block::kElements) : Block::zeros();
  }
  for (int64_t begin = 0; begin < entries.count;) {
    const int64_t room = kPair ? EntrySums<Block>::kRoom - entry_sums.count : entries.count;
    const int64_t end = minimum(entries.count, begin + room);
    float* products = entry_sums.products + (entry_sums.count - begin) * Block::kElements;
    for (int64_t e = begin; e < end; ++e) {
      const float* source = panel + int64_t{entries.others[e]} * (Block::kCount * Block::kElements);
      const Vector value = Block::spread(kTarget ? entries.values[e] : 0.0f);
      Vector product = Block::zeros();
#pragma GCC unroll 16
      for (int v = 0; v < Block::kCount; ++v) {
        const Vector tokens = Block::read(source + v * Block::kElements);
        if constexpr (kTarget) totals[v] = Block::add_product(value, tokens, totals[v]);
        if constexpr (kPair)
          product = v == 0 ? Block::product(pairs[v], tokens) : Block::add_product(pairs[v], tokens, product);
      }
      if constexpr (kPair) Block::write(products + e * Block::kElements, product);
    }
    if constexpr (kPair) {
      entry_sums.count += end - begin;
      if (entry_sums.count == EntrySums<Block>::kRoom) entry_sums.finish();
    }
    begin = end;
  }
  if constexpr (kTarget) {
#pragma GCC unroll 16
    for (int v = 0; v < Block::kCount; ++v) Block::write(sums + v * Block::kElements, totals[v]);
  }
}

// Features [begin, end) of the target, in one block of tokens, which is the group's first where not `accumulate`.
struct SparseTask {
  int64_t block;
  int64_t begin;
  int64_t end;
  bool accumulate;
};

// Features that are turned together, so that rows are read in longer pieces.
constexpr int64_t kGroupFeatures = 4 * kLanes;

template <class Block, bool kTarget, bool kPair>
static void sparse_block(const SparseProduct& p, const SparseScratch& scratch, const SparseTask& task) {
  constexpr int64_t kWidth = Block::kCount * Block::kElements;
  alignas(64) float sums[kGroupFeatures * kWidth + kLanes] = {}, pair[kGroupFeatures * kWidth];
  const int64_t first_entry = p.offsets[task.begin];
  EntrySums<Block> entry_sums(kPair ? scratch.sums + first_entry : nullptr, task.accumulate);
  const float* values = p.order == nullptr ? p.values + first_entry : scratch.values;
  for (int64_t feature = task.begin; feature < task.end; feature += kGroupFeatures) {
    const int64_t features = minimum(kGroupFeatures, task.end - feature);
    if (p.offsets[feature] == p.offsets[feature + features]) continue;
    if (kPair)
      for (int64_t first = 0; first < kWidth; first += kLanes)
        for (int64_t i = 0; i < features; i += kLanes)
          turn_tile(token_tile(p, p.pair, p.features, task.block, feature + i), first, kWidth, pair + i * kWidth);
    for (int64_t i = 0; i < features; ++i) {
      const int64_t entry = p.offsets[feature + i], count = p.offsets[feature + i + 1] - entry;
      const EntryRange entries = {count, p.others + entry, values + (entry - first_entry)};
      sparse_feature<Block, kTarget, kPair>(entries, scratch.panel, sums + i * kWidth, pair + i * kWidth, entry_sums);
    }
    if (kTarget)
      for (int64_t first = 0; first < minimum(kWidth, p.tokens - task.block * kWidth); first += kLanes)
        for (int64_t i = 0; i < features; i += kLanes)
          add_turned(token_tile(p, p.target, p.features, task.block, feature + i), first, kWidth, p.scaling,
                     sums + i * kWidth);
  }
  if (kPair) entry_sums.finish();
}

template <int kWidth>
static void sparse_block_of(const SparseProduct& p, const SparseScratch& scratch, const SparseTask& task) {
  using Block = std::conditional_t<(kWidth < kLanes), ShortVector<kWidth>, BlockVectors<kWidth>>;
  if (p.gradients == nullptr) return sparse_block<Block, true, false>(p, scratch, task);
  if (p.target.data == nullptr) return sparse_block<Block, false, true>(p, scratch, task);
  return sparse_block<Block, true, true>(p, scratch, task);
}

static void gather_values(const SparseProduct& p, float* values, int64_t begin, int64_t end) {
  const int32_t* order = p.order + p.offsets[begin];
  const int64_t count = p.offsets[end] - p.offsets[begin];
  for (int64_t e = 0; e < count; ++e) values[e] = p.values[order[e]];
}

static void sparse_blocks(const SparseProduct& p, const SparseScratch& scratch, int64_t first, int64_t last,
                          int64_t begin, int64_t end) {
  if (p.order != nullptr && p.target.data != nullptr) gather_values(p, scratch.values, begin, end);
  const int64_t width = sparse_block_tokens(p);
  const auto run = width == 4    ? sparse_block_of<4>
                   : width == 8  ? sparse_block_of<8>
                   : width == 16 ? sparse_block_of<16>
                                 : sparse_block_of<32>;
  for (int64_t block = first; block < last; ++block) {
    fill_panel(p, block, scratch.panel);
    run(p, scratch, {block, begin, end, block > first});
  }
}

static void sparse_gradients(const SparseProduct& p, const float* sums, int64_t groups, int64_t begin, int64_t end) {
  const int64_t entries = p.offsets[p.features];
  for (int64_t e = p.offsets[begin]; e < p.offsets[end]; e += kBuffer) {
    const int64_t count = minimum(kBuffer, p.offsets[end] - e);
    float totals[kBuffer] = {};
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t i = 0; i < count; ++i) totals[i] += sums[group * entries + e + i];
    for (int64_t i = 0; i < count; ++i) p.gradients[p.order[e + i]] = p.scaling * totals[i];
  }
}
