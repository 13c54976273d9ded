#include "cpu/run.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <vector>

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

void run_adamw(const Kernels& kernels, const AdamW& a, int threads) {
  const int64_t blocks_per_task = kElementsPerTask / kMomentBlock;
  const int64_t elements_per_task = blocks_per_task * kMomentBlock;
  parallel_for((a.elements + elements_per_task - 1) / elements_per_task, threads, [&](int64_t task) {
    const int64_t begin = task * elements_per_task;
    kernels.adamw_elements(a, begin, std::min(a.elements, begin + elements_per_task));
  });
}

namespace {

constexpr int64_t kScoresPerTask = 1 << 17;

template <class Work>
void for_score_ranges(const Scores& s, int threads, const Work& work) {
  parallel_for((s.elements + kScoresPerTask - 1) / kScoresPerTask, threads, [&](int64_t task) {
    work(task, task * kScoresPerTask, std::min(s.elements, (task + 1) * kScoresPerTask));
  });
}

}  // namespace

void run_score_histogram(const Kernels& kernels, const Scores& s, const Digit& digit, int64_t* counts, int threads) {
  std::mutex mutex;
  for_score_ranges(s, threads, [&](int64_t, int64_t begin, int64_t end) {
    int64_t own[kScoreBuckets] = {};
    kernels.score_counts(s, digit, begin, end, own);
    const std::lock_guard<std::mutex> lock(mutex);
    for (int64_t bucket = 0; bucket < kScoreBuckets; ++bucket) counts[bucket] += own[bucket];
  });
}

void run_score_collect(const Kernels& kernels, const Scores& s, uint32_t key, int64_t ties, int64_t* out, int64_t count,
                       int threads) {
  const size_t tasks = static_cast<size_t>((s.elements + kScoresPerTask - 1) / kScoresPerTask);
  std::vector<int64_t> above(tasks), equal(tasks), first(tasks);
  for_score_ranges(s, threads, [&](int64_t task, int64_t begin, int64_t end) {
    kernels.score_compare(s, key, begin, end, &above[static_cast<size_t>(task)], &equal[static_cast<size_t>(task)]);
  });
  int64_t written = 0;
  for (size_t task = 0; task < tasks; ++task) {
    equal[task] = std::min(equal[task], ties);
    ties -= equal[task];
    first[task] = written;
    written += above[task] + equal[task];
  }
  if (written != count) throw std::runtime_error("score_collect: the scores have changed since they were counted");
  for_score_ranges(s, threads, [&](int64_t index, int64_t begin, int64_t end) {
    const size_t task = static_cast<size_t>(index);
    if (above[task] + equal[task] > 0) kernels.score_collect(s, key, equal[task], begin, end, out + first[task]);
  });
}

void run_add_importance(const Kernels& kernels, const Importance& p, float* total, int threads) {
  for_block_ranges(p.rows * p.columns, 1, threads,
                   [&](int64_t begin, int64_t end) { kernels.add_importance(p, total, begin, end); });
}

// Long rows are summed in pieces, whose length does not depend on the threads.
void run_sum_importance(const Kernels& kernels, const Importance& p, double* sums, int threads) {
  const int64_t pieces = std::max<int64_t>(1, (p.columns + kElementsPerTask - 1) / kElementsPerTask);
  std::vector<double> partial(static_cast<size_t>(p.rows * pieces));
  const int64_t per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, p.columns));
  parallel_for((p.rows * pieces + per_task - 1) / per_task, threads, [&](int64_t task) {
    const int64_t last = std::min(p.rows * pieces, (task + 1) * per_task);
    for (int64_t index = task * per_task; index < last; ++index) {
      const int64_t row = index / pieces * p.columns, begin = index % pieces * kElementsPerTask;
      const int64_t end = std::min(p.columns, begin + kElementsPerTask);
      partial[static_cast<size_t>(index)] = kernels.sum_importance(p, row + begin, row + end);
    }
  });
  for (int64_t row = 0; row < p.rows; ++row)
    sums[row] = std::accumulate(partial.begin() + row * pieces, partial.begin() + (row + 1) * pieces, 0.0);
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
