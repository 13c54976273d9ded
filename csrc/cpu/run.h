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
void run_rotary(const Kernels& kernels, const Rotary& r, int threads);
void run_attention(const Kernels& kernels, const Attention& a, int threads);
void run_attention_backward(const Kernels& kernels, const Attention& a, int threads);
void run_norm(const Kernels& kernels, const Norm& n, int threads);
void run_norm_backward(const Kernels& kernels, const NormBackward& n, int threads);
void run_sparse_product(const Kernels& kernels, const SparseProduct& p);  // on p.threads threads
void run_adamw(const Kernels& kernels, const AdamW& a, int threads);
void run_encode_moment(const Kernels& kernels, const Moment& m, const float* values, int64_t elements, int threads);
void run_decode_moment(const Kernels& kernels, const Moment& m, float* values, int64_t elements, int threads);
// Adds to kScoreBuckets counts.
void run_score_histogram(const Kernels& kernels, const Scores& s, const Digit& digit, int64_t* counts, int threads);
// Writes `count` ascending indices: the keys above `key`, and the first `ties` that equal it. Throws where there are
// more or fewer, which a tensor that changes meanwhile makes.
void run_score_collect(const Kernels& kernels, const Scores& s, uint32_t key, int64_t ties, int64_t* out, int64_t count,
                       int threads);
// Adds the terms to totals of their own.
void run_add_importance(const Kernels& kernels, const Importance& p, float* total, int threads);
// Writes the sum of each row.
void run_sum_importance(const Kernels& kernels, const Importance& p, double* sums, int threads);

// Asks the system for huge pages under a large buffer that is about to be written as a whole: the page faults of fresh
// memory then cost a few hundred calls instead of tens of thousands. A hint; does nothing where there is no such thing.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace peftkern::cpu
