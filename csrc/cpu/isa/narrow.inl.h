// Products with a factor of a low-rank adapter, whose rank is too small to make packing worth while. Both operands are
// read as they lie, by tiles that keep the sums of a rank of 16 in registers:
//   inner: out[t, r] = alpha * sum_f x[t, f] * factor[r, f]. The lanes run over f and are added up at the end (h, g).
//   outer: out[r, f] = alpha * sum_t left[t, r] * x[t, f]. The lanes run over f; left is read along its rows (dA, dB).
// Float32 operands in the float32 form; bfloat16 ones, of which a lane takes two terms, in the bfloat16 form.
// What does not fit (other ranks, dropout, masks, odd sizes) is a product like any other.
#pragma once

#ifdef PEFTKERN_VECTOR_FORMS
constexpr int64_t kMostNarrow = 32;       // a larger rank is as well served by panels
constexpr int64_t kNarrowStep = 8;        // ranks are multiples of it
constexpr int64_t kNarrowTokens = 64;     // few tokens are read in one tile of panels
constexpr int64_t kMostFactor = 1 << 18;  // elements of a factor, which every task may have to turn: 1 MB of scratch
constexpr int64_t kInnerTokensPerTask = 32;
constexpr int64_t kOuterBlock = 256;              // tokens whose sum is added to the total at once
constexpr int kInnerRows = 4, kInnerColumns = 4;  // 16 accumulators, whose lanes one `sum_lanes` adds up
static_assert(kInnerRows * kInnerColumns == kLanes);

enum class Narrow { no, inner, outer };

static bool plain(const Product& p) {
  return !weight_quantized(p.weight) && p.weight.mask.bits == nullptr && p.low_rank_count == 0 && p.bias == nullptr &&
         p.out_mask.bits == nullptr && p.out_dtype == DType::float32 && !dropout_active(p.activations.dropout) &&
         !dropout_active(p.weight_dropout);
}

static Narrow narrow_kind(const Product& p) {
  if (!plain(p) || p.precision == Precision::float16) return Narrow::no;
  const Activations& a = p.activations;
  const int64_t outputs = product_outputs(p), features = product_features(p);
  const DType operand = p.precision == Precision::bfloat16 ? DType::bfloat16 : DType::float32;
  const int64_t terms = p.precision == Precision::bfloat16 ? 2 : 1;
  const DType weight = static_cast<DType>(p.weight.encoding);
  const auto fits = [](int64_t rank, int64_t tokens) {
    return rank <= kMostNarrow && rank % kNarrowStep == 0 && tokens >= kNarrowTokens;
  };
  if (a.feature_stride == 1 && a.dtype == operand && weight == (p.transposed ? DType::float32 : operand) &&
      fits(outputs, p.tokens) && features % (kLanes * terms) == 0 && outputs * features <= kMostFactor)
    return Narrow::inner;
  if (p.transposed && a.token_stride == 1 && a.dtype == DType::float32 && weight == operand &&
      fits(p.tokens, features) && outputs % kLanes == 0 && features % terms == 0)
    return Narrow::outer;
  return Narrow::no;
}

struct Float32Terms {
  static constexpr Precision kForm = Precision::float32;
  static inline Float load_along(const float* row) { return load(row); }
  static inline Float multiply(Float a, Float b, Float sum) { return fma(a, b, sum); }
  static inline Float load_across(const float* row, int64_t) { return load(row); }
  static inline Float spread(const float* left) { return broadcast(*left); }
  static inline Int turned(const float* rows, int64_t, __mmask16 lanes) {
    return as_int(_mm512_maskz_loadu_ps(lanes, rows));
  }
  using Element = float;
};

struct Bfloat16Terms {
  static constexpr Precision kForm = Precision::bfloat16;
  static inline Int load_along(const uint16_t* row) { return load_int(row); }
  static inline Float multiply(Int a, Int b, Float sum) { return dot_bfloat16(a, b, sum); }
  // One row in the low halves and the next in the high ones.
  static inline Int load_across(const uint16_t* row, int64_t stride) {
    return _mm512_or_si512(expand_words(row), shift_left<16>(expand_words(row + stride)));
  }
  static inline Int turned(const float* rows, int64_t stride, __mmask16 lanes) {
    return pair_bfloat16(_mm512_maskz_loadu_ps(lanes, rows), _mm512_maskz_loadu_ps(lanes, rows + stride));
  }
  static inline Int spread(const float* left) { return _mm512_set1_epi32(static_cast<int>(float_bits(*left))); }
  using Element = uint16_t;
};

