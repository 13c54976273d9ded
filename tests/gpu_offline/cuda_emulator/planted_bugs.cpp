// Kernels that are right, and become wrong where a defect is switched on: what the emulator and the sanitizers must
// find.
//
//   planted_bugs NAME DEFECT ORDER SEED WORKERS
//
// Prints "right" or "wrong"; a failed launch prints its message and exits with 2.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

#include "cuda/device.h"

namespace {

using peftkern::cuda::kAllLanes;
using peftkern::cuda::launch;
using peftkern::cuda::load_16_bytes;

constexpr int kThreads = 64;

// ---- a sum through shared memory; the defect: no barrier between writing and reading

__global__ __launch_bounds__(kThreads) void sum(const float* values, float* total, bool defect) {
  PEFTKERN_SHARED(float, copies, [kThreads]);
  copies[threadIdx.x] = values[threadIdx.x];
  if (!defect) __syncthreads();
  if (threadIdx.x != 0) return;
  *total = 0.0f;
  for (int i = 0; i < kThreads; ++i) *total += copies[i];
}

bool check_sum(bool defect) {
  const auto values = std::make_unique<float[]>(kThreads);
  for (int i = 0; i < kThreads; ++i) values[i] = 1.0f;
  float total = 0.0f;
  launch(sum, dim3(1), kThreads, nullptr, static_cast<const float*>(values.get()), &total, defect);
  return total == kThreads;
}

// ---- shared memory used twice; the defect: no barrier between reading it and writing it again

__global__ __launch_bounds__(kThreads) void turn_twice(const float* values, float* result, bool defect) {
  PEFTKERN_SHARED(float, copies, [kThreads]);
  const int thread = static_cast<int>(threadIdx.x);
  float value = values[thread];
  for (int round = 0; round < 2; ++round) {
    copies[thread] = value + 1.0f;
    __syncthreads();
    value = copies[kThreads - 1 - thread];
    if (!defect) __syncthreads();
  }
  result[thread] = value;
}

bool check_turn_twice(bool defect) {
  const auto values = std::make_unique<float[]>(kThreads), result = std::make_unique<float[]>(kThreads);
  for (int i = 0; i < kThreads; ++i) values[i] = static_cast<float>(i);
  launch(turn_twice, dim3(1), kThreads, nullptr, static_cast<const float*>(values.get()), result.get(), defect);
  for (int i = 0; i < kThreads; ++i)
    if (result[i] != static_cast<float>(i + 2)) return false;
  return true;
}

// ---- a count by all threads of all blocks; the defect: a plain addition

constexpr int kBlocks = 4;

__global__ __launch_bounds__(kThreads) void count(int* total, bool defect) {
  if (defect)
    *total += 1;
  else
    atomicAdd(total, 1);
}

bool check_count(bool defect) {
  const auto total = std::make_unique<int>(0);
  launch(count, dim3(kBlocks), kThreads, nullptr, total.get(), defect);
  return *total == kBlocks * kThreads;
}

// ---- one number for each block; the defect: every block writes the same one

__global__ __launch_bounds__(kThreads) void one_each(int* numbers, bool defect) {
  if (threadIdx.x == 0) numbers[defect ? 0 : blockIdx.x] = static_cast<int>(blockIdx.x);
}

bool check_one_each(bool defect) {
  const auto numbers = std::make_unique<int[]>(kBlocks);
  launch(one_each, dim3(kBlocks), kThreads, nullptr, numbers.get(), defect);
  return numbers[0] == 0 || defect;
}

// ---- accesses past the end: of global memory, of shared memory

__global__ __launch_bounds__(kThreads) void copy(const float* values, float* result, bool defect) {
  result[threadIdx.x] = values[threadIdx.x + (defect ? 1 : 0)];
}

bool check_past_the_end(bool defect) {
  const auto values = std::make_unique<float[]>(kThreads), result = std::make_unique<float[]>(kThreads);
  launch(copy, dim3(1), kThreads, nullptr, static_cast<const float*>(values.get()), result.get(), defect);
  return true;
}

__global__ __launch_bounds__(kThreads) void copy_in_shared_memory(float* result, bool defect) {
  PEFTKERN_SHARED(float, copies, [kThreads]);
  float* target = copies + threadIdx.x;
  target[defect ? 1 : 0] = 1.0f;
  __syncthreads();
  result[threadIdx.x] = copies[threadIdx.x];
}

bool check_past_shared_memory(bool defect) {
  const auto result = std::make_unique<float[]>(kThreads);
  launch(copy_in_shared_memory, dim3(1), kThreads, nullptr, result.get(), defect);
  return true;
}

// ---- 16 bytes at once; the defect: from an address that is a multiple of 4 alone

__global__ __launch_bounds__(kThreads) void copy_vectors(const float* values, float* result, bool defect) {
  const float* source = values + threadIdx.x * 4 + (defect ? 1 : 0);
  result[threadIdx.x] = __uint_as_float(load_16_bytes(source).x);
}

bool check_misaligned(bool defect) {
  const auto values = std::make_unique<float[]>(4 * kThreads + 4), result = std::make_unique<float[]>(kThreads);
  launch(copy_vectors, dim3(1), kThreads, nullptr, static_cast<const float*>(values.get()), result.get(), defect);
  return true;
}

// ---- the defect: some threads return, or go elsewhere, before the barrier

__global__ __launch_bounds__(kThreads) void wait_for_all(bool defect) {
  if (defect && threadIdx.x >= 40) return;
  __syncthreads();
}

bool check_barrier_of_some(bool defect) {
  launch(wait_for_all, dim3(1), kThreads, nullptr, defect);
  return true;
}

__global__ __launch_bounds__(kThreads) void wait_apart(bool defect) {
  if (defect && threadIdx.x >= 40)
    __syncthreads();
  else
    __syncthreads();
}

bool check_two_barriers(bool defect) {
  launch(wait_apart, dim3(1), kThreads, nullptr, defect);
  return true;
}

// ---- the defect: some lanes of the mask do not take part, or wait for something else

__global__ __launch_bounds__(kThreads) void swap_lanes(float* result, bool defect) {
  float value = static_cast<float>(threadIdx.x);
  if (!defect || threadIdx.x % 32 < 20) value = __shfl_xor_sync(kAllLanes, value, 1);
  result[threadIdx.x] = value;
}

bool check_absent_lanes(bool defect) {
  const auto result = std::make_unique<float[]>(kThreads);
  launch(swap_lanes, dim3(1), kThreads, nullptr, result.get(), defect);
  for (int i = 0; i < kThreads; ++i)
    if (result[i] != static_cast<float>(i ^ 1)) return false;
  return true;
}

__global__ __launch_bounds__(kThreads) void swap_then_wait(float* result, bool defect) {
  float value = static_cast<float>(threadIdx.x);
  if (!defect || threadIdx.x % 32 < 20) value = __shfl_xor_sync(kAllLanes, value, 1);
  __syncthreads();
  result[threadIdx.x] = value;
}

bool check_lanes_at_a_barrier(bool defect) {
  const auto result = std::make_unique<float[]>(kThreads);
  launch(swap_then_wait, dim3(1), kThreads, nullptr, result.get(), defect);
  return true;
}

const std::map<std::string, std::function<bool(bool)>> kChecks = {
    {"missing_barrier", check_sum},
    {"missing_second_barrier", check_turn_twice},
    {"plain_add", check_count},
    {"same_place", check_one_each},
    {"past_the_end", check_past_the_end},
    {"past_shared_memory", check_past_shared_memory},
    {"misaligned", check_misaligned},
    {"barrier_of_some", check_barrier_of_some},
    {"two_barriers", check_two_barriers},
    {"absent_lanes", check_absent_lanes},
    {"lanes_at_a_barrier", check_lanes_at_a_barrier},
};

}  // namespace

int main(int, char** arguments) {
  emulator::options() = {static_cast<emulator::Order>(std::atoi(arguments[3])),
                         std::strtoull(arguments[4], nullptr, 10), std::atoi(arguments[5]), 0};
  try {
    std::puts(kChecks.at(arguments[1])(std::atoi(arguments[2]) != 0) ? "right" : "wrong");
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
    return 2;
  }
}
