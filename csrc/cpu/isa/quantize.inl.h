// Quantize and dequantize, bit-identical to peftkern/ops/quantize.py and dequantize.py, which say what is computed and
// in which order. Loops run over short buffers so that the compiler vectorises them for each instruction set; no
// multiplication and addition may be contracted (-ffp-contract=off).
#pragma once

constexpr int64_t kBuffer = 64;
constexpr float kSmallestDivisor = 1e-38f;
constexpr float kOneOver127 = 0.007874015718698502f;

static void read_floats(const void* data, DType dtype, int64_t begin, int64_t count, float* values) {
  if (dtype == DType::float32) {
    std::memcpy(values, static_cast<const float*>(data) + begin, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const uint16_t* halves = static_cast<const uint16_t*>(data) + begin;
  if (dtype == DType::bfloat16) {
    for (int64_t i = 0; i < count; ++i) values[i] = bfloat16_to_float(halves[i]);
    return;
  }
  int64_t i = 0;
#ifdef PEFTKERN_VECTOR_DECODE
  for (; i + kLanes <= count; i += kLanes) store(values + i, half_to_float(expand_words(halves + i)));
#endif
  for (; i < count; ++i) values[i] = float16_to_float(halves[i]);
}

static void write_floats(const float* values, int64_t count, void* data, DType dtype, int64_t begin) {
  if (dtype == DType::float32) {
    std::memcpy(static_cast<float*>(data) + begin, values, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  uint16_t* halves = static_cast<uint16_t*>(data) + begin;
  if (dtype == DType::bfloat16) {
    for (int64_t i = 0; i < count; ++i) halves[i] = float_to_bfloat16(values[i]);
    return;
  }
  int64_t i = 0;
#ifdef PEFTKERN_VECTOR_DECODE
  for (; i + kLanes <= count; i += kLanes) store_halves(halves + i, load(values + i));
#endif
  for (; i < count; ++i) halves[i] = float_to_float16(values[i]);
}

// The greatest magnitude. Magnitudes order as their bits do, and NaN above infinity, so neither can hide.
static float largest_magnitude(const Quantization& q, int64_t begin, int64_t end) {
  alignas(64) float values[kBuffer];
  uint32_t largest = 0;
  for (int64_t i = begin; i < end; i += kBuffer) {
    const int64_t count = end - i < kBuffer ? end - i : kBuffer;
    read_floats(q.values, q.dtype, i, count, values);
    for (int64_t j = 0; j < count; ++j) {
      const uint32_t magnitude = float_bits(values[j]) & 0x7FFFFFFFu;
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  return bits_float(largest);
}

// `count` is even but for the tensor's last buffer, whose missing element counts as 0.
static void pack_codes4(const Quantization& q, const float* scaled, int64_t count, uint8_t* packed) {
  alignas(64) int32_t intervals[kBuffer] = {};
  for (int bound = 0; bound < 15; ++bound) {
    const float value = q.bounds[bound];
    for (int64_t j = 0; j < kBuffer; ++j) intervals[j] += value < scaled[j];
  }
  alignas(64) uint8_t codes[kBuffer];
  for (int64_t j = 0; j < kBuffer; ++j) codes[j] = q.codes[intervals[j]];
  for (int64_t j = 0; j < (count + 1) / 2; ++j) packed[j] = static_cast<uint8_t>(codes[2 * j] << 4 | codes[2 * j + 1]);
}

static void quantize_codes4(const Quantization& q, int64_t begin_block, int64_t end_block) {
  alignas(64) float values[kBuffer];
  for (int64_t block = begin_block; block < end_block; ++block) {
    const int64_t begin = block * q.block_size;
    const bool whole = begin + q.block_size <= q.elements;
    const int64_t end = whole ? begin + q.block_size : q.elements;
    const float absmax = largest_magnitude(q, begin, end);
    const float divisor = absmax < kSmallestDivisor ? kSmallestDivisor : absmax;
    q.scales[block] = whole ? absmax : divisor;
    const float reciprocal = 1.0f / divisor;
    for (int64_t i = begin; i < end; i += kBuffer) {
      const int64_t count = end - i < kBuffer ? end - i : kBuffer;
      read_floats(q.values, q.dtype, i, count, values);
      for (int64_t j = count; j < kBuffer; ++j) values[j] = 0.0f;
      if (whole)
        for (int64_t j = 0; j < kBuffer; ++j) values[j] *= reciprocal;
      else
        for (int64_t j = 0; j < kBuffer; ++j) values[j] /= divisor;
      pack_codes4(q, values, count, q.packed + i / 2);
    }
  }
}

static void quantize_codes8(const Quantization& q, int64_t begin_block, int64_t end_block) {
  alignas(64) float values[kBuffer];
  alignas(64) int32_t points[kBuffer];
  for (int64_t block = begin_block; block < end_block; ++block) {
    const int64_t begin = block * q.block_size;
    const int64_t end = begin + q.block_size < q.elements ? begin + q.block_size : q.elements;
    const float absmax = largest_magnitude(q, begin, end);
    q.scales[block] = absmax;
    const float reciprocal = 1.0f / absmax;
    for (int64_t i = begin; i < end; i += kBuffer) {
      const int64_t count = end - i < kBuffer ? end - i : kBuffer;
      read_floats(q.values, q.dtype, i, count, values);
      for (int64_t j = 0; j < count; ++j) {
        float scaled = values[j] * reciprocal;
        scaled = scaled >= -1.0f ? scaled : -1.0f;  // NaN, which 0 * infinity is, becomes -1
        scaled = scaled <= 1.0f ? scaled : 1.0f;
        points[j] = static_cast<int32_t>((scaled + 1.0f) * 0.5f * 65535.0f + 0.5f);
      }
      for (int64_t j = 0; j < count; ++j) q.packed[i + j] = q.grid[points[j]];
    }
  }
}

static void quantize_rows(const Quantization& q, int64_t begin_row, int64_t end_row) {
  alignas(64) float values[kBuffer];
  for (int64_t row = begin_row; row < end_row; ++row) {
    const int64_t begin = row * q.block_size, end = begin + q.block_size;
    const float absmax = largest_magnitude(q, begin, end);
    q.scales[row] = absmax;
    const float inverse = 1.0f / absmax * 127.0f;
    const bool usable = inverse < __builtin_inff() && absmax < __builtin_inff();  // neither overflow nor NaN
    const float factor = usable ? inverse : 0.0f;
    for (int64_t i = begin; i < end; i += kBuffer) {
      const int64_t count = end - i < kBuffer ? end - i : kBuffer;
      read_floats(q.values, q.dtype, i, count, values);
      for (int64_t j = 0; j < count; ++j) {
        const float product = usable ? values[j] * factor : 0.0f;
        // Adding 1.5 * 2^23 leaves the nearest integer, half to even, in the low bits.
        q.packed[i + j] = static_cast<uint8_t>(float_bits(product + 12582912.0f));
      }
    }
  }
}

static void quantize_blocks(const Quantization& q, int64_t begin, int64_t end) {
  if (q.encoding == Encoding::code4) return quantize_codes4(q, begin, end);
  if (q.encoding == Encoding::code8) return quantize_codes8(q, begin, end);
  quantize_rows(q, begin, end);
}

// ---- dequantize

#ifdef PEFTKERN_VECTOR_DECODE
template <class Encoded>
static int64_t decode_buffer(const Weight& flat, int64_t begin, int64_t count, float scale, float* values) {
  const Encoded encoded(flat);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(values + i, mul(encoded.row(flat.data, begin + i), broadcast(scale)));
  return i;
}
#endif

// Elements [begin, begin + count) of one block, times its scale.
static void decode_floats(const Weight& flat, int64_t begin, int64_t count, float scale, float* values) {
  int64_t done = 0;
#ifdef PEFTKERN_VECTOR_DECODE
  if (flat.encoding == Encoding::code4) done = decode_buffer<Code4>(flat, begin, count, scale, values);
  if (flat.encoding == Encoding::code8) done = decode_buffer<Code8>(flat, begin, count, scale, values);
  if (flat.encoding == Encoding::int8) done = decode_buffer<Int8>(flat, begin, count, scale, values);
#endif
  for (; done < count; ++done) values[done] = weight_code(flat, 0, begin + done) * scale;
}

// Blocks [begin, end) of a quantized weight, as if it were one row; a block of int8 is a row of the tensor.
static void dequantize_blocks(const Dequantization& d, int64_t begin_block, int64_t end_block) {
  alignas(64) float values[kBuffer];
  for (int64_t block = begin_block; block < end_block; ++block) {
    const int64_t begin = block * d.block_size;
    const int64_t end = begin + d.block_size < d.elements ? begin + d.block_size : d.elements;
    const float scale = weight_scale(d.weight, block);
    for (int64_t i = begin; i < end; i += kBuffer) {
      const int64_t count = end - i < kBuffer ? end - i : kBuffer;
      decode_floats(d.weight, i, count, scale, values);
      if (d.weight.encoding == Encoding::int8)
        for (int64_t j = 0; j < count; ++j) values[j] *= kOneOver127;
      write_floats(values, count, d.out, d.dtype, i);
    }
  }
}
