// One update of AdamW, bit-identical to peftkern/ops/adamw.py, which says what is computed and in which order. Buffers
// hold one block of moments each, so that the compiler vectorises their loops for each instruction set; no
// multiplication and addition may be contracted (-ffp-contract=off).
#pragma once

struct AdamWBuffer {
  alignas(64) float parameter[kMomentBlock] = {};
  alignas(64) float gradient[kMomentBlock] = {};
  alignas(64) float mean[kMomentBlock] = {};
  alignas(64) float square[kMomentBlock] = {};
  alignas(64) float factor[kMomentBlock] = {};
  alignas(64) float mean_rate[kMomentBlock] = {};
  alignas(64) float root_correction[kMomentBlock] = {};
};

// ---- the update

// A whole buffer. Rates are those of the buffer where entries have ages, factors where entries have their own.
template <bool kAges, bool kFactors>
static void update_entries(const AdamW& a, float* __restrict parameter, const float* __restrict gradient,
                           float* __restrict mean, float* __restrict square, const AdamWBuffer& buffer) {
  const float uniform_rate = a.mean_correction * a.lr;
  for (int64_t j = 0; j < kMomentBlock; ++j) {
    const float rate = kAges ? buffer.mean_rate[j] : uniform_rate;
    const float root = kAges ? buffer.root_correction[j] : a.root_correction;
    const float factor = kFactors ? buffer.factor[j] : a.scale;
    const float new_mean = mean[j] + (gradient[j] - mean[j]) * a.mean_weight;
    const float new_square = square[j] * a.square_decay + gradient[j] * gradient[j] * a.square_weight;
    const float step = new_mean * rate / (__builtin_sqrtf(new_square) * root + a.eps) + parameter[j] * a.decay;
    const float moved = parameter[j] - step * factor;
    const bool trained = !kFactors || factor != 0.0f;
    parameter[j] = trained ? moved : parameter[j];
    mean[j] = trained ? new_mean : mean[j];
    square[j] = trained ? new_square : square[j];
  }
}

static void update_buffer(const AdamW& a, float* parameter, const float* gradient, float* mean, float* square,
                          const AdamWBuffer& buffer) {
  const bool factors = a.row_scales != nullptr || a.mask != nullptr;
  if (a.age != nullptr && factors) return update_entries<true, true>(a, parameter, gradient, mean, square, buffer);
  if (a.age != nullptr) return update_entries<true, false>(a, parameter, gradient, mean, square, buffer);
  if (factors) return update_entries<false, true>(a, parameter, gradient, mean, square, buffer);
  update_entries<false, false>(a, parameter, gradient, mean, square, buffer);
}

// ---- scales and ages

// The 8 bits of every byte, the lowest first, as factors.
struct BitFactors {
  float factors[256][8];
};
constexpr BitFactors bit_factors() {
  BitFactors table = {};
  for (int byte = 0; byte < 256; ++byte)
    for (int place = 0; place < 8; ++place) table.factors[byte][place] = static_cast<float>(byte >> place & 1);
  return table;
}
alignas(64) static constexpr BitFactors kBitFactors = bit_factors();

static void expand_bits(const uint8_t* bits, int64_t column, int64_t count, float* factors) {
  int64_t j = 0;
  for (; j < count && (column + j) % 8 != 0; ++j)
    factors[j] = kBitFactors.factors[bits[(column + j) / 8]][(column + j) % 8];
  for (; j + 8 <= count; j += 8)
    std::memcpy(factors + j, kBitFactors.factors[bits[(column + j) / 8]], sizeof kBitFactors.factors[0]);
  for (; j < count; ++j) factors[j] = kBitFactors.factors[bits[(column + j) / 8]][(column + j) % 8];
}

// Returns whether any of the entries is trained.
static bool read_factors(const AdamW& a, int64_t begin, int64_t count, float* factors) {
  for (int64_t j = 0; j < count;) {
    const int64_t row = (begin + j) / a.columns, column = (begin + j) % a.columns;
    const int64_t run = a.columns - column < count - j ? a.columns - column : count - j;
    if (a.mask != nullptr)
      expand_bits(a.mask + row * ((a.columns + 7) / 8), column, run, factors + j);
    else
      for (int64_t k = 0; k < run; ++k) factors[j + k] = a.row_scales[row];
    j += run;
  }
  int32_t trained = 0;
  for (int64_t j = 0; j < count; ++j) trained |= factors[j] != 0.0f;
  return trained != 0;
}

