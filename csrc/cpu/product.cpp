#include "cpu/product.h"

#include <cstdlib>
#include <memory>
#include <new>

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

}  // namespace

void run_product(const Kernels& kernels, const Product& p) {
  const size_t scratch = kernels.product_scratch(p);
  parallel_for(kernels.product_tasks(p), p.threads,
               [&](int64_t task, int) { kernels.product_task(p, task, thread_scratch(scratch)); });
}

}  // namespace peftkern::cpu
