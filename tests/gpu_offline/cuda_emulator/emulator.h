// Runs CUDA kernels on the CPU: every CUDA thread is a fiber, every block a set of fibers that one worker thread
// switches between. It shows what a source means, not how fast it is nor what a GPU's compiler makes of it.
//
// What it finds:
//   by itself        a barrier that some threads of the block do not reach; a warp operation whose lanes do not all
//                    take part; shared memory read before it is written (it starts as NaN)
//   by orders        a missing barrier, where some order of the threads changes the result
//   AddressSanitizer any access outside of a buffer, in global or shared memory
//   UBSan            a misaligned access; an index outside of a shared array
//   ThreadSanitizer  accesses that no barrier or atomic orders, within a block and between blocks
//
// Kernels are compiled with -I include, whose cuda_runtime.h takes the place of CUDA's. This file and emulator.cpp are
// compiled without ThreadSanitizer: their own bookkeeping is none of the kernel's.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulator {

// The order in which the threads of a block, and the blocks of a launch, take their turns. `greedy` runs the first
// thread that can run, and with it a whole warp up to the next barrier, before any other; `forward` gives every thread
// a turn first.
enum class Order : int { forward, reverse, greedy, greedy_reverse, random };

struct Options {
  Order order = Order::forward;
  uint64_t seed = 1;        // of Order::random
  int workers = 1;          // threads of the CPU that the blocks are dealt to
  int64_t first_block = 0;  // earlier blocks are left out: the end of a tensor too large to be made
};

Options& options();

struct Index {
  unsigned x, y, z;
};

struct Place {
  const char* file;
  int line;
};

// ---- what kernels call, by way of include/cuda_runtime.h

struct Thread {
  Index thread, block, block_size, grid_size;
};

const Thread& self();

void barrier(Place place);

// The value of lane `source`, once every lane of `mask` has called it. Orders no memory accesses, as on a GPU.
uint64_t shuffle(uint32_t mask, uint64_t value, int source, Place place);

// Shared memory of the block that belongs to `key`.
void* shared_memory(const void* key, size_t bytes);

// Throws std::runtime_error with the place of what went wrong.
void launch(Index grid_size, Index block_size, void (*kernel)(void*), void* arguments);

}  // namespace emulator
