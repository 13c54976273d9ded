// Quantize and dequantize, bit-identical to peftkern/ops/quantize.py and dequantize.py, which say what is computed and
// in which order. Loops run over short buffers so that the compiler vectorises them for each instruction set; no
// multiplication and addition may be contracted (-ffp-contract=off).
#pragma once

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

// `count` is even but for the tensor's last buffer, whose missing element counts as 0. The interval of a value is the
// number of bounds below it.
#ifdef PEFTKERN_VECTOR_DECODE
static void pack_codes4(const Quantization& q, const float* scaled, int64_t count, uint8_t* packed) {
  alignas(64) float bounds[16];
  alignas(64) int32_t codes[16];
  for (int i = 0; i < 16; ++i) {
    bounds[i] = i < 15 ? q.bounds[i] : __builtin_inff();
    codes[i] = q.codes[i];
  }
  const Codebook16 bound_book = load_codebook16(bounds);
  const Codebook16 code_book = load_codebook16(reinterpret_cast<const float*>(codes));
  alignas(64) uint8_t bytes[kBuffer / 2];
  for (int64_t j = 0; j < kBuffer; j += kLanes) {
    const Float value = load(scaled + j);
    Int interval = int_zero();
    interval = add_where_less(interval, broadcast(q.bounds[7]), value, 8);
    interval = add_where_less(interval, lookup16(bound_book, add_int(interval, 3)), value, 4);
    interval = add_where_less(interval, lookup16(bound_book, add_int(interval, 1)), value, 2);
    interval = add_where_less(interval, lookup16(bound_book, interval), value, 1);
    store_nibbles(bytes + j / 2, as_int(lookup16(code_book, interval)));
  }
  std::memcpy(packed, bytes, static_cast<size_t>((count + 1) / 2));
}
#else
static void pack_codes4(const Quantization& q, const float* scaled, int64_t count, uint8_t* packed) {
  int32_t intervals[kBuffer] = {};
  for (int bound = 0; bound < 15; ++bound)
    for (int64_t j = 0; j < kBuffer; ++j) intervals[j] += q.bounds[bound] < scaled[j];
  for (int64_t j = 0; j < (count + 1) / 2; ++j)
    packed[j] = static_cast<uint8_t>(q.codes[intervals[2 * j]] << 4 | q.codes[intervals[2 * j + 1]]);
}
#endif

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

// Elements [begin, end) of the block with this scale, one by one. int8 multiplies twice, as its format says.
static void dequantize_elements(const Dequantization& d, int64_t begin, int64_t end, float scale) {
  const float factor = d.weight.encoding == Encoding::int8 ? kOneOver127 : 1.0f;
  for (int64_t i = begin; i < end; ++i) store_float(d.out, d.dtype, i, weight_code(d.weight, 0, i) * scale * factor);
}

#ifdef PEFTKERN_VECTOR_DECODE
constexpr int64_t kStreamFromBytes = 8 << 20;  // results that no cache would keep

template <class Encoded, DType kDType, bool kStream>
static void dequantize_vectors(const Dequantization& d, int64_t begin_block, int64_t end_block) {
  const Encoded encoded(d.weight);
  for (int64_t block = begin_block; block < end_block; ++block) {
    int64_t i = block * d.block_size;
    const int64_t end = i + d.block_size < d.elements ? i + d.block_size : d.elements;
    const float scale = weight_scale(d.weight, block);
    for (; i + kLanes <= end; i += kLanes) {
      Float value = mul(encoded.row(d.weight.data, i), broadcast(scale));
      if constexpr (Encoded::kPerDword == 4)
        if (d.weight.encoding == Encoding::int8) value = mul(value, broadcast(kOneOver127));
      if constexpr (kStream) stream(static_cast<float*>(d.out) + i, value);
      if constexpr (!kStream && kDType == DType::float32) store(static_cast<float*>(d.out) + i, value);
      if constexpr (kDType == DType::bfloat16) store_bfloat16(static_cast<uint16_t*>(d.out) + i, value);
      if constexpr (kDType == DType::float16) store_halves(static_cast<uint16_t*>(d.out) + i, value);
    }
    dequantize_elements(d, i, end, scale);
  }
  if constexpr (kStream) finish_streaming();
}

template <class Encoded>
static void dequantize_encoding(const Dequantization& d, int64_t begin, int64_t end) {
  if (d.dtype == DType::bfloat16) return dequantize_vectors<Encoded, DType::bfloat16, false>(d, begin, end);
  if (d.dtype == DType::float16) return dequantize_vectors<Encoded, DType::float16, false>(d, begin, end);
  const bool aligned = reinterpret_cast<uintptr_t>(d.out) % 64 == 0 && d.block_size % kLanes == 0;
  if (aligned && d.elements * 4 >= kStreamFromBytes)
    return dequantize_vectors<Encoded, DType::float32, true>(d, begin, end);
  dequantize_vectors<Encoded, DType::float32, false>(d, begin, end);
}
#endif

// Blocks [begin, end) of a quantized weight, as if it were one row; a block of int8 is a row of the tensor.
static void dequantize_blocks(const Dequantization& d, int64_t begin, int64_t end) {
#ifdef PEFTKERN_VECTOR_DECODE
  // A vector starts at an even element, and for the 4-bit codes thus at a whole byte: blocks are multiples of 32.
  if (d.weight.encoding == Encoding::code4) return dequantize_encoding<Code4>(d, begin, end);
  if (d.weight.encoding == Encoding::code8) return dequantize_encoding<Code8>(d, begin, end);
  dequantize_encoding<Int8>(d, begin, end);
#else
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * d.block_size;
    const int64_t last = first + d.block_size < d.elements ? first + d.block_size : d.elements;
    dequantize_elements(d, first, last, weight_scale(d.weight, block));
  }
#endif
}