// ---- inner

template <class Terms>
static void inner_tile(const typename Terms::Element* const* rows, const typename Terms::Element* factor,
                       int64_t factor_stride, int64_t features, float* sums) {
  constexpr int64_t kStep = kLanes * (sizeof(float) / sizeof(typename Terms::Element));
  Float tile[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) tile[i] = zero();
  for (int64_t f = 0; f < features; f += kStep) {
#pragma GCC unroll 4
    for (int column = 0; column < kInnerColumns; ++column) {
      const auto value = Terms::load_along(factor + column * factor_stride + f);
#pragma GCC unroll 4
      for (int row = 0; row < kInnerRows; ++row) {
        Float& sum = tile[row * kInnerColumns + column];
        sum = Terms::multiply(Terms::load_along(rows[row] + f), value, sum);
      }
    }
  }
  store(sums, sum_lanes(tile));
}

// A factor [features, rank] as the tiles read it, [rank][features], in the form of the other operand.
template <class Terms>
static void turn_factor(const Weight& weight, typename Terms::Element* turned) {
  constexpr int64_t kTerms = sizeof(float) / sizeof(typename Terms::Element);
  const float* factor = static_cast<const float*>(weight.data);
  const int64_t stride = weight.row_stride;
  for (int64_t r = 0; r < weight.columns; r += kLanes) {
    const int64_t ranks = minimum(kLanes, weight.columns - r);
    const __mmask16 lanes = static_cast<__mmask16>((1u << ranks) - 1);
    for (int64_t f = 0; f < weight.rows; f += kLanes * kTerms) {
      Int block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        block[i] = Terms::turned(factor + (f + i * kTerms) * stride + r, stride, lanes);
      transpose(block);
      for (int64_t i = 0; i < ranks; ++i) store_int(turned + (r + i) * weight.rows + f, block[i]);
    }
  }
}

template <class Terms>
static void inner_tokens(const Product& p, int64_t begin, int64_t end, void* scratch) {
  using Element = typename Terms::Element;
  const Element* x = static_cast<const Element*>(p.activations.data);
  const Element* factor = static_cast<const Element*>(p.weight.data);
  int64_t stride = p.weight.row_stride;
  if (p.transposed) {
    turn_factor<Terms>(p.weight, static_cast<Element*>(scratch));
    factor = static_cast<const Element*>(scratch);
    stride = p.weight.rows;
  }
  for (int64_t token = begin; token < end; token += kInnerRows) {
    const int64_t count = minimum(kInnerRows, end - token);
    const Element* rows[kInnerRows];
    for (int64_t row = 0; row < kInnerRows; ++row)
      rows[row] = x + (token + minimum(row, count - 1)) * p.activations.token_stride;
    for (int64_t column = 0; column < product_outputs(p); column += kInnerColumns) {
      alignas(64) float sums[kLanes];
      inner_tile<Terms>(rows, factor + column * stride, stride, product_features(p), sums);
      for (int64_t row = 0; row < count; ++row) {
        float* out = static_cast<float*>(p.out) + (token + row) * p.out_stride + column;
        for (int i = 0; i < kInnerColumns; ++i) out[i] = p.alpha * sums[row * kInnerColumns + i];
      }
    }
  }
}

// ---- outer

template <class Terms, int kRows>
static void outer_tile(const float* left, int64_t left_stride, const typename Terms::Element* right,
                       int64_t right_stride, int64_t steps, float* out, int64_t out_stride, bool accumulate) {
  constexpr int64_t kTerms = sizeof(float) / sizeof(typename Terms::Element);
  Float sums[kRows];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) sums[row] = zero();
  for (int64_t step = 0; step < steps; ++step) {
    const auto value = Terms::load_across(right, right_stride);
    // The next tile's columns: the processor does not foresee steps from row to row.
    for (int64_t term = 0; term < kTerms; ++term) __builtin_prefetch(right + term * right_stride + kLanes * kTerms);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) sums[row] = Terms::multiply(Terms::spread(left + row), value, sums[row]);
    left += left_stride;
    right += kTerms * right_stride;
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    float* place = out + row * out_stride;
    store(place, accumulate ? add(load(place), sums[row]) : sums[row]);
  }
}

