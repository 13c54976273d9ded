// A weight matrix as the kernels see it: dense or quantized, row-major, [rows, columns], perhaps under a bit mask.
#pragma once
#include <cstdint>

#include "peftkern/number.h"

namespace peftkern {

enum class Encoding : int32_t {
  float32 = 0,
  bfloat16 = 1,
  float16 = 2,
  code4 = 3,  // two codes a byte, the even element in the high nibble; value = codebook[code] * scale (NF4, FP4)
  code8 = 4,  // one code a byte; value = codebook[code] * scale (8-bit blockwise)
  int8 = 5,   // one signed byte; value = byte * scale (row-wise int8)
};

// Which entries of a matrix count: bit j % 8 of byte j / 8 of a row is 1 where column j is kept. Null: all.
struct BitMask {
  const uint8_t* bits = nullptr;
  int64_t row_stride = 0;  // bytes
};

// Scales belong to blocks of 2^block_shift consecutive elements in row-major order, which may run over the end of a
// row; with a negative block_shift a block is a row.
struct Weight {
  const void* data = nullptr;
  Encoding encoding = Encoding::float32;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;           // elements; dense encodings only
  const float* codebook = nullptr;  // 16 or 256 values
  int32_t block_shift = -1;
  const void* scales = nullptr;           // float, or uint8 when double-quantized
  const float* scale_codebook = nullptr;  // 256 values; null: the scales are floats
  const float* scales_absmax = nullptr;
  float scales_offset = 0.0f;
  int32_t scales_block_shift = 0;
  BitMask mask;  // an entry that it does not keep counts as zero, whatever is stored there
};

// Static, like everything that the files of several instruction sets include: the linker must not merge their copies.
static inline bool weight_quantized(const Weight& weight) { return weight.encoding >= Encoding::code4; }

static inline bool keeps(const BitMask& mask, int64_t row, int64_t column) {
  return mask.bits == nullptr || (mask.bits[row * mask.row_stride + (column >> 3)] >> (column & 7) & 1) != 0;
}

static inline int64_t weight_block(const Weight& weight, int64_t row, int64_t column) {
  return weight.block_shift < 0 ? row : (row * weight.columns + column) >> weight.block_shift;
}

static inline float weight_scale(const Weight& weight, int64_t block) {
  if (weight.scale_codebook == nullptr) return static_cast<const float*>(weight.scales)[block];
  const float code = weight.scale_codebook[static_cast<const uint8_t*>(weight.scales)[block]];
  return code * weight.scales_absmax[block >> weight.scales_block_shift] + weight.scales_offset;
}

// The code's value before the scale.
static inline float weight_code(const Weight& weight, int64_t row, int64_t column) {
  const int64_t index = row * weight.columns + column;
  const uint8_t* bytes = static_cast<const uint8_t*>(weight.data);
  if (weight.encoding == Encoding::code4)
    return weight.codebook[(index & 1) ? bytes[index >> 1] & 15 : bytes[index >> 1] >> 4];
  if (weight.encoding == Encoding::code8) return weight.codebook[bytes[index]];
  return static_cast<float>(static_cast<const int8_t*>(weight.data)[index]);
}

// Does not look at the mask.
static inline float weight_value(const Weight& weight, int64_t row, int64_t column) {
  if (!weight_quantized(weight))
    return load_float(weight.data, static_cast<DType>(weight.encoding), row * weight.row_stride + column);
  return weight_code(weight, row, column) * weight_scale(weight, weight_block(weight, row, column));
}

}  // namespace peftkern
