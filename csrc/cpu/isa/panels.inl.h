// Panels: a block of the weight decoded into the order in which the tiles read it, [panel][k][columns].
//
// Reduced along its columns (forward), the weight has to be turned: a register of 16 rows x 4 bytes is transposed as
// bytes, and each of its codes becomes 16 floats of 16 rows with one shift, one look-up and one multiplication.
// Reduced along its rows (dX), rows are decoded as they lie. Whatever these two do not take (rows whose length is no
// multiple of the vector, encodings that straddle a byte) is decoded element by element.
#pragma once

struct Panels {
  void* data;
  int64_t width;   // columns of a panel
  int64_t column;  // of the first panel, within the task
  int64_t count;
  int64_t steps;        // k of this block
  int64_t allocated;    // k that one panel has room for, even
  const float* scales;  // float16 form: for each panel a power of two that brings its values near 1
};

// Where kLanes columns of one panel are written. A local object, so that its fields stay in registers between stores.
template <Precision kForm>
struct Sink {
  uint8_t* place;
  int64_t width;
  float scale;

  Sink(const Panels& panels, int64_t panel, int64_t column)
      : place(static_cast<uint8_t*>(panels.data) + (panel * panels.allocated * panels.width) * kBytes +
              column * kColumnBytes),
        width(panels.width),
        scale(kForm == Precision::float16 ? panels.scales[panel] : 1.0f) {}

  // Two consecutive terms, k even.
  inline void put(int64_t k, Float first, Float second) const {
#ifdef PEFTKERN_VECTOR_FORMS
    if constexpr (kForm == Precision::bfloat16) {
      store_int(place + k / 2 * width * 4, pair_bfloat16(first, second));
      return;
    }
    if constexpr (kForm == Precision::float16) {
      uint16_t* halves = reinterpret_cast<uint16_t*>(place) + k * width;
      store_halves(halves, mul(first, broadcast(scale)));
      store_halves(halves + width, mul(second, broadcast(scale)));
      return;
    }
#endif
    float* floats = reinterpret_cast<float*>(place) + k * width;
    store(floats, first);
    store(floats + width, second);
  }

  static constexpr int64_t kBytes = kForm == Precision::float32 ? 4 : 2;        // of one term of one column
  static constexpr int64_t kColumnBytes = kForm == Precision::float16 ? 2 : 4;  // from a column to the next
};

static inline bool even_blocks(const Weight& weight, int64_t multiple) {
  return !weight_quantized(weight) || weight.columns % multiple == 0 || weight.block_shift < 0;
}

static inline void apply_dropout(float* values, int64_t count, const Dropout& dropout, int64_t row, int64_t column) {
  const uint32_t key = dropout_row_key(dropout, static_cast<uint32_t>(row));
  for (int64_t i = 0; i < count; ++i) values[i] *= dropout_factor(dropout, key, static_cast<uint32_t>(column + i));
}

// ---- element by element

static inline Float decode_lanes_along_rows(const Weight& weight, int64_t row, int64_t column) {
  alignas(64) float values[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const bool inside = row + lane < weight.rows && column < weight.columns && keeps(weight.mask, row + lane, column);
    values[lane] = inside ? weight_value(weight, row + lane, column) : 0.0f;
  }
  return load(values);
}

static inline Float decode_lanes_along_columns(const Weight& weight, int64_t row, int64_t column) {
  alignas(64) float values[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const bool inside = row < weight.rows && column + lane < weight.columns && keeps(weight.mask, row, column + lane);
    values[lane] = inside ? weight_value(weight, row, column + lane) : 0.0f;
  }
  return load(values);
}

// ---- vectors

#ifdef PEFTKERN_VECTOR_DECODE
// How an encoding unpacks: `kPerDword` elements in 4 bytes, element `i` of every lane's 4 bytes as floats, and kLanes
// consecutive elements of a row as floats.
struct Code4 {
  static constexpr bool kQuantized = true;
  static constexpr int kPerDword = 8;
  Codebook16 book;
  explicit Code4(const Weight& weight) : book(load_codebook16(weight.codebook)) {}
  template <int i>
  Float element(Int dwords) const {
    return lookup16(book, shift_right<(i / 2) * 8 + (i % 2 == 0 ? 4 : 0)>(dwords));
  }
  Float row(const void* data, uint64_t index) const {
    return lookup16(book, expand_nibbles(static_cast<const uint8_t*>(data) + index / 2));
  }
};

struct Code8 {
  static constexpr bool kQuantized = true;
  static constexpr int kPerDword = 4;
  const float* book;
  explicit Code8(const Weight& weight) : book(weight.codebook) {}
  template <int i>
  Float element(Int dwords) const {
    return lookup256(book, and_int(shift_right<8 * i>(dwords), 0xFFu));
  }
  Float row(const void* data, uint64_t index) const {
    return lookup256(book, expand_bytes(static_cast<const uint8_t*>(data) + index));
  }
};

