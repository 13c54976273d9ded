// Building blocks of the kernels. The same sources compile for the host, where tests/gpu_offline runs them: whatever is
// no C++ is spelled here, once for nvcc and once in C++.
//
// Arithmetic whose bits matter is written with __fmul_rn and its kin, which no compiler contracts.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/kernels.h"
#include "peftkern/number.h"

#ifndef PEFTKERN_SHARED  // the tests bring their own, which checks bounds
#define PEFTKERN_SHARED(type, name, dimensions) __shared__ type name dimensions
#endif

namespace peftkern::cuda {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

// Eight values are what a thread works on at a time: 16 bytes of a 16-bit dtype, a word of 4-bit codes.
constexpr int kOctet = 8;

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = grid;
  configuration.blockDim = dim3(static_cast<unsigned>(threads));
  configuration.stream = stream;
  return cudaLaunchKernelEx(&configuration, kernel, arguments...);
}

inline bool aligned_to_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline int64_t ceiling_divide(int64_t dividend, int64_t divisor) { return (dividend + divisor - 1) / divisor; }

// ---- memory

__device__ __forceinline__ uint4 load_16_bytes(const void* address) {
  return __ldg(static_cast<const uint4*>(address));
}

// nvcc may take an assignment apart and leave four stores.
__device__ __forceinline__ void store_16_bytes(void* address, uint4 words) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "r"(words.x),
               "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
#else
  *static_cast<uint4*>(address) = words;
#endif
}

// ---- 16-bit numbers, two in a word; the first in the low half

template <DType kDType>
__device__ __forceinline__ float half_to_float(uint32_t word, int half) {
  if constexpr (kDType == DType::bfloat16) return __uint_as_float(half == 0 ? word << 16 : word & 0xFFFF0000u);
  const uint16_t bits = static_cast<uint16_t>(half == 0 ? word : word >> 16);
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  return float16_to_float(bits);
#endif
}

// Rounds to nearest even.
template <DType kDType>
__device__ __forceinline__ uint32_t floats_to_halves(float first, float second) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  if constexpr (kDType == DType::bfloat16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
#else
  const auto convert = [](float value) -> uint32_t {
    return kDType == DType::bfloat16 ? float_to_bfloat16(value) : float_to_float16(value);
  };
  return convert(first) | convert(second) << 16;
#endif
}

template <DType kDType>
__device__ __forceinline__ float load_value(const void* data, int64_t index) {
  if constexpr (kDType == DType::float32) return static_cast<const float*>(data)[index];
  return half_to_float<kDType>(static_cast<const uint16_t*>(data)[index], 0);
}

template <DType kDType>
__device__ __forceinline__ void store_value(void* data, int64_t index, float value) {
  if constexpr (kDType == DType::float32)
    static_cast<float*>(data)[index] = value;
  else
    static_cast<uint16_t*>(data)[index] = static_cast<uint16_t>(floats_to_halves<kDType>(value, 0.0f));
}

// ---- octets

// Eight values from `first` on, which is at a multiple of 16 bytes.
template <DType kDType>
__device__ __forceinline__ void load_octet(const void* data, int64_t first, float* values) {
  if constexpr (kDType == DType::float32) {
    const float* source = static_cast<const float*>(data) + first;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 words = load_16_bytes(source + half * 4);
      values[half * 4 + 0] = __uint_as_float(words.x);
      values[half * 4 + 1] = __uint_as_float(words.y);
      values[half * 4 + 2] = __uint_as_float(words.z);
      values[half * 4 + 3] = __uint_as_float(words.w);
    }
  } else {
    const uint4 loaded = load_16_bytes(static_cast<const uint16_t*>(data) + first);
    const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (int i = 0; i < kOctet; ++i) values[i] = half_to_float<kDType>(words[i / 2], i % 2);
  }
}

// The `count` values that exist, and zeros.
template <DType kDType>
__device__ __forceinline__ void load_part(const void* data, int64_t first, int64_t count, float* values) {
#pragma unroll
  for (int i = 0; i < kOctet; ++i) values[i] = i < count ? load_value<kDType>(data, first + i) : 0.0f;
}

template <DType kDType>
__device__ __forceinline__ void store_octet(void* data, int64_t first, const float* values) {
  if constexpr (kDType == DType::float32) {
    float* target = static_cast<float*>(data) + first;
#pragma unroll
    for (int i = 0; i < kOctet; i += 4)
      store_16_bytes(target + i, make_uint4(__float_as_uint(values[i]), __float_as_uint(values[i + 1]),
                                            __float_as_uint(values[i + 2]), __float_as_uint(values[i + 3])));
  } else {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = floats_to_halves<kDType>(values[2 * i], values[2 * i + 1]);
    store_16_bytes(static_cast<uint16_t*>(data) + first, make_uint4(words[0], words[1], words[2], words[3]));
  }
}

template <DType kDType>
__device__ __forceinline__ void store_part(void* data, int64_t first, int64_t count, const float* values) {
#pragma unroll
  for (int i = 0; i < kOctet; ++i)
    if (i < count) store_value<kDType>(data, first + i, values[i]);
}

// ---- scales

// The product is rounded before the offset is added.
__device__ __forceinline__ float load_scale(const Scales& scales, int64_t block) {
  if (scales.codebook == nullptr) return __ldg(static_cast<const float*>(scales.values) + block);
  const float code = __ldg(scales.codebook + __ldg(static_cast<const uint8_t*>(scales.values) + block));
  return __fadd_rn(__fmul_rn(code, __ldg(scales.absmax + (block >> scales.block_shift))), __ldg(scales.offset));
}

}  // namespace peftkern::cuda
