#include "cpu/run.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/parallel.h"

namespace peftkern::cpu {
namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Scratch is kept per thread between calls: fresh pages would cost more than a product of few tokens.
void* thread_scratch(size_t bytes) {
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(4096, rounded));
    if (!memory) throw std::bad_alloc();
    size = rounded;
  }
  return memory.get();
}

constexpr int64_t kElementsPerTask = 1 << 16;  // large enough to hide the hand-out, small enough to balance

template <class Work>
void for_block_ranges(int64_t elements, int64_t block_size, int threads, const Work& work) {
  const int64_t blocks = (elements + block_size - 1) / block_size;
  const int64_t blocks_per_task = std::max<int64_t>(1, kElementsPerTask / block_size);
  parallel_for((blocks + blocks_per_task - 1) / blocks_per_task, threads,
               [&](int64_t task) { work(task * blocks_per_task, std::min(blocks, (task + 1) * blocks_per_task)); });
}

}  // namespace

void run_quantization(const Kernels& kernels, const Quantization& q, int threads) {
  for_block_ranges(q.elements, q.block_size, threads,
                   [&](int64_t begin, int64_t end) { kernels.quantize_blocks(q, begin, end); });
}

void run_dequantization(const Kernels& kernels, const Dequantization& d, int threads) {
  for_block_ranges(d.elements, d.block_size, threads,
                   [&](int64_t begin, int64_t end) { kernels.dequantize_blocks(d, begin, end); });
}

void run_silu_mul(const Kernels& kernels, const SiluMul& s, int threads) {
  for_block_ranges(s.elements, 1, threads,
                   [&](int64_t begin, int64_t end) { kernels.silu_mul_elements(s, begin, end); });
}

void run_silu_mul_backward(const Kernels& kernels, const SiluMul& s, int threads) {
  for_block_ranges(s.elements, 1, threads,
                   [&](int64_t begin, int64_t end) { kernels.silu_mul_backward_elements(s, begin, end); });
}

void run_product(const Kernels& kernels, const Product& p) {
  const size_t scratch = kernels.product_scratch(p);
  parallel_for(kernels.product_tasks(p), p.threads,
               [&](int64_t task) { kernels.product_task(p, task, thread_scratch(scratch)); });
}

void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace peftkern::cpu