struct Int8 {
  static constexpr bool kQuantized = true;
  static constexpr int kPerDword = 4;
  explicit Int8(const Weight&) {}
  template <int i>
  Float element(Int dwords) const {
    return to_float(shift_right_signed<24>(shift_left<24 - 8 * i>(dwords)));
  }
  Float row(const void* data, uint64_t index) const {
    return to_float(expand_signed_bytes(static_cast<const int8_t*>(data) + index));
  }
};

struct Float32 {
  static constexpr bool kQuantized = false;
  static constexpr int kPerDword = 1;
  explicit Float32(const Weight&) {}
  template <int i>
  Float element(Int dwords) const {
    return as_float(dwords);
  }
  Float row(const void* data, uint64_t index) const { return load(static_cast<const float*>(data) + index); }
};

struct Bfloat16 {
  static constexpr bool kQuantized = false;
  static constexpr int kPerDword = 2;
  explicit Bfloat16(const Weight&) {}
  template <int i>
  Float element(Int dwords) const {
    return as_float(i == 0 ? shift_left<16>(dwords) : and_int(dwords, 0xFFFF0000u));
  }
  Float row(const void* data, uint64_t index) const {
    return as_float(shift_left<16>(expand_words(static_cast<const uint16_t*>(data) + index)));
  }
};

struct Float16 {
  static constexpr bool kQuantized = false;
  static constexpr int kPerDword = 2;
  explicit Float16(const Weight&) {}
  template <int i>
  Float element(Int dwords) const {
    return half_to_float(i == 0 ? dwords : shift_right<16>(dwords));
  }
  Float row(const void* data, uint64_t index) const {
    return half_to_float(expand_words(static_cast<const uint16_t*>(data) + index));
  }
};

// The scales of kLanes rows at one column, fetched again only where the block changes.
struct RowScales {
  const Weight& weight;
  int64_t row;
  int64_t fetched = -1;
  bool aligned;  // all rows change their block at the same column
  Float value;

  RowScales(const Weight& weight_, int64_t row_)
      : weight(weight_),
        row(row_),
        aligned(weight_.block_shift < 0 || weight_.columns % (int64_t{1} << weight_.block_shift) == 0),
        value(zero()) {}

  inline Float at(int64_t column) {
    const int64_t column_block = weight.block_shift < 0 ? 0 : column >> weight.block_shift;
    if (!aligned || column_block != fetched) {
      fetched = column_block;
      value = fetch(weight, row, column);
    }
    return value;
  }

  __attribute__((noinline)) static Float fetch(const Weight& weight, int64_t row, int64_t column) {
    alignas(64) float scales[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t r = row + lane < weight.rows ? row + lane : weight.rows - 1;
      scales[lane] = weight_scale(weight, weight_block(weight, r, column));
    }
    return load(scales);
  }
};

// What the mask keeps of kLanes rows and one block of columns. Turned like the codes: bits k % 32 of word k / 32 of
// every lane.
struct RowMasks {
  const bool present;
  Int words[kLanes];

  RowMasks(const Weight& weight, int64_t row, int64_t k0, int64_t steps) : present(weight.mask.bits != nullptr) {
    if (!present) return;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t r = row + lane < weight.rows ? row + lane : weight.rows - 1;
      words[lane] = load_bytes(weight.mask.bits + r * weight.mask.row_stride + k0 / 8, divide_up(steps, 8));
    }
    transpose(words);
  }

  // Of 8 columns from k on, a multiple of 8, in the lowest bits.
  inline Int at(int64_t k) const { return shift_right_by(words[k / 32], static_cast<int>(k % 32)); }
};

template <int i = 0>
static inline void keep_eight(Float* values, Int bits) {
  if constexpr (i < 8) {
    values[i] = keep_where_bit<i>(values[i], bits);
    keep_eight<i + 1>(values, bits);
  }
}

template <class Encoded, int i>
static inline void unpack_dword(const Encoded& encoded, const Int* dwords, Float* values) {
  if constexpr (i < 8) {
    values[i] = encoded.template element<i % Encoded::kPerDword>(dwords[i / Encoded::kPerDword]);
    unpack_dword<Encoded, i + 1>(encoded, dwords, values);
  }
}

// Few tokens leave so little arithmetic that the next lines have to be under way while these are decoded; the processor
// does not foresee steps from row to row.
constexpr int64_t kPrefetchBytes = 192;
constexpr int64_t kPrefetchRows = 8;

