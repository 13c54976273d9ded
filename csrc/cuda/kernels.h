// What the CUDA module computes. Each function launches on a stream of the current device and returns at once. It
// allocates nothing and waits for nothing: a CUDA graph can capture it, best after a first call, in which the driver
// loads the kernel. All pointers are device memory.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "peftkern/number.h"
#include "peftkern/weight.h"

namespace peftkern::cuda {

// The scale of each block: values[block], or codebook[values[block]] * absmax[block >> block_shift] + offset[0].
struct Scales {
  const void* values = nullptr;     // float; uint8 where there is a codebook
  const float* codebook = nullptr;  // 256 values; null: the scales are floats
  const float* absmax = nullptr;
  const float* offset = nullptr;  // on the device like everything else: reading it here would wait for the GPU
  int32_t block_shift = 0;
};

// [rows, columns], row-major without gaps. Blocks are 2^block_shift consecutive elements; rows for Encoding::int8.
struct QuantizedWeight {
  const void* codes = nullptr;
  Encoding encoding = Encoding::code4;
  int64_t rows = 0;
  int64_t columns = 0;
  const float* codebook = nullptr;  // 16 or 256 values; null for int8
  int32_t block_shift = 0;
  Scales scales;
};

// Values to codes; peftkern/ops/quantize.py says how. Blocks are `block_size` consecutive elements: a power of two from
// 32 to 4096, or rows of any length for int8. `packed` and `scales` are aligned to 16 bytes.
struct Quantization {
  const void* values = nullptr;
  DType dtype = DType::float32;
  int64_t elements = 0;
  int64_t block_size = 0;
  Encoding encoding = Encoding::code4;
  const float* bounds = nullptr;   // code4: 15 ascending bounds between codes
  const uint8_t* codes = nullptr;  // code4: the code of each of the 16 intervals
  const uint8_t* grid = nullptr;   // code8: the code of each of 65536 points from -1 to 1
  uint8_t* packed = nullptr;
  float* scales = nullptr;
};

// Codes to values; peftkern/ops/dequantize.py says how. Where blocks are not rows, the weight is one row.
struct Dequantization {
  QuantizedWeight weight;
  void* out = nullptr;  // aligned to 16 bytes
  DType dtype = DType::float32;
};

constexpr int kMaxAdapters = 4;

// One adapter: lora_A [rank, columns] and lora_B [rows, rank], both row-major without gaps; lora_A aligned to 16 bytes.
struct Adapter {
  const void* lora_A = nullptr;
  DType dtype_A = DType::float32;
  const void* lora_B = nullptr;
  DType dtype_B = DType::float32;
  int64_t rank = 0;
  float scaling = 1.0f;
};

struct Adapters {
  Adapter entries[kMaxAdapters];
  int32_t count = 0;
};

// y = x Wᵀ + Σ h_i B_iᵀ + bias with h_i = scaling_i x A_iᵀ, for 4-bit codes, rows of whole blocks and few tokens.
// x, every lora_A and the codes are aligned to 16 bytes; so are the rows of x.
struct FewTokenProduct {
  const void* x = nullptr;  // [tokens, columns]
  int64_t x_stride = 0;     // elements from token to token
  DType dtype = DType::float32;
  int64_t tokens = 0;
  QuantizedWeight weight;
  Adapters adapters;
  const void* bias = nullptr;  // [rows]; null: none
  DType bias_dtype = DType::float32;
  float* h = nullptr;  // [tokens, ranks of all adapters side by side]
  void* y = nullptr;   // [tokens, rows] of `dtype`
};

constexpr int kMaxFewTokens = 16;

cudaError_t quantize(const Quantization& quantization, cudaStream_t stream);
cudaError_t dequantize(const Dequantization& dequantization, cudaStream_t stream);
cudaError_t few_token_product(const FewTokenProduct& product, cudaStream_t stream);

// Whether the current device can run the kernels that were built.
cudaError_t check_device();

}  // namespace peftkern::cuda
