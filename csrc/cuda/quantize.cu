// Quantize: a tensor becomes codes and one scale per block, bit-identical to peftkern/ops/quantize.py.
//
// 4-bit and 8-bit blockwise: every thread keeps eight values in registers, a block of 512 threads 4096, which is a
// whole number of quantization blocks of any size. Values are read once, 16 bytes at a time; the greatest magnitude of
// a quantization block is found by shuffles, and across warps in shared memory. int8: a row is a block, of any length.
// The threads of a block read it twice, the second time out of a cache.
#include "cuda/device.h"
#include "peftkern/quantization.h"

namespace peftkern::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kValuesPerBlock = kThreads * kOctet;
constexpr int64_t kMaxGridX = 0x7FFFFFFF;

// Magnitudes order as their bits do, and NaN above infinity, so neither can hide.
__device__ __forceinline__ uint32_t largest_bits(const float* values) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) largest = max(largest, __float_as_uint(values[i]) & 0x7FFFFFFFu);
  return largest;
}

// Over groups of `lanes` neighbouring lanes, a power of two up to 32.
__device__ __forceinline__ uint32_t largest_of_lanes(uint32_t largest, int lanes) {
  for (int distance = 1; distance < lanes; distance <<= 1)
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  return largest;
}

template <DType kDType>
__device__ __forceinline__ void load_values(const void* data, bool aligned, int64_t first, int64_t end, float* values) {
  if (aligned && first + kOctet <= end)
    load_octet<kDType>(data, first, values);
  else
    load_part<kDType>(data, first, end - first, values);
}

// ---- 4-bit

struct FourBitTable {
  float bounds[16];    // the last one is never looked at
  uint32_t codes[16];  // of the 16 intervals between them
};

// The number of bounds below the value: one on a bound belongs to the lower interval.
__device__ __forceinline__ uint32_t four_bit_code(const FourBitTable& table, float value) {
  int interval = table.bounds[7] < value ? 8 : 0;
  interval += table.bounds[interval + 3] < value ? 4 : 0;
  interval += table.bounds[interval + 1] < value ? 2 : 0;
  interval += table.bounds[interval] < value ? 1 : 0;
  return table.codes[interval];
}

// The last block divides where the others multiply by the reciprocal, if it is shorter than they are.
__device__ __forceinline__ uint32_t four_bit_codes(const FourBitTable& table, const float* values, float divisor,
                                                   bool whole) {
  const float reciprocal = __frcp_rn(divisor);
  uint32_t packed = 0;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    const float scaled = whole ? __fmul_rn(values[i], reciprocal) : __fdiv_rn(values[i], divisor);
    packed |= four_bit_code(table, scaled) << (i / 2 * 8 + (i % 2 == 0 ? 4 : 0));
  }
  return packed;
}

__device__ __forceinline__ void store_four_bit(uint8_t* packed, int64_t first, int64_t end, uint32_t codes) {
  if (first + kOctet <= end) {
    *reinterpret_cast<uint32_t*>(packed + first / 2) = codes;
    return;
  }
#pragma unroll
  for (int i = 0; i < kOctet; i += 2)
    if (first + i < end) packed[(first + i) / 2] = static_cast<uint8_t>(codes >> (i * 4));
}

// ---- 8-bit, dynamic codebook

__device__ __forceinline__ uint32_t eight_bit_code(const uint8_t* grid, float value, float reciprocal) {
  float scaled = __fmul_rn(value, reciprocal);
  scaled = scaled >= -1.0f ? scaled : -1.0f;  // NaN, which 0 * infinity is, becomes -1
  scaled = scaled <= 1.0f ? scaled : 1.0f;
  const float point = __fmul_rn(__fmul_rn(__fadd_rn(scaled, 1.0f), 0.5f), 65535.0f);
  return __ldg(grid + __float2int_rz(__fadd_rn(point, 0.5f)));
}

// Eight codes, a byte each, in two words.
__device__ __forceinline__ void store_bytes(uint8_t* packed, bool aligned, int64_t first, int64_t end,
                                            const uint32_t* codes) {
  if (aligned && first + kOctet <= end) {
    const uint32_t low = codes[0] | codes[1] << 8 | codes[2] << 16 | codes[3] << 24;
    const uint32_t high = codes[4] | codes[5] << 8 | codes[6] << 16 | codes[7] << 24;
    *reinterpret_cast<uint2*>(packed + first) = make_uint2(low, high);
    return;
  }
#pragma unroll
  for (int i = 0; i < kOctet; ++i)
    if (first + i < end) packed[first + i] = static_cast<uint8_t>(codes[i]);
}