static void prefetch_row(const Weight& weight, int64_t row, int64_t column, int64_t columns, int64_t bits) {
  if (row >= weight.rows) return;
  const int64_t stride = weight_quantized(weight) ? weight.columns : weight.row_stride;
  const uint8_t* codes = static_cast<const uint8_t*>(weight.data) + (row * stride + column) * bits / 8;
  for (int64_t byte = 0; byte < columns * bits / 8; byte += 64) __builtin_prefetch(codes + byte);
  if (!weight_quantized(weight)) return;
  const int64_t scale_bytes = weight.scale_codebook == nullptr ? 4 : 1;
  __builtin_prefetch(static_cast<const uint8_t*>(weight.scales) + weight_block(weight, row, column) * scale_bytes);
}

template <class Encoded, Precision kForm>
static void decode_along_columns(const Weight& weight, int64_t row0, int64_t k0, const Panels panels) {
  const Encoded encoded(weight);
  const bool scaled = weight_quantized(weight);
  const int64_t bits = 32 / Encoded::kPerDword;
  const int64_t row_elements = scaled ? weight.columns : weight.row_stride;
  const int64_t block_bytes = (panels.steps * bits + 7) / 8;
  for (int64_t vector = 0; vector < panels.count * panels.width / kLanes; ++vector) {
    const int64_t row = row0 + vector * kLanes;
    const int64_t panel = vector * kLanes / panels.width, column = vector * kLanes % panels.width;
    const uint8_t* rows[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t r = row + lane < weight.rows ? row + lane : weight.rows - 1;
      rows[lane] = static_cast<const uint8_t*>(weight.data) + ((r * row_elements + k0) * bits) / 8;
    }
    RowScales scales(weight, row);
    const RowMasks masks(weight, row, k0, panels.steps);
    const Sink<kForm> sink(panels, panel, column);
    for (int64_t byte = 0; byte < block_bytes; byte += 4 * kLanes) {
      Int dwords[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        dwords[lane] = load_bytes(rows[lane] + byte, block_bytes - byte);
        __builtin_prefetch(rows[lane] + byte + kPrefetchBytes);
      }
      transpose(dwords);
      const int64_t first = byte * 8 / bits;
      const int64_t end = minimum(first + kLanes * Encoded::kPerDword, panels.steps);
      for (int64_t k = first; k < end; k += 8) {
        const Float scale = scaled ? scales.at(k0 + k) : broadcast(1.0f);
        Float values[8];
        unpack_dword<Encoded, 0>(encoded, dwords + (k - first) / Encoded::kPerDword, values);
        if (scaled)
          for (int i = 0; i < 8; ++i) values[i] = mul(values[i], scale);
        if (masks.present) keep_eight(values, masks.at(k));
        if (k + 8 <= end)
          for (int i = 0; i < 8; i += 2) sink.put(k + i, values[i], values[i + 1]);
        else
          for (int i = 0; i < 8 && k + i < end; i += 2) sink.put(k + i, values[i], values[i + 1]);
      }
    }
  }
}

constexpr int64_t kMostVectorsOfRow = 32;  // in the panels of one task

// The scale of each vector of a row, from a column on. Apart from the loop that uses them: what one scale takes to find
// would keep that loop's own values out of registers.
__attribute__((noinline)) static void fill_scales(const Weight& weight, int64_t row, int64_t column, int64_t vectors,
                                                  float* scales) {
  const int64_t begin = row * weight.columns;
  for (int64_t vector = 0; vector < vectors;) {
    const int64_t at = column + vector * kLanes;
    if (at >= weight.columns) return;
    const int64_t block = weight_block(weight, row, at);
    const int64_t end = weight.block_shift < 0 ? weight.columns : ((block + 1) << weight.block_shift) - begin;
    const float scale = weight_scale(weight, block);
    for (; vector < vectors && column + vector * kLanes < end; ++vector) scales[vector] = scale;
  }
}

// What no whole panel holds: the end of a row, and an odd last one.
__attribute__((noinline)) static Float decode_remainder(const Weight& weight, int64_t row, int64_t column) {
  return decode_lanes_along_columns(weight, row, column);
}

// One row of a weight, a vector at a time.
template <class Encoded, bool kMasked>
struct RowReader {
  const void* codes;
  uint64_t begin;  // the first element
  const uint8_t* mask;
  float scales[kMostVectorsOfRow];

  RowReader(const Weight& weight, int64_t row, int64_t column, int64_t vectors) : codes(weight.data), mask(nullptr) {
    begin = static_cast<uint64_t>(row * (Encoded::kQuantized ? weight.columns : weight.row_stride) + column);
    if (kMasked) mask = weight.mask.bits + row * weight.mask.row_stride + column / 8;
    if (Encoded::kQuantized) fill_scales(weight, row, column, vectors, scales);
  }

  inline Float at(const Encoded& encoded, int64_t vector) const {
    Float value = encoded.row(codes, begin + static_cast<uint64_t>(vector * kLanes));
    if constexpr (Encoded::kQuantized) value = mul(value, broadcast(scales[vector]));
    if constexpr (kMasked) value = keep_lanes(value, mask + vector * kLanes / 8);
    return value;
  }
};

