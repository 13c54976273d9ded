// Takes the place of CUDA's header of this name: as much of CUDA C++ as the kernels of csrc/cuda use, in plain C++20.
// Build with -ffp-contract=off and -fno-strict-aliasing.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../emulator.h"

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define PEFTKERN_SHARED(type, name, dimensions)                                      \
  using name##_type = type dimensions;                                               \
  static const char name##_key = 0; /* one for each kernel and place, as on a GPU */ \
  name##_type& name = *static_cast<name##_type*>(::emulator::shared_memory(&name##_key, sizeof(name##_type)))

// ---- types

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) uint2 {
  unsigned x, y;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using std::max;
using std::min;

// ---- threads

template <emulator::Index emulator::Thread::* kIndex, unsigned emulator::Index::* kCoordinate>
struct EmulatedCoordinate {
  operator unsigned() const { return emulator::self().*kIndex.*kCoordinate; }
};

template <emulator::Index emulator::Thread::* kIndex>
struct EmulatedIndex {
  EmulatedCoordinate<kIndex, &emulator::Index::x> x;
  EmulatedCoordinate<kIndex, &emulator::Index::y> y;
  EmulatedCoordinate<kIndex, &emulator::Index::z> z;
};

inline constexpr EmulatedIndex<&emulator::Thread::thread> threadIdx{};
inline constexpr EmulatedIndex<&emulator::Thread::block> blockIdx{};
inline constexpr EmulatedIndex<&emulator::Thread::block_size> blockDim{};
inline constexpr EmulatedIndex<&emulator::Thread::grid_size> gridDim{};

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::barrier({file, line});
}

template <class T>
T emulated_shuffle(uint32_t mask, T value, int source, emulator::Place place) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = emulator::shuffle(mask, bits, source, place);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int emulated_lane() { return static_cast<int>(threadIdx.x % 32); }

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  return emulated_shuffle(mask, value, (emulated_lane() & -width) | (source & (width - 1)), {file, line});
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int distance, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  return emulated_shuffle(mask, value, emulated_lane() ^ distance, {file, line});
}

inline int atomicAdd(int* target, int value) { return __atomic_fetch_add(target, value, __ATOMIC_RELAXED); }

template <class T>
T __ldg(const T* address) {
  return *address;
}

// ---- numbers

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __float2int_rn(float a) { return static_cast<int>(std::nearbyint(a)); }
inline int __float2int_rz(float a) { return static_cast<int>(a); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }

// ---- the runtime

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

struct cudaFuncAttributes {};

inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* configuration, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const dim3 grid = configuration->gridDim, block = configuration->blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const bool grid_fits = grid.x - 1 < 0x7FFFFFFFu && grid.y - 1 < 65535u && grid.z - 1 < 65535u;
  if (!grid_fits || threads == 0 || threads > 1024) return cudaErrorInvalidConfiguration;
  auto call = [&] { kernel(static_cast<Parameters>(arguments)...); };
  emulator::launch(
      {grid.x, grid.y, grid.z}, {block.x, block.y, block.z},
      [](void* context) { (*static_cast<decltype(call)*>(context))(); }, &call);
  return cudaSuccess;
}
