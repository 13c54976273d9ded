// Splits an operation into tasks and runs them on several threads.
#pragma once
#include "cpu/kernels.h"

namespace peftkern::cpu {

// On p.threads threads.
void run_product(const Kernels& kernels, const Product& p);
void run_quantization(const Kernels& kernels, const Quantization& q, int threads);
void run_dequantization(const Kernels& kernels, const Dequantization& d, int threads);
void run_silu_mul(const Kernels& kernels, const SiluMul& s, int threads);
void run_silu_mul_backward(const Kernels& kernels, const SiluMul& s, int threads);
void run_sparse_product(const Kernels& kernels, const SparseProduct& p);  // on p.threads threads

// Asks the system for huge pages under a large buffer that is about to be written as a whole: the page faults of fresh
// memory then cost a few hundred calls instead of tens of thousands. A hint; does nothing where there is no such thing.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace peftkern::cpu
