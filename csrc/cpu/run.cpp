#include "cpu/run.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <utility>
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

enum class Scratch { task, call };

// Scratch is kept per thread between calls: fresh pages would cost more than a product of few tokens. The thread that
// calls runs tasks as well; what it keeps for the whole call is a buffer of its own.
template <Scratch kScratch = Scratch::task>
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
#ifdef PEFTKERN_POISON_SCRATCH
  // no number in any dtype: what reads it before it is written shows
  if (bytes > 0) std::memset(memory.get(), 0xFF, bytes);
#endif
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

constexpr int64_t kSparseSingleProducts = int64_t{1} << 16;  // up to here other threads cost more than they bring
constexpr int64_t kSparseSums = int64_t{1} << 21;            // floats that all groups' sums may take together
constexpr int64_t kSparseTasksPerThread = 4;
constexpr int64_t kSparseCheapPanel = 8;  // products for each element of a panel that make filling it again cheap

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A task is one group of blocks of tokens and one range of features. How blocks are grouped decides in which order
// gradients are summed, and so must not depend on the number of threads. Every task fills panels of its own: where
// there are fewer groups than threads, or the panels are little work, features are cut into ranges.
struct SparsePlan {
  int64_t blocks, group_blocks, groups, threads, range, ranges;

  explicit SparsePlan(const SparseProduct& p) {
    const int64_t entries = p.offsets[p.features];
    blocks = divide_up(p.tokens, sparse_block_tokens(p));
    group_blocks = p.gradients == nullptr ? 1 : divide_up(blocks, std::max<int64_t>(1, kSparseSums / entries));
    groups = divide_up(blocks, group_blocks);
    threads = (p.source_features + entries) * p.tokens <= kSparseSingleProducts ? 1 : p.threads;
    const int64_t cheap = entries / (kSparseCheapPanel * p.source_features);
    const int64_t wanted =
        std::max(divide_up(threads, groups), std::min(divide_up(threads * kSparseTasksPerThread, groups), cheap));
    range = divide_up(divide_up(p.features, kSparseStep), wanted) * kSparseStep;
    ranges = divide_up(p.features, range);
  }
};

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

void run_rotary(const Kernels& kernels, const Rotary& r, int threads) {
  int64_t row = 0;
  for (int64_t s = 0; s < r.state_count; ++s) row += r.states[s].heads * r.head_dim;
  if (row == 0) return;
  for_block_ranges(r.batch * r.tokens * row, row, threads,
                   [&](int64_t begin, int64_t end) { kernels.rotary_rows(r, begin, end); });
}

// A head's groups follow each other, while its keys are in a cache; the last see the most and go first.
void run_attention(const Kernels& kernels, const Attention& a, int threads) {
  const int64_t heads = a.batch * a.kv_heads, groups = attention_groups(a);
  const size_t scratch = kernels.attention_scratch(a, false);
  parallel_for(heads * groups, threads, [&](int64_t task) {
    kernels.attention_group(a, task / groups, groups - 1 - task % groups, thread_scratch(scratch));
  });
}

void run_attention_backward(const Kernels& kernels, const Attention& a, int threads) {
  const int64_t heads = a.batch * a.kv_heads, parts = attention_parts(a), sums = attention_sums(a);
  const size_t scratch = kernels.attention_scratch(a, true), sums_bytes = static_cast<size_t>(sums) * sizeof(float);
  if (parts == 1) {
    parallel_for(heads, threads, [&](int64_t head) {
      void* const memory = thread_scratch(scratch + sums_bytes);
      float* const own = reinterpret_cast<float*>(static_cast<char*>(memory) + scratch);
      kernels.attention_backward_part(a, head, 0, memory, own);
      kernels.attention_gradients(a, head, own);
    });
    return;
  }
  float* const all =
      static_cast<float*>(thread_scratch<Scratch::call>(static_cast<size_t>(heads * parts) * sums_bytes));
  std::vector<std::atomic<int64_t>> parts_left(static_cast<size_t>(heads));
  for (std::atomic<int64_t>& left : parts_left) left.store(parts);
  parallel_for(heads * parts, threads, [&](int64_t task) {
    const int64_t head = task / parts, part = task % parts;
    kernels.attention_backward_part(a, head, part, thread_scratch(scratch), all + task * sums);
    // the part that is done last adds up all, in their order
    if (parts_left[static_cast<size_t>(head)].fetch_sub(1) == 1)
      kernels.attention_gradients(a, head, all + head * parts * sums);
  });
}

void run_norm(const Kernels& kernels, const Norm& n, int threads) {
  for_block_ranges(n.rows * n.features, n.features, threads,
                   [&](int64_t begin, int64_t end) { kernels.norm_rows(n, begin, end); });
}

