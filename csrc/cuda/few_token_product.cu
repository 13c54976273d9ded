// y = x Wᵀ + Σ h_i B_iᵀ + bias for 1 to 16 tokens and 4-bit W, in two launches: h, then everything else.
//
// A block of four warps makes four rows of W for all its tokens. The columns are dealt to the lanes of the block, 32 at
// a time: 16 bytes of codes, in one quantization block. Each value of W is decoded once (a shuffle out of the 16
// codebook entries that the lanes hold) and multiplied with the token's x in float32. The adapter is more columns of
// the same sums. Sums are added over lanes and warps in an order that is always the same.
#include "cuda/device.h"

namespace peftkern::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRows = 4;
constexpr int kColumns = 32;  // of W that a lane takes at a time
constexpr int kLowRankTokens = 4;

// Sums each of `kCount` numbers over the lanes of a warp. Lane l ends up with the sums of numbers
// l * kCount / 32 and up, at the front of `values`; fewer than 32 numbers are each repeated in neighbouring lanes.
template <int kCount>
__device__ __forceinline__ void sum_over_lanes(float* values, int lane) {
  int remaining = kCount;
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    if (remaining == 1) {
      values[0] = __fadd_rn(values[0], __shfl_xor_sync(kAllLanes, values[0], distance));
      continue;
    }
    remaining /= 2;
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      if (i >= remaining) break;
      const float kept = upper ? values[i + remaining] : values[i];
      const float given = upper ? values[i] : values[i + remaining];
      values[i] = __fadd_rn(kept, __shfl_xor_sync(kAllLanes, given, distance));
    }
  }
}

// The sum of number `thread` over all threads of the block, for threads below `kCount`.
template <int kCount>
__device__ __forceinline__ float sum_over_block(float* values, int thread) {
  PEFTKERN_SHARED(float, sums, [kWarps][kCount]);
  constexpr int kPerLane = kCount > kWarp ? kCount / kWarp : 1, kLanesPerSum = kCount > kWarp ? 1 : kWarp / kCount;
  const int lane = thread % kWarp;
  sum_over_lanes<kCount>(values, lane);
  if (lane % kLanesPerSum == 0) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sums[thread / kWarp][lane / kLanesPerSum * kPerLane + i] = values[i];
  }
  __syncthreads();
  float sum = 0.0f;
  if (thread < kCount)
    for (int warp = 0; warp < kWarps; ++warp) sum = __fadd_rn(sum, sums[warp][thread]);
  return sum;
}

__device__ __forceinline__ float load_any(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::float32) return load_value<DType::float32>(data, index);
  if (dtype == DType::bfloat16) return load_value<DType::bfloat16>(data, index);
  return load_value<DType::float16>(data, index);
}

__device__ __forceinline__ void load_any_octet(const void* data, DType dtype, int64_t first, float* values) {
  if (dtype == DType::float32) return load_octet<DType::float32>(data, first, values);
  if (dtype == DType::bfloat16) return load_octet<DType::bfloat16>(data, first, values);
  load_octet<DType::float16>(data, first, values);
}

__device__ __forceinline__ int64_t total_rank(const Adapters& adapters) {
  int64_t total = 0;
  for (int i = 0; i < adapters.count; ++i) total += adapters.entries[i].rank;
  return total;
}

// h = scaling x Aᵀ: a block makes one column of h for some tokens.
template <DType kDType>
__global__ __launch_bounds__(kThreads, 8) void low_rank_product(FewTokenProduct p) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t column = blockIdx.x, first_token = static_cast<int64_t>(blockIdx.y) * kLowRankTokens;
  int64_t row = column;
  int index = 0;
  while (row >= p.adapters.entries[index].rank) row -= p.adapters.entries[index++].rank;
  const Adapter adapter = p.adapters.entries[index];
  float sums[kLowRankTokens] = {};
  for (int64_t first = thread * kOctet; first < p.weight.columns; first += kThreads * kOctet) {
    float factors[kOctet];
    load_any_octet(adapter.lora_A, adapter.dtype_A, row * p.weight.columns + first, factors);
#pragma unroll
    for (int t = 0; t < kLowRankTokens; ++t) {
      if (first_token + t >= p.tokens) break;
      float values[kOctet];
      load_octet<kDType>(p.x, (first_token + t) * p.x_stride + first, values);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) sums[t] = __fmaf_rn(values[i], factors[i], sums[t]);
    }
  }
  const float sum = sum_over_block<kLowRankTokens>(sums, thread);
  if (thread < kLowRankTokens && first_token + thread < p.tokens)
    p.h[(first_token + thread) * total_rank(p.adapters) + column] = __fmul_rn(adapter.scaling, sum);
}

// Codes of kColumns columns of each row, as loaded, and their scales.
struct Panel {
  uint32_t words[kRows][kColumns / kOctet];
  float scales[kRows];
};

