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

// What a gated block puts its gate through; gelu_tanh is the approximation of gelu by tanh.
enum class Activation : int { silu = 0, gelu_tanh = 1, gelu = 2 };

// out = activation(gate) * up, and its gradients; all tensors are contiguous, of one dtype and size. A result whose
// pointer is null is not wanted. Results may be written over operands, element by element: out over any of them, a
// gradient over its own operand.
struct SiluMul {
  Activation activation = Activation::silu;
  const void* gate = nullptr;
  const void* up = nullptr;
  void* out = nullptr;
  const void* grad = nullptr;
  void* grad_gate = nullptr;
  void* grad_up = nullptr;
  DType dtype = DType::float32;
  int64_t elements = 0;
};

// Rows of one dtype, normalised; features lie next to each other. Where there is a residual, total = x + residual is
// written and normalised instead of x. mean null: the mean is not subtracted. weight or bias null: there is none.
struct Norm {
  const void* x = nullptr;
  int64_t x_stride = 0;
  const void* residual = nullptr;
  int64_t residual_stride = 0;
  const float* weight = nullptr;
  const float* bias = nullptr;
  void* y = nullptr;  // contiguous, as total
  void* total = nullptr;
  float* mean = nullptr;  // of each row
  float* rstd = nullptr;
  DType dtype = DType::float32;
  int64_t rows = 0, features = 0;
  float eps = 0, weight_offset = 0;
  bool round_first = false;
};

// grad_x = the gradient of what was normalised, and grad_total added where there is one. A gradient whose pointer is
// null is not wanted.
struct NormBackward {
  const void* grad = nullptr;
  int64_t grad_stride = 0;
  const void* grad_total = nullptr;
  int64_t grad_total_stride = 0;
  const void* total = nullptr;
  int64_t total_stride = 0;
  const float* weight = nullptr;
  const float* mean = nullptr;
  const float* rstd = nullptr;
  void* grad_x = nullptr;  // contiguous
  float* grad_weight = nullptr;
  float* grad_bias = nullptr;
  DType dtype = DType::float32;
  int64_t rows = 0, features = 0;
  float weight_offset = 0;
};

// Queries or keys, [batch, heads, tokens, head_dim]: the numbers of a head lie next to each other.
struct RotaryStates {
  const void* x = nullptr;
  void* out = nullptr;
  int64_t heads = 0;
  int64_t strides[3] = {}, out_strides[3] = {};  // of batch, heads, tokens
};

// All states turned by the same angles, or back (`inverse`). Cosines and sines are [batch, tokens, rotary_dim].
struct Rotary {
  const RotaryStates* states = nullptr;
  int64_t state_count = 0;
  const void* cos = nullptr;
  const void* sin = nullptr;
  int64_t cos_strides[2] = {}, sin_strides[2] = {};
  DType dtype = DType::float32;
  DType angle_dtype = DType::float32;
  int64_t batch = 0, tokens = 0, head_dim = 0, rotary_dim = 0;
  bool interleaved = false;
  bool inverse = false;
};

// [batch, heads, tokens, head_dim]: the numbers of a head lie next to each other.
struct AttentionTensor {
  void* data = nullptr;
  int64_t strides[3] = {};  // of batch, heads, tokens
};

// [batch, heads, queries, keys]: what is added to scores, or one byte each, 0 where a key is not seen.
struct AttentionMask {
  const void* data = nullptr;  // null: there is none
  bool boolean = false;
  DType dtype = DType::float32;
  int64_t strides[4] = {};
};

// Scaled dot-product attention and its gradients; peftkern/ops/attention.py has the formulas. `heads` of queries share
// `kv_heads` of keys and values. A gradient whose pointer is null is not wanted.
struct Attention {
  AttentionTensor query, key, value, out;
  AttentionTensor grad_out, grad_query, grad_key, grad_value;
  AttentionMask mask;
  float* logsumexp = nullptr;  // [batch, heads, queries]
  DType dtype = DType::float32;
  int64_t batch = 0, heads = 0, kv_heads = 0, queries = 0, keys = 0, head_dim = 0;
  float scale = 1;
  bool causal = false;  // a query sees the keys up to its own place
};