// Counts the trained entries' updates, which a probe does not keep, and looks up what their ages are corrected by.
static void advance_ages(const AdamW& a, int64_t begin, int64_t count, AdamWBuffer* buffer) {
  const bool factors = a.row_scales != nullptr || a.mask != nullptr;
  for (int64_t j = 0; j < count; ++j) {
    const bool trained = !factors || buffer->factor[j] != 0.0f;
    const int32_t age = static_cast<int32_t>(static_cast<uint32_t>(a.age[begin + j]) + (trained ? 1u : 0u));
    if (!a.probe) a.age[begin + j] = age;
    const int32_t known = age < 0 ? 0 : age < a.last_age ? age : a.last_age;
    buffer->mean_rate[j] = a.corrections[2 * known] * a.lr;
    buffer->root_correction[j] = a.corrections[2 * known + 1];
  }
}

// ---- 8-bit moments

// Look-ups one by one: gathers of the processor take longer.
static void decode_moment(const Moment& moment, int64_t begin, int64_t count, float* values) {
  const uint8_t* codes = static_cast<const uint8_t*>(moment.data) + begin;
  const float absmax = moment.absmax[begin / kMomentBlock];
  for (int64_t j = 0; j < count; ++j) values[j] = moment.values[codes[j]] * absmax;
}

static float largest_moment(const float* values, int64_t count) {
  uint32_t largest = 0;  // magnitudes order as their bits do, and NaN above infinity
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t magnitude = float_bits(values[j]) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return bits_float(largest);
}

// For a buffer of magnitudes the numbers of bounds below them. A cell has one bound at most inside; NaN falls into the
// last cell, which is above all bounds.
static void count_bounds_below(const Moment& moment, const float* magnitudes, int32_t* below) {
  alignas(64) int32_t cells[kMomentBlock];
  for (int64_t j = 0; j < kMomentBlock; ++j) {
    const int32_t cell = static_cast<int32_t>(float_bits(magnitudes[j]) >> kMomentCellShift) - moment.first_cell;
    const int32_t from_first = cell < 0 ? 0 : cell;
    cells[j] = from_first < moment.last_cell ? from_first : moment.last_cell;
  }
  for (int64_t j = 0; j < kMomentBlock; ++j) {
    const int32_t below_cell = moment.cells[cells[j]];
    below[j] = below_cell + static_cast<int32_t>(moment.bounds[below_cell] < magnitudes[j]);
  }
}

// `values` is a whole buffer, whatever it holds from `count` on.
static void encode_moment(const Moment& moment, int64_t begin, int64_t count, const float* values) {
  const float absmax = largest_moment(values, count);
  moment.absmax[begin / kMomentBlock] = absmax;
  const float divisor = absmax == 0.0f ? 1.0f : absmax;
  alignas(64) float scaled[kMomentBlock], magnitudes[kMomentBlock];
  alignas(64) int32_t below[kMomentBlock];
  for (int64_t j = 0; j < kMomentBlock; ++j) {
    scaled[j] = values[j] / divisor;
    magnitudes[j] = bits_float(float_bits(scaled[j]) & 0x7FFFFFFFu);
  }
  count_bounds_below(moment, magnitudes, below);
  if (moment.has_sign)  // 127 negative codes, then 0, 127 positive ones, and 1, which has no negative
    for (int64_t j = 0; j < kMomentBlock; ++j) {
      const int32_t negative = below[j] < 127 ? 127 - below[j] : 0;
      below[j] = float_bits(scaled[j]) >> 31 != 0 ? negative : 127 + below[j];
    }
  uint8_t* codes = static_cast<uint8_t*>(moment.data) + begin;
  for (int64_t j = 0; j < count; ++j) codes[j] = static_cast<uint8_t>(below[j]);
}

// ---- reading and writing

// `count` moments: in place where they are floats and fill a buffer.
static float* moments_at(const Moment& moment, int64_t begin, int64_t count, float* buffer) {
  if (moment.absmax != nullptr) {
    decode_moment(moment, begin, count, buffer);
    return buffer;
  }
  float* values = static_cast<float*>(moment.data) + begin;
  if (count == kMomentBlock) return values;
  std::memcpy(buffer, values, static_cast<size_t>(count) * sizeof(float));
  return buffer;
}