// The left operand of a block as the tiles take it: as it lies, or in pairs of tokens.
template <class Terms>
static const float* left_block(const Product& p, int64_t token, int64_t tokens, float* scratch, int64_t* stride) {
  const int64_t left_stride = p.activations.feature_stride;
  const float* left = static_cast<const float*>(p.activations.data) + token * left_stride;
  *stride = left_stride;
  if constexpr (Terms::kForm == Precision::float32) return left;
  for (int64_t pair = 0; pair < tokens / 2; ++pair, left += 2 * left_stride)
    for (int64_t row = 0; row < p.tokens; row += kNarrowStep) {
      const __m512 both = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(left + row)),
                                             _mm256_loadu_ps(left + left_stride + row), 1);
      const __m512 high = _mm512_shuffle_f32x4(both, both, 0xEE);
      const __m512i pairs = pair_bfloat16(both, high);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(scratch + pair * p.tokens + row), _mm512_castsi512_si256(pairs));
    }
  *stride = p.tokens;
  return scratch;
}

template <class Terms>
static void outer_columns(const Product& p, int64_t begin, int64_t end, float* scratch) {
  using Element = typename Terms::Element;
  constexpr int64_t kTerms = sizeof(float) / sizeof(Element);
  const int64_t stride = p.weight.row_stride;
  for (int64_t token = 0; token < p.weight.rows; token += kOuterBlock) {
    const int64_t tokens = minimum(kOuterBlock, p.weight.rows - token);
    int64_t left_stride;
    const float* left = left_block<Terms>(p, token, tokens, scratch, &left_stride);
    const Element* right = static_cast<const Element*>(p.weight.data) + token * stride;
    for (int64_t column = begin; column < end; column += kLanes)
      for (int64_t row = 0; row < p.tokens;) {
        float* out = static_cast<float*>(p.out) + row * p.out_stride + column;
        const auto tile = p.tokens - row >= 16 ? outer_tile<Terms, 16> : outer_tile<Terms, kNarrowStep>;
        tile(left + row, left_stride, right + column, stride, tokens / kTerms, out, p.out_stride, token > 0);
        row += p.tokens - row >= 16 ? 16 : kNarrowStep;
      }
  }
  if (p.alpha == 1.0f) return;
  for (int64_t row = 0; row < p.tokens; ++row)
    for (int64_t column = begin; column < end; ++column)
      static_cast<float*>(p.out)[row * p.out_stride + column] *= p.alpha;
}

// ---- tasks

static int64_t narrow_tasks(const Product& p, Narrow kind) {
  const int64_t wanted = kTasksPerThread * p.threads;
  const int64_t most = kind == Narrow::inner ? p.tokens / kInnerTokensPerTask : p.weight.columns / kLanes;
  return minimum(wanted, most);
}

static size_t narrow_scratch(const Product& p, Narrow kind) {
  const int64_t turned = p.transposed ? product_outputs(p) * product_features(p) : 0;
  return static_cast<size_t>(kind == Narrow::inner ? turned : kOuterBlock / 2 * kMostNarrow) * sizeof(float);
}

static void narrow_task(const Product& p, Narrow kind, int64_t task, void* scratch) {
  const bool pairs = p.precision == Precision::bfloat16;
  const int64_t tasks = narrow_tasks(p, kind);
  if (kind == Narrow::inner) {
    const int64_t begin = task * p.tokens / tasks, end = (task + 1) * p.tokens / tasks;
    return pairs ? inner_tokens<Bfloat16Terms>(p, begin, end, scratch)
                 : inner_tokens<Float32Terms>(p, begin, end, scratch);
  }
  const int64_t vectors = p.weight.columns / kLanes;
  const int64_t begin = task * vectors / tasks * kLanes, end = (task + 1) * vectors / tasks * kLanes;
  float* floats = static_cast<float*>(scratch);
  return pairs ? outer_columns<Bfloat16Terms>(p, begin, end, floats)
               : outer_columns<Float32Terms>(p, begin, end, floats);
}
#endif