__device__ __forceinline__ void load_panel(const QuantizedWeight& weight, int64_t first_row, int64_t first_column,
                                           Panel& panel) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first_row + r < weight.rows ? first_row + r : weight.rows - 1;
    const int64_t element = row * weight.columns + first_column;
    const uint4 words = load_16_bytes(static_cast<const uint8_t*>(weight.codes) + element / 2);
    panel.words[r][0] = words.x;
    panel.words[r][1] = words.y;
    panel.words[r][2] = words.z;
    panel.words[r][3] = words.w;
    panel.scales[r] = load_scale(weight.scales, element >> weight.block_shift);
  }
}

template <DType kDType, int kTokens>
__global__ __launch_bounds__(kThreads) void rows_product(FewTokenProduct p) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const float entry = p.weight.codebook[thread % 16];
  float sums[kRows * kTokens] = {};

  // Every lane goes round as often as the first one: decoding takes the whole warp.
  for (int64_t base = thread / kWarp * kWarp * kColumns; base < p.weight.columns; base += kThreads * kColumns) {
    const int64_t first_column = base + thread % kWarp * kColumns;
    const bool exists = first_column < p.weight.columns;
    Panel panel = {};
    if (exists) load_panel(p.weight, first_row, first_column, panel);
#pragma unroll
    for (int octet = 0; octet < kColumns / kOctet; ++octet) {
      float factors[kRows][kOctet];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kOctet; ++i) {
          const int shift = i / 2 * 8 + (i % 2 == 0 ? 4 : 0);  // the high half of a byte is the first
          const float value = __shfl_sync(kAllLanes, entry, static_cast<int>(panel.words[r][octet] >> shift), 16);
          factors[r][i] = __fmul_rn(value, panel.scales[r]);
        }
      }
      if (!exists) continue;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (t >= p.tokens) break;
        float values[kOctet];
        load_octet<kDType>(p.x, t * p.x_stride + first_column + octet * kOctet, values);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float& sum = sums[r * kTokens + t];
#pragma unroll
          for (int i = 0; i < kOctet; ++i) sum = __fmaf_rn(values[i], factors[r][i], sum);
        }
      }
    }
  }

  const int64_t ranks = total_rank(p.adapters);
  int64_t begin = 0;
  for (int index = 0; index < p.adapters.count; ++index) {
    const Adapter& adapter = p.adapters.entries[index];
    for (int64_t i = thread; i < adapter.rank; i += kThreads) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = first_row + r < p.weight.rows ? first_row + r : p.weight.rows - 1;
        const float factor = load_any(adapter.lora_B, adapter.dtype_B, row * adapter.rank + i);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          if (t >= p.tokens) break;
          sums[r * kTokens + t] = __fmaf_rn(p.h[t * ranks + begin + i], factor, sums[r * kTokens + t]);
        }
      }
    }
    begin += adapter.rank;
  }

  const float sum = sum_over_block<kRows * kTokens>(sums, thread);
  const int64_t row = first_row + thread / kTokens;
  const int token = thread % kTokens;
  if (thread >= kRows * kTokens || row >= p.weight.rows || token >= p.tokens) return;
  const float bias = p.bias == nullptr ? 0.0f : load_any(p.bias, p.bias_dtype, row);
  store_value<kDType>(p.y, token * p.weight.rows + row, __fadd_rn(sum, bias));
}

template <DType kDType>
cudaError_t product(const FewTokenProduct& p, cudaStream_t stream) {
  int64_t ranks = 0;
  for (int i = 0; i < p.adapters.count; ++i) ranks += p.adapters.entries[i].rank;
  if (ranks > 0) {
    const dim3 grid(static_cast<unsigned>(ranks), static_cast<unsigned>(ceiling_divide(p.tokens, kLowRankTokens)));
    const cudaError_t status = launch(low_rank_product<kDType>, grid, kThreads, stream, p);
    if (status != cudaSuccess) return status;
  }
  auto kernel = rows_product<kDType, kMaxFewTokens>;
  if (p.tokens <= 4) kernel = rows_product<kDType, 4>;
  if (p.tokens == 1) kernel = rows_product<kDType, 1>;
  const dim3 grid(static_cast<unsigned>(ceiling_divide(p.weight.rows, kRows)));
  return launch(kernel, grid, kThreads, stream, p);
}

}  // namespace

cudaError_t few_token_product(const FewTokenProduct& p, cudaStream_t stream) {
  if (p.dtype == DType::float32) return product<DType::float32>(p, stream);
  if (p.dtype == DType::bfloat16) return product<DType::bfloat16>(p, stream);
  return product<DType::float16>(p, stream);
}

cudaError_t check_device() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, rows_product<DType::bfloat16, 1>);
}

}  // namespace peftkern::cuda
