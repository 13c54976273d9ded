// What an instruction set offers. Every file in isa/ fills one table from the same sources; dispatch.cpp picks one.
#pragma once
#include <cstddef>
#include <cstdint>

#include "peftkern/dropout.h"
#include "peftkern/number.h"
#include "peftkern/quantization.h"
#include "peftkern/weight.h"

namespace peftkern::cpu {

enum class Precision : int32_t {
  float32 = 0,   // float32 operands and sums
  bfloat16 = 1,  // operands rounded to bfloat16 (denormals to zero), sums in float32
  float16 = 2,   // operands rounded to float16, sums in float16 over 64 terms, then in float32
};

// Activations, [tokens, features]. Element (t, f) is at t * token_stride + f * feature_stride.
struct Activations {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t token_stride = 0;
  int64_t feature_stride = 1;
  Dropout dropout;
};

// Low-rank terms that the product adds in the same accumulators: out += factor(left * right).
// left [tokens, rank] float; right is [outputs, rank] where the weight is reduced along its columns, and
// [rank, outputs] where it is reduced along its rows. With dropout the term is masked before it is added.
struct LowRank {
  const float* left = nullptr;
  int64_t left_stride = 0;
  const float* right = nullptr;
  int64_t right_stride = 0;
  int64_t rank = 0;
  Dropout dropout;
};

// out[t, o] = alpha * (sum_f activations[t, f] * W(o, f) + low-rank terms) + bias[o]
// with W(o, f) = weight[o, f], or weight[f, o] when `transposed`; zero where `out_mask` does not keep it.
struct Product {
  Activations activations;
  Weight weight;
  Dropout weight_dropout;  // of a dense weight, rows being tokens (the x of dA)
  bool transposed = false;
  int64_t tokens = 0;
  float alpha = 1.0f;
  const LowRank* low_rank = nullptr;
  int64_t low_rank_count = 0;
  const float* bias = nullptr;
  void* out = nullptr;
  DType out_dtype = DType::float32;
  int64_t out_stride = 0;
  BitMask out_mask;
  Precision precision = Precision::float32;
  int threads = 1;
};

static inline int64_t product_outputs(const Product& p) { return p.transposed ? p.weight.columns : p.weight.rows; }
static inline int64_t product_features(const Product& p) { return p.transposed ? p.weight.rows : p.weight.columns; }

// Values to codes; peftkern/ops/quantize.py says how. Blocks are `block_size` consecutive elements; rows for int8.
struct Quantization {
  const void* values = nullptr;
  DType dtype = DType::float32;
  int64_t elements = 0;
  int64_t block_size = 0;
  Encoding encoding = Encoding::code4;
  const float* bounds = nullptr;   // code4: 15 ascending bounds between codes
  const uint8_t* codes = nullptr;  // code4: the code of each of the 16 intervals
  const uint8_t* grid = nullptr;   // code8: the code of each of 65536 points from -1 to 1
  uint8_t* packed = nullptr;
  float* scales = nullptr;
};

// Codes to values; the weight counts as one row of `elements`.
struct Dequantization {
  Weight weight;
  int64_t elements = 0;
  int64_t block_size = 0;
  void* out = nullptr;
  DType dtype = DType::float32;
};

// out = silu(gate) * up, and its gradients; all tensors are contiguous, of one dtype and size. A gradient whose pointer
// is null is not wanted.
struct SiluMul {
  const void* gate = nullptr;
  const void* up = nullptr;
  void* out = nullptr;
  const void* grad = nullptr;
  void* grad_gate = nullptr;
  void* grad_up = nullptr;
  DType dtype = DType::float32;
  int64_t elements = 0;
};

// Activations, or what is added to, [tokens, features]: features lie next to each other.
struct TokenRows {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t token_stride = 0;
};

// A sparse matrix in one of its orders: feature f of the target owns the entries from offsets[f] to offsets[f + 1], and
// entry e takes feature others[e] of the source. Its value is values[e], or values[order[e]] where there is an order.
//   target[t, f] += scaling * sum_e values[e] * source[t, others[e]]    unless target.data is null
//   gradients[order[e]] = scaling * sum_t pair[t, f] * source[t, others[e]]    unless gradients is null
struct SparseProduct {
  TokenRows source;
  TokenRows target;
  TokenRows pair;
  int64_t tokens = 0;
  int64_t source_features = 0;
  int64_t features = 0;                     // of the target and of the pair
  const int64_t* source_offsets = nullptr;  // of the other order: which features of the source have an entry
  const int64_t* offsets = nullptr;
  const int32_t* others = nullptr;
  const int32_t* order = nullptr;
  const float* values = nullptr;
  float* gradients = nullptr;
  float scaling = 1.0f;
  int threads = 1;
};

struct SparseScratch {
  float* panels = nullptr;  // the source of some blocks of tokens, [blocks][source_features][tokens of a block]
  float* values = nullptr;  // in this order, where there is an order
  float* sums = nullptr;    // the gradients in this order, of the blocks that are done
};

// Tokens of a block. It decides in which order gradients are summed, and so must not depend on the number of threads.
static inline int64_t sparse_block_tokens(const SparseProduct& p) {
  constexpr int64_t kMostBlockTokens = 32;
  int64_t width = 1;
  while (width < p.tokens && width < kMostBlockTokens) width *= 2;
  return width;
}

// Ranges of features begin at multiples of it, which are multiples of every vector.
constexpr int64_t kSparseStep = 16;

struct Kernels {
  // Whether a form uses an instruction of the processor. Where not, the AVX-512 builds emulate it, for tests, and the
  // others run float32.
  bool native_bfloat16;
  bool native_float16;
  size_t (*product_scratch)(const Product&);  // bytes that each thread needs
  int64_t (*product_tasks)(const Product&);
  void (*product_task)(const Product&, int64_t task, void* scratch);
  void (*quantize_blocks)(const Quantization&, int64_t begin, int64_t end);
  void (*dequantize_blocks)(const Dequantization&, int64_t begin, int64_t end);
  void (*silu_mul_elements)(const SiluMul&, int64_t begin, int64_t end);
  void (*silu_mul_backward_elements)(const SiluMul&, int64_t begin, int64_t end);
  // Features of the source, from a multiple of kSparseStep on, into the panel of one block of tokens.
  void (*sparse_fill_panel)(const SparseProduct&, int64_t block, int64_t begin, int64_t end, float* panel);
  // Features of the target, likewise, for `count` blocks of tokens from `first` on, whose panels are filled.
  void (*sparse_blocks)(const SparseProduct&, const SparseScratch&, int64_t first, int64_t count, int64_t begin,
                        int64_t end);
};

}  // namespace peftkern::cpu