template <DType kDType, Encoding kEncoding>
__global__ __launch_bounds__(kThreads) void quantize_blocks(Quantization q, bool aligned) {
  PEFTKERN_SHARED(FourBitTable, table, [1]);
  PEFTKERN_SHARED(uint32_t, warp_largest, [kWarps]);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  if constexpr (kEncoding == Encoding::code4) {
    if (thread < 16) {
      table[0].bounds[thread] = thread < 15 ? q.bounds[thread] : 0.0f;
      table[0].codes[thread] = q.codes[thread];
    }
  }

  const int64_t first = static_cast<int64_t>(blockIdx.x) * kValuesPerBlock + thread * kOctet;
  float values[kOctet];
  load_values<kDType>(q.values, aligned, first, q.elements, values);

  const int threads_per_block = static_cast<int>(q.block_size) / kOctet;  // a power of two
  uint32_t largest = largest_of_lanes(largest_bits(values), min(threads_per_block, kWarp));
  if (thread % kWarp == 0) warp_largest[warp] = largest;
  __syncthreads();
  const int warps_per_block = threads_per_block / kWarp;
  for (int i = 0; i < warps_per_block; ++i) largest = max(largest, warp_largest[(warp & -warps_per_block) + i]);

  if (first >= q.elements) return;
  const float absmax = __uint_as_float(largest);
  const int64_t block = first >> (__ffs(threads_per_block) + 2);
  const bool writes_scale = (thread & (threads_per_block - 1)) == 0;
  if constexpr (kEncoding == Encoding::code4) {
    const bool whole = (block + 1) * q.block_size <= q.elements;
    const float divisor = absmax < kSmallestDivisor ? kSmallestDivisor : absmax;
    if (writes_scale) q.scales[block] = whole ? absmax : divisor;
    store_four_bit(q.packed, first, q.elements, four_bit_codes(table[0], values, divisor, whole));
  } else {
    if (writes_scale) q.scales[block] = absmax;
    const float reciprocal = __frcp_rn(absmax);
    uint32_t codes[kOctet];
#pragma unroll
    for (int i = 0; i < kOctet; ++i) codes[i] = eight_bit_code(q.grid, values[i], reciprocal);
    store_bytes(q.packed, true, first, q.elements, codes);
  }
}

// ---- int8 by rows

constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kWarp;

// `aligned`: every row begins at a multiple of 16 bytes of values and of 8 bytes of codes.
template <DType kDType>
__global__ __launch_bounds__(kRowThreads) void quantize_rows(Quantization q, bool aligned) {
  PEFTKERN_SHARED(uint32_t, warp_largest, [kRowWarps]);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  const int64_t begin = row * q.block_size + thread * kOctet, end = (row + 1) * q.block_size;
  if (end > q.elements) return;  // with the whole block

  float values[kOctet];
  uint32_t largest = 0;
  for (int64_t first = begin; first < end; first += kRowThreads * kOctet) {
    load_values<kDType>(q.values, aligned, first, end, values);
    largest = max(largest, largest_bits(values));
  }
  largest = largest_of_lanes(largest, kWarp);
  if (thread % kWarp == 0) warp_largest[thread / kWarp] = largest;
  __syncthreads();
  for (int i = 0; i < kRowWarps; ++i) largest = max(largest, warp_largest[i]);

  const float absmax = __uint_as_float(largest);
  if (thread == 0) q.scales[row] = absmax;
  const float inverse = __fmul_rn(__frcp_rn(absmax), 127.0f);
  const float infinity = __uint_as_float(0x7F800000u);
  const bool usable = inverse < infinity && absmax < infinity;  // neither overflow nor NaN
  for (int64_t first = begin; first < end; first += kRowThreads * kOctet) {
    load_values<kDType>(q.values, aligned, first, end, values);
    uint32_t codes[kOctet];
#pragma unroll
    for (int i = 0; i < kOctet; ++i)
      codes[i] = usable ? static_cast<uint32_t>(__float2int_rn(__fmul_rn(values[i], inverse))) & 0xFFu : 0u;
    store_bytes(q.packed, aligned, first, end, codes);
  }
}

template <DType kDType>
cudaError_t quantize_values(const Quantization& q, cudaStream_t stream) {
  const bool aligned = aligned_to_16(q.values);
  if (q.encoding == Encoding::int8) {
    const int64_t rows = q.elements / q.block_size, wide = rows < kMaxGridX ? rows : kMaxGridX;
    const dim3 grid(static_cast<unsigned>(wide), static_cast<unsigned>(ceiling_divide(rows, wide)));
    return launch(quantize_rows<kDType>, grid, kRowThreads, stream, q, aligned && q.block_size % kOctet == 0);
  }
  const dim3 grid(static_cast<unsigned>(ceiling_divide(q.elements, kValuesPerBlock)));
  const auto kernel = q.encoding == Encoding::code4 ? quantize_blocks<kDType, Encoding::code4>
                                                    : quantize_blocks<kDType, Encoding::code8>;
  return launch(kernel, grid, kThreads, stream, q, aligned);
}

}  // namespace

cudaError_t quantize(const Quantization& q, cudaStream_t stream) {
  if (q.elements == 0) return cudaSuccess;
  if (q.dtype == DType::float32) return quantize_values<DType::float32>(q, stream);
  if (q.dtype == DType::bfloat16) return quantize_values<DType::bfloat16>(q, stream);
  return quantize_values<DType::float16>(q, stream);
}

}  // namespace peftkern::cuda