static void keep_moments(const Moment& moment, int64_t begin, int64_t count, const float* values, const float* buffer) {
  if (moment.absmax != nullptr) return encode_moment(moment, begin, count, values);
  if (values == buffer) write_floats(moment.data, DType::float32, begin, count, values);
}

// Elements from `begin`, a multiple of the block, to `end`.
static void adamw_elements(const AdamW& a, int64_t begin, int64_t end) {
  const bool factors = a.row_scales != nullptr || a.mask != nullptr;
  AdamWBuffer buffer;
  for (int64_t i = begin; i < end; i += kMomentBlock) {
    const int64_t count = end - i < kMomentBlock ? end - i : kMomentBlock;
    if (factors && !read_factors(a, i, count, buffer.factor)) continue;
    if (a.age != nullptr) advance_ages(a, i, count, &buffer);
    const bool in_place = a.parameter_dtype == DType::float32 && count == kMomentBlock;
    float* parameter = in_place ? static_cast<float*>(a.parameter) + i : buffer.parameter;
    if (!in_place) read_floats(a.parameter, a.parameter_dtype, i, count, parameter);
    const float* gradient = floats_at(a.gradient, a.gradient_dtype, i, count, buffer.gradient);
    float* mean = moments_at(a.mean, i, count, buffer.mean);
    float* square = moments_at(a.square, i, count, buffer.square);
    update_buffer(a, parameter, gradient, mean, square, buffer);
    if (!in_place) write_floats(a.parameter, a.parameter_dtype, i, count, parameter);
    keep_moments(a.mean, i, count, mean, buffer.mean);
    keep_moments(a.square, i, count, square, buffer.square);
  }
}

static void copy_moments(const Moment& moment, int64_t begin, int64_t count, float* buffer) {
  if (moment.data == nullptr)
    std::memset(buffer, 0, kMomentBlock * sizeof(float));
  else if (moment.absmax != nullptr)
    decode_moment(moment, begin, count, buffer);
  else
    std::memcpy(buffer, static_cast<const float*>(moment.data) + begin, static_cast<size_t>(count) * sizeof(float));
}

// As adamw_elements, of an update on trial.
static void adamw_probe_elements(const AdamW& a, int64_t begin, int64_t end) {
  const bool factors = a.row_scales != nullptr || a.mask != nullptr;
  const int64_t bytes = a.parameter_dtype == DType::float32 ? 4 : 2;
  AdamWBuffer buffer;
  for (int64_t i = begin; i < end; i += kMomentBlock) {
    const int64_t count = end - i < kMomentBlock ? end - i : kMomentBlock;
    const bool trained = !factors || read_factors(a, i, count, buffer.factor);
    read_floats(a.parameter, a.parameter_dtype, i, count, buffer.parameter);
    read_floats(a.gradient, a.gradient_dtype, i, count, buffer.gradient);
    std::memcpy(static_cast<char*>(a.gradient) + i * bytes, static_cast<const char*>(a.parameter) + i * bytes,
                static_cast<size_t>(count * bytes));
    if (!trained) continue;
    if (a.age != nullptr) advance_ages(a, i, count, &buffer);
    copy_moments(a.mean, i, count, buffer.mean);
    copy_moments(a.square, i, count, buffer.square);
    update_buffer(a, buffer.parameter, buffer.gradient, buffer.mean, buffer.square, buffer);
    write_floats(a.parameter, a.parameter_dtype, i, count, buffer.parameter);
  }
}

// ---- whole moments

static void encode_moments(const Moment& moment, const float* values, int64_t begin, int64_t end) {
  alignas(64) float buffer[kMomentBlock] = {};
  for (int64_t i = begin; i < end; i += kMomentBlock) {
    const int64_t count = end - i < kMomentBlock ? end - i : kMomentBlock;
    std::memcpy(buffer, values + i, static_cast<size_t>(count) * sizeof(float));
    encode_moment(moment, i, count, buffer);
  }
}

static void decode_moments(const Moment& moment, float* values, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kMomentBlock)
    decode_moment(moment, i, end - i < kMomentBlock ? end - i : kMomentBlock, values + i);
}