// The queries of all heads that share keys are rows: those of one place follow each other, so that the rows of a group
// end at nearly the same key. The gradients of keys and values are summed over groups, in their order, in as many parts
// as `attention_parts` says; neither may depend on the number of threads.
constexpr int64_t kAttentionHeadDim = 256;  // the largest
constexpr int64_t kAttentionRows = 128;     // of a group
constexpr int64_t kAttentionTasks = 8;      // that a backward pass is cut into where there are too few heads

static inline int64_t attention_rows(const Attention& a) { return a.heads / a.kv_heads * a.queries; }
static inline int64_t attention_groups(const Attention& a) {
  return (attention_rows(a) + kAttentionRows - 1) / kAttentionRows;
}
static inline int64_t attention_parts(const Attention& a) {
  const int64_t heads = a.batch * a.kv_heads, parts = (kAttentionTasks + heads - 1) / heads;
  const int64_t groups = attention_groups(a);
  return parts < groups ? parts : groups;
}
// Floats from a token to the next in scratch memory: whole vectors, whatever their width.
static inline int64_t attention_width(const Attention& a) { return (a.head_dim + 31) / 32 * 32; }
// Floats of one part: what the gradients of a head's keys and values are summed in.
static inline int64_t attention_sums(const Attention& a) { return 2 * a.keys * attention_width(a); }

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

// Of one thread, but `sums` of one group of blocks of tokens.
struct SparseScratch {
  float* panel = nullptr;   // the source of one block of tokens, [source_features][tokens of a block]
  float* values = nullptr;  // of a range of features, where there is an order
  float* sums = nullptr;    // [entries] in this order: the gradients, of the group's tokens alone
};

// Tokens of a block. It decides in which order gradients are summed, and so must not depend on the number of threads.
static inline int64_t sparse_block_tokens(const SparseProduct& p) {
  constexpr int64_t kFewestBlockTokens = 4, kMostBlockTokens = 32;
  int64_t width = kFewestBlockTokens;
  while (width < p.tokens && width < kMostBlockTokens) width *= 2;
  return width;
}

// Ranges of features begin at multiples of it, which are multiples of every vector.
constexpr int64_t kSparseStep = 16;

constexpr int64_t kMomentBlock = 256;  // entries that share the scale of an 8-bit moment
constexpr int kMomentCellShift = 16;   // bits of a float below those that say which cell it is in

// A moment: floats, or codes where there is `absmax`. To encode, the magnitude's upper bits, less those of the first
// cell, give the bounds that are below the cell; one bound more may be in it.
struct Moment {
  void* data = nullptr;            // null: all are 0, which a probe may ask for
  float* absmax = nullptr;         // of each block
  const float* values = nullptr;   // of the 256 codes
  const float* bounds = nullptr;   // ascending, and infinity
  const uint8_t* cells = nullptr;  // last_cell + 1 counts
  int32_t first_cell = 0;
  int32_t last_cell = 0;
  bool has_sign = false;
};

// One update in place; peftkern/ops/adamw.py says what is computed. All tensors are contiguous. The update is
// multiplied by `row_scales` or by `mask` where there is one, by `scale` otherwise. A probe leaves moments and ages as
// they are, and writes what the parameter was where the gradient is, which has the parameter's dtype.
struct AdamW {
  bool probe = false;
  void* parameter = nullptr;
  DType parameter_dtype = DType::float32;
  void* gradient = nullptr;
  DType gradient_dtype = DType::float32;
  int64_t elements = 0;
  Moment mean, square;
  float lr = 0, mean_weight = 0, square_decay = 0, square_weight = 0, eps = 0, decay = 0;
  float mean_correction = 1, root_correction = 1;
  int32_t* age = nullptr;              // updates of each entry; null: all have the corrections above
  const float* corrections = nullptr;  // pairs, by age
  int32_t last_age = 0;
  float scale = 1;
  const float* row_scales = nullptr;
  const uint8_t* mask = nullptr;  // rows of bits, each a whole number of bytes
  int64_t columns = 0;            // entries of a row
};

