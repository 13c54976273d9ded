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

// Ranges of about equal length that begin at multiples of kSparseStep.
struct FeatureRanges {
  int64_t features;
  int64_t length;

  FeatureRanges(int64_t features_, int64_t wanted) : features(features_) {
    const int64_t steps = (features + kSparseStep - 1) / kSparseStep;
    length = std::max<int64_t>(1, (steps + wanted - 1) / wanted) * kSparseStep;
  }
  int64_t count() const { return (features + length - 1) / length; }
  int64_t begin(int64_t range) const { return range * length; }
  int64_t end(int64_t range) const { return std::min(features, (range + 1) * length); }
};

constexpr int64_t kSparsePanelFloats = int64_t{1} << 19;     // all panels at once, where one is not larger
constexpr int64_t kSparseSingleProducts = int64_t{1} << 16;  // up to here other threads cost more than they bring
constexpr int64_t kRangesPerThread = 4;

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

void run_sparse_product(const Kernels& kernels, const SparseProduct& p) {
  const int64_t entries = p.offsets[p.features];
  const int64_t width = sparse_block_tokens(p), blocks = (p.tokens + width - 1) / width;
  const int64_t panel = p.source_features * width;
  const int64_t at_once = std::min(blocks, std::max<int64_t>(1, kSparsePanelFloats / panel));
  const int64_t others = (p.order == nullptr ? 0 : entries) + (p.gradients == nullptr ? 0 : entries);
  SparseScratch scratch;
  scratch.panels = static_cast<float*>(thread_scratch(static_cast<size_t>(at_once * panel + others) * sizeof(float)));
  scratch.values = scratch.panels + at_once * panel;
  scratch.sums = scratch.values + (p.order == nullptr ? 0 : entries);

  const int threads = (p.source_features + entries) * p.tokens <= kSparseSingleProducts ? 1 : p.threads;
  const FeatureRanges sources(p.source_features, threads * kRangesPerThread);
  const FeatureRanges targets(p.features, threads * kRangesPerThread);
  for (int64_t first = 0; first < blocks; first += at_once) {
    const int64_t count = std::min(at_once, blocks - first);
    parallel_for(count * sources.count(), threads, [&](int64_t task) {
      const int64_t block = task / sources.count(), range = task % sources.count();
      kernels.sparse_fill_panel(p, first + block, sources.begin(range), sources.end(range),
                                scratch.panels + block * panel);
    });
    parallel_for(targets.count(), threads, [&](int64_t range) {
      kernels.sparse_blocks(p, scratch, first, count, targets.begin(range), targets.end(range));
    });
  }
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