template <class Encoded, Precision kForm, bool kMasked>
static void decode_along_rows(const Weight& weight, int64_t column0, int64_t k0, const Panels& panels) {
  const Encoded encoded(weight);
  const int64_t of_panel = panels.width / kLanes, vectors = panels.count * of_panel, steps = panels.steps;
  const int64_t whole = minimum(vectors, (weight.columns - column0) / kLanes);
  for (int64_t k = 0; k < steps; k += 2) {
    const bool has_second = k + 1 < steps;
    const int64_t row = k0 + k, second_row = has_second ? row + 1 : row;
    for (int64_t ahead = kPrefetchRows; ahead < kPrefetchRows + 2; ++ahead)
      prefetch_row(weight, row + ahead, column0, vectors * kLanes, 32 / Encoded::kPerDword);
    const RowReader<Encoded, kMasked> first(weight, row, column0, vectors);
    const RowReader<Encoded, kMasked> second(weight, second_row, column0, vectors);
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      Sink<kForm> sink(panels, panel, 0);
      const int64_t begin = panel * of_panel, end = begin + of_panel;
      const bool plain = has_second && end <= whole;
      for (int64_t vector = begin; plain && vector < end; ++vector) {
        sink.put(k, first.at(encoded, vector), second.at(encoded, vector));
        sink.place += kLanes * Sink<kForm>::kColumnBytes;
      }
      for (int64_t vector = begin; !plain && vector < end; ++vector) {
        const int64_t column = column0 + vector * kLanes;
        const Float below = has_second ? decode_remainder(weight, second_row, column) : zero();
        sink.put(k, decode_remainder(weight, row, column), below);
        sink.place += kLanes * Sink<kForm>::kColumnBytes;
      }
    }
  }
}

template <class Encoded, Precision kForm>
static void decode_vectors(const Weight& weight, bool transposed, int64_t output0, int64_t k0, const Panels& panels) {
  if (!transposed)
    decode_along_columns<Encoded, kForm>(weight, output0, k0, panels);
  else if (weight.mask.bits == nullptr)
    decode_along_rows<Encoded, kForm, false>(weight, output0, k0, panels);
  else
    decode_along_rows<Encoded, kForm, true>(weight, output0, k0, panels);
}
#endif

template <Precision kForm>
static void decode_elements(const Weight& weight, bool transposed, int64_t output0, int64_t k0, const Panels& panels) {
  for (int64_t vector = 0; vector < panels.count * panels.width / kLanes; ++vector) {
    const int64_t output = output0 + vector * kLanes;
    const Sink<kForm> sink(panels, vector * kLanes / panels.width, vector * kLanes % panels.width);
    for (int64_t k = 0; k < panels.steps; k += 2) {
      Float pair[2];
      for (int i = 0; i < 2; ++i)
        pair[i] = k + i >= panels.steps ? zero()
                  : transposed          ? decode_lanes_along_columns(weight, k0 + k + i, output)
                                        : decode_lanes_along_rows(weight, output, k0 + k + i);
      sink.put(k, pair[0], pair[1]);
    }
  }
}

// A dense float32 weight whose rows are tokens under dropout (dA reads x this way).
static void drop_panels(const Dropout& dropout, int64_t column0, int64_t k0, const Panels& panels) {
  for (int64_t panel = 0; panel < panels.count; ++panel)
    for (int64_t k = 0; k < panels.steps; ++k)
      apply_dropout(static_cast<float*>(panels.data) + (panel * panels.allocated + k) * panels.width, panels.width,
                    dropout, k0 + k, column0 + panel * panels.width);
}

template <Precision kForm>
static void decode_panels(const Weight& weight, bool transposed, int64_t output0, int64_t k0, const Panels& panels) {
#ifdef PEFTKERN_VECTOR_DECODE
  if (even_blocks(weight, transposed ? kLanes : 8)) {
    switch (weight.encoding) {
      case Encoding::code4:
        return decode_vectors<Code4, kForm>(weight, transposed, output0, k0, panels);
      case Encoding::code8:
        return decode_vectors<Code8, kForm>(weight, transposed, output0, k0, panels);
      case Encoding::int8:
        return decode_vectors<Int8, kForm>(weight, transposed, output0, k0, panels);
      case Encoding::float32:
        return decode_vectors<Float32, kForm>(weight, transposed, output0, k0, panels);
      case Encoding::bfloat16:
        return decode_vectors<Bfloat16, kForm>(weight, transposed, output0, k0, panels);
      case Encoding::float16:
        return decode_vectors<Float16, kForm>(weight, transposed, output0, k0, panels);
    }
  }
#endif
  decode_elements<kForm>(weight, transposed, output0, k0, panels);
}