// Scores of one tensor; peftkern/ops/select_top.py says what they are, and how a key orders as its score does.
enum class Score : int32_t { magnitude = 0, value = 1, difference = 2, product = 3, outer = 4 };

struct Scores {
  Score score = Score::magnitude;
  const void* a = nullptr;
  DType a_dtype = DType::float32;
  const void* other = nullptr;  // null where the score takes none
  DType other_dtype = DType::float32;
  int64_t columns = 0;  // outer: elements of `other`
  int64_t elements = 0;
  const int64_t* exclude = nullptr;  // strictly ascending elements, whose key is 0
  int64_t exclude_count = 0;
};

constexpr int64_t kScoreBuckets = 2048;

// Some bits of a key; only the keys count whose bits above these are the prefix.
struct Digit {
  int shift = 0;
  int bits = 0;
  uint32_t prefix = 0;
};

// Terms of importance; peftkern/ops/importance.py says what they are. All tensors are contiguous.
enum class Term : int32_t { sum = 0, square = 1, product = 2, difference = 3 };

struct Importance {
  Term term = Term::sum;
  const void* gradient = nullptr;
  DType gradient_dtype = DType::float32;
  const void* other = nullptr;
  DType other_dtype = DType::float32;
  const void* saved = nullptr;  // difference: what `other` was, of its dtype
  int64_t rows = 0, columns = 0;
};

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
  void (*rotary_rows)(const Rotary&, int64_t begin, int64_t end);
  size_t (*attention_scratch)(const Attention&, bool backward);  // bytes that each thread needs
  // One group of one of batch * kv_heads.
  void (*attention_group)(const Attention&, int64_t head, int64_t group, void* scratch);
  // The groups of one part. Writes grad_query, and adds to the sums.
  void (*attention_backward_part)(const Attention&, int64_t head, int64_t part, void* scratch, float* sums);
  // grad_key and grad_value of a head, from the sums of all parts, which follow each other.
  void (*attention_gradients)(const Attention&, int64_t head, const float* sums);
  void (*norm_rows)(const Norm&, int64_t begin, int64_t end);
  // Adds to the sums of these rows' gradients of weight and bias, [features] each; null where they are not wanted.
  void (*norm_backward_rows)(const NormBackward&, int64_t begin, int64_t end, float* weight_sums, float* bias_sums);
  // Blocks of tokens [first, last) and features of the target [begin, end), begin being a multiple of kSparseStep.
  void (*sparse_blocks)(const SparseProduct&, const SparseScratch&, int64_t first, int64_t last, int64_t begin,
                        int64_t end);
  // The gradients of these features' entries from the sums of all groups, [groups][entries].
  void (*sparse_gradients)(const SparseProduct&, const float* sums, int64_t groups, int64_t begin, int64_t end);
  void (*adamw_elements)(const AdamW&, int64_t begin, int64_t end);
  // A moment's codes from floats, and floats from its codes; `begin` is a multiple of the block.
  void (*encode_moments)(const Moment&, const float* values, int64_t begin, int64_t end);
  void (*decode_moments)(const Moment&, float* values, int64_t begin, int64_t end);
  void (*adamw_probe_elements)(const AdamW&, int64_t begin, int64_t end);
  void (*score_counts)(const Scores&, const Digit&, int64_t begin, int64_t end, int64_t* counts);
  void (*score_compare)(const Scores&, uint32_t key, int64_t begin, int64_t end, int64_t* above, int64_t* equal);
  void (*score_collect)(const Scores&, uint32_t key, int64_t ties, int64_t begin, int64_t end, int64_t* out);
  void (*add_importance)(const Importance&, float* total, int64_t begin, int64_t end);
  double (*sum_importance)(const Importance&, int64_t begin, int64_t end);
};

}  // namespace peftkern::cpu
