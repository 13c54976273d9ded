// Dequantize: codes become values, bit-identical to peftkern/ops/dequantize.py.
//
// A warp takes 512 bytes of codes, 16 a lane. Its lanes then pass words to each other, so that in every step they write
// 32 neighbouring octets: whole sectors, though a lane's own codes would spread over 64 to 128 bytes. The codebook is
// in shared memory: 16 entries lie in 16 banks, so that no look-up waits for another.
#include "cuda/device.h"
#include "peftkern/quantization.h"

namespace peftkern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxGridY = 65535;

template <int kBits>
struct Layout {
  static constexpr int kSteps = 16 * 8 / kBits / kOctet;  // octets of which a lane loads the codes at once
  static constexpr int kValuesPerWarp = kSteps * kWarp * kOctet;
};

// The codes of eight elements: one word, or two for 8 bits.
struct OctetCodes {
  uint32_t words[2];
};

__device__ __forceinline__ uint32_t word_of_lane(const uint4& words, int word, int lane) {
  const uint32_t x = __shfl_sync(kAllLanes, words.x, lane), y = __shfl_sync(kAllLanes, words.y, lane);
  const uint32_t z = __shfl_sync(kAllLanes, words.z, lane), w = __shfl_sync(kAllLanes, words.w, lane);
  return word == 0 ? x : word == 1 ? y : word == 2 ? z : w;
}

// Octet `step * 32 + lane` of the 512 bytes that the warp has loaded.
template <int kBits>
__device__ __forceinline__ OctetCodes octet_of_warp(const uint4& words, int step, int lane) {
  constexpr int kSteps = Layout<kBits>::kSteps;
  const int source = step * (kWarp / kSteps) + lane / kSteps;
  if constexpr (kBits == 4) return {{word_of_lane(words, lane % 4, source), 0}};
  return {{word_of_lane(words, lane % 2 * 2, source), word_of_lane(words, lane % 2 * 2 + 1, source)}};
}

// Byte by byte: what exists of an octet.
template <int kBits>
__device__ __forceinline__ OctetCodes load_codes(const uint8_t* codes, int64_t first, int64_t count) {
  OctetCodes result = {{0, 0}};
  const uint8_t* bytes = codes + first * kBits / 8;
#pragma unroll
  for (int i = 0; i < kBits; ++i)
    if (i * 8 / kBits < count) result.words[i / 4] |= static_cast<uint32_t>(bytes[i]) << (i % 4 * 8);
  return result;
}

// Of two 4-bit codes in a byte the high one is the first.
template <int kBits>
__device__ __forceinline__ uint32_t code_of(const OctetCodes& codes, int i) {
  if constexpr (kBits == 8) return codes.words[i / 4] >> (i % 4 * 8) & 0xFFu;
  return codes.words[0] >> (i / 2 * 8 + (i % 2 == 0 ? 4 : 0)) & 0xFu;
}

// Where blocks are rows, each row of the grid takes some rows; otherwise there is one. `aligned`: every row begins at a
// multiple of 16 bytes of codes and of values.
template <int kBits, DType kDType>
__global__ __launch_bounds__(kThreads) void dequantize_rows(Dequantization d, bool aligned) {
  PEFTKERN_SHARED(float, table, [1 << kBits]);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const QuantizedWeight& weight = d.weight;
  const bool by_rows = weight.encoding == Encoding::int8;
  if (thread < 1 << kBits)
    table[thread] = by_rows ? static_cast<float>(static_cast<int8_t>(thread)) : weight.codebook[thread];
  __syncthreads();

  constexpr int kValuesPerWarp = Layout<kBits>::kValuesPerWarp;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kWarps + thread / kWarp) * kValuesPerWarp;
  const bool whole = aligned && begin + kValuesPerWarp <= weight.columns;
  for (int64_t row = blockIdx.y; row < weight.rows; row += gridDim.y) {
    const int64_t row_begin = row * weight.columns;
    const uint8_t* codes = static_cast<const uint8_t*>(weight.codes) + row_begin * kBits / 8;
    uint4 words = {};
    if (whole) words = load_16_bytes(codes + begin * kBits / 8 + lane * 16);
#pragma unroll
    for (int step = 0; step < Layout<kBits>::kSteps; ++step) {
      const int64_t first = begin + (step * kWarp + lane) * kOctet, count = weight.columns - first;
      const OctetCodes octet = whole ? octet_of_warp<kBits>(words, step, lane) : load_codes<kBits>(codes, first, count);
      if (count <= 0) continue;
      const float scale = load_scale(weight.scales, by_rows ? row : first >> weight.block_shift);
      float values[kOctet];
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        values[i] = __fmul_rn(table[code_of<kBits>(octet, i)], scale);
        if (kBits == 8 && by_rows) values[i] = __fmul_rn(values[i], kOneOver127);
      }
      if (aligned && count >= kOctet)
        store_octet<kDType>(d.out, row_begin + first, values);
      else
        store_part<kDType>(d.out, row_begin + first, count, values);
    }
  }
}

template <int kBits>
cudaError_t dequantize_codes(const Dequantization& d, cudaStream_t stream) {
  const QuantizedWeight& weight = d.weight;
  const bool aligned = aligned_to_16(weight.codes) && (weight.rows == 1 || weight.columns % 16 == 0);
  const int64_t blocks = ceiling_divide(weight.columns, kWarps * Layout<kBits>::kValuesPerWarp);
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(weight.rows < kMaxGridY ? weight.rows : kMaxGridY));
  auto kernel = dequantize_rows<kBits, DType::float32>;
  if (d.dtype == DType::bfloat16) kernel = dequantize_rows<kBits, DType::bfloat16>;
  if (d.dtype == DType::float16) kernel = dequantize_rows<kBits, DType::float16>;
  return launch(kernel, grid, kThreads, stream, d, aligned);
}

}  // namespace

cudaError_t dequantize(const Dequantization& d, cudaStream_t stream) {
  if (d.weight.rows == 0 || d.weight.columns == 0) return cudaSuccess;
  return d.weight.encoding == Encoding::code4 ? dequantize_codes<4>(d, stream) : dequantize_codes<8>(d, stream);
}

}  // namespace peftkern::cuda