// The gradients of weight and bias are summed over groups of rows, which do not depend on the threads, and these in
// their order.
void run_norm_backward(const Kernels& kernels, const NormBackward& n, int threads) {
  if (n.grad_weight == nullptr && n.grad_bias == nullptr) {
    for_block_ranges(n.rows * n.features, n.features, threads,
                     [&](int64_t begin, int64_t end) { kernels.norm_backward_rows(n, begin, end, nullptr, nullptr); });
    return;
  }
  constexpr int64_t kMostGroups = 32;
  const int64_t group_rows = std::max(divide_up(n.rows, kMostGroups), divide_up(kElementsPerTask, n.features));
  const int64_t groups = divide_up(n.rows, group_rows);
  float* const sums =
      static_cast<float*>(thread_scratch<Scratch::call>(static_cast<size_t>(2 * groups * n.features) * sizeof(float)));
  std::fill_n(sums, 2 * groups * n.features, 0.0f);
  parallel_for(groups, threads, [&](int64_t group) {
    float* const own = sums + 2 * group * n.features;
    kernels.norm_backward_rows(n, group * group_rows, std::min(n.rows, (group + 1) * group_rows),
                               n.grad_weight == nullptr ? nullptr : own,
                               n.grad_bias == nullptr ? nullptr : own + n.features);
  });
  const std::pair<float*, int64_t> wanted[] = {{n.grad_weight, 0}, {n.grad_bias, n.features}};
  for (const auto& [out, offset] : wanted)
    for (int64_t group = 0; out != nullptr && group < groups; ++group)
      for (int64_t f = 0; f < n.features; ++f) out[f] += sums[2 * group * n.features + offset + f];
}

namespace {

template <class Work>
void for_moment_blocks(int64_t elements, int threads, const Work& work) {
  const int64_t elements_per_task = kElementsPerTask / kMomentBlock * kMomentBlock;
  parallel_for((elements + elements_per_task - 1) / elements_per_task, threads, [&](int64_t task) {
    const int64_t begin = task * elements_per_task;
    work(begin, std::min(elements, begin + elements_per_task));
  });
}

}  // namespace

void run_adamw(const Kernels& kernels, const AdamW& a, int threads) {
  const auto update = a.probe ? kernels.adamw_probe_elements : kernels.adamw_elements;
  for_moment_blocks(a.elements, threads, [&](int64_t begin, int64_t end) { update(a, begin, end); });
}

void run_encode_moment(const Kernels& kernels, const Moment& m, const float* values, int64_t elements, int threads) {
  for_moment_blocks(elements, threads,
                    [&](int64_t begin, int64_t end) { kernels.encode_moments(m, values, begin, end); });
}

void run_decode_moment(const Kernels& kernels, const Moment& m, float* values, int64_t elements, int threads) {
  for_moment_blocks(elements, threads,
                    [&](int64_t begin, int64_t end) { kernels.decode_moments(m, values, begin, end); });
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
  const SparsePlan plan(p);
  const int64_t entries = p.offsets[p.features], panel = p.source_features * sparse_block_tokens(p);
  const bool has_sums = p.gradients != nullptr;
  const size_t sums_bytes = has_sums ? static_cast<size_t>(plan.groups * entries) * sizeof(float) : 0;
  float* const sums = static_cast<float*>(thread_scratch<Scratch::call>(sums_bytes));
  std::vector<std::atomic<int64_t>> groups_left(static_cast<size_t>(plan.ranges));
  for (std::atomic<int64_t>& left : groups_left) left.store(plan.groups);

  parallel_for(plan.groups * plan.ranges, static_cast<int>(plan.threads), [&](int64_t task) {
    const int64_t group = task / plan.ranges, range = task % plan.ranges;
    const int64_t begin = range * plan.range, end = std::min(p.features, begin + plan.range);
    const int64_t first = group * plan.group_blocks, last = std::min(plan.blocks, first + plan.group_blocks);
    const int64_t values = p.order == nullptr ? 0 : p.offsets[end] - p.offsets[begin];
    SparseScratch scratch;
    scratch.panel =
        static_cast<float*>(thread_scratch<Scratch::task>(static_cast<size_t>(panel + values) * sizeof(float)));
    scratch.values = scratch.panel + panel;
    scratch.sums = sums + group * entries;
    kernels.sparse_blocks(p, scratch, first, last, begin, end);
    // the group that is done last adds up all, in their order
    if (groups_left[static_cast<size_t>(range)].fetch_sub(1) == 1 && has_sums)
      kernels.sparse_gradients(p, sums, plan.groups, begin, end);
  });
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
