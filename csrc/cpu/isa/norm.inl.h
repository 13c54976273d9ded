// Normalisation of rows and its gradients; peftkern/ops/norm.py has the formulas. A few rows together are walked from
// end to end, vector by vector, once for each sum that the next walk needs: only the first walk finds them outside the
// caches. Weights are read, and their gradients added to, once for all rows of a walk.
#pragma once

// A vector of a row from feature `at` on: all lanes, or the first `count`, where others are neither read nor written.
struct AllLanes {
  int64_t at;
};
struct FirstLanes {
  int64_t at, count;
};

template <DType kDType>
static inline Float read_vector(const void* row, AllLanes v, float = 0.0f) {
  return load_elements<kDType>(row, v.at);
}

// `rest` in the lanes that are not read.
template <DType kDType>
static inline Float read_vector(const void* row, FirstLanes v, float rest = 0.0f) {
  alignas(64) float values[kLanes];
  for (float& value : values) value = rest;
  read_floats(row, kDType, v.at, v.count, values);
  return load(values);
}

template <DType kDType>
static inline void write_vector(void* row, AllLanes v, Float values) {
  store_elements<kDType>(row, v.at, values);
}

template <DType kDType>
static inline void write_vector(void* row, FirstLanes v, Float values) {
  alignas(64) float buffer[kLanes];
  store(buffer, values);
  write_floats(row, kDType, v.at, v.count, buffer);
}

template <DType kDType>
static inline Float round_vector(Float values) {
  if constexpr (kDType == DType::float32) return values;
  uint16_t halves[kLanes];
  store_elements<kDType>(halves, 0, values);
  return load_elements<kDType>(halves, 0);
}

// work(vector, chain), with chain below kChains; a chain's vectors follow each other in time.
template <int kChains, class Work>
static inline void for_vectors(int64_t features, const Work& work) {
  int64_t f = 0;
  for (; f + kChains * kLanes <= features; f += kChains * kLanes) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) work(AllLanes{f + chain * kLanes}, chain);
  }
  for (; f + kLanes <= features; f += kLanes) work(AllLanes{f}, 0);
  if (f < features) work(FirstLanes{f, features - f}, 0);
}

#define PEFTKERN_INLINE __attribute__((always_inline))  // of the body of a loop, for its sums to stay in registers

constexpr int64_t kNormBytes = 6 * 1024;  // of several rows of one tensor: those of four tensors fit the L1 cache

// How many rows are walked together, and of how many chains of additions the sum of each is made: several hide how long
// an addition takes, as several rows do. A row's chains do not depend on the rows beside it.
template <int kRowsTogether, int kChainsOfRow>
struct Walk {
  static constexpr int kRows = kRowsTogether, kChains = kChainsOfRow;
};

template <class W>
struct RowSums {
  Float parts[W::kRows][W::kChains];

  RowSums() {
    for (auto& row : parts)
      for (Float& part : row) part = zero();
  }

  float of(int row) const {
    Float sum = parts[row][0];
    for (int chain = 1; chain < W::kChains; ++chain) sum = add(sum, parts[row][chain]);
    return sum_of(sum);
  }
};

template <DType kDType>
constexpr int64_t kElementBytes = kDType == DType::float32 ? 4 : 2;

template <DType kDType, int kRows>
struct RowsOf {
  char* at[kRows] = {};

  RowsOf(const void* data, int64_t stride, int64_t first) {
    if (data == nullptr) return;
    for (int r = 0; r < kRows; ++r)
      at[r] = static_cast<char*>(const_cast<void*>(data)) + (first + r) * stride * kElementBytes<kDType>;
  }
};

template <DType kDType>
static bool rows_are_short(int64_t features) {
  return 4 * features * kElementBytes<kDType> <= kNormBytes;
}

// Calls work(first row, walk) for all rows.
template <class Work>
static void for_norm_rows(int64_t begin, int64_t end, bool together, const Work& work) {
  int64_t row = begin;
  for (; together && row + 4 <= end; row += 4) work(row, Walk<4, 1>());
  for (; together && row < end; ++row) work(row, Walk<1, 1>());
  for (; row < end; ++row) work(row, Walk<1, 4>());
}

// The sums of the rows, or of their squares.
template <DType kDType, class W>
static inline RowSums<W> sum_rows(RowsOf<kDType, W::kRows> rows, int64_t features, bool squares) {
  RowSums<W> sums;
  for_vectors<W::kChains>(features, [&](auto v, int chain) PEFTKERN_INLINE {
#pragma GCC unroll 4
    for (int r = 0; r < W::kRows; ++r) {
      const Float value = read_vector<kDType>(rows.at[r], v);
      Float& sum = sums.parts[r][chain];
      sum = squares ? fma(value, value, sum) : add(sum, value);
    }
  });
  return sums;
}

// total = x + residual, rounded; and as sum_rows of it.
template <DType kDType, class W>
static inline RowSums<W> add_residual(RowsOf<kDType, W::kRows> x, RowsOf<kDType, W::kRows> residual,
                                      RowsOf<kDType, W::kRows> total, int64_t features, bool squares) {
  RowSums<W> sums;
  for_vectors<W::kChains>(features, [&](auto v, int chain) PEFTKERN_INLINE {
#pragma GCC unroll 4
    for (int r = 0; r < W::kRows; ++r) {
      write_vector<kDType>(total.at[r], v,
                           add(read_vector<kDType>(x.at[r], v), read_vector<kDType>(residual.at[r], v)));
      const Float value = read_vector<kDType>(total.at[r], v);
      Float& sum = sums.parts[r][chain];
      sum = squares ? fma(value, value, sum) : add(sum, value);
    }
  });
  return sums;
}

// The squares of what is left of the rows without their means.
template <DType kDType, class W>
static inline RowSums<W> sum_centered_squares(RowsOf<kDType, W::kRows> rows, const float* means, int64_t features) {
  RowSums<W> sums;
  Float shifts[W::kRows];
  for (int r = 0; r < W::kRows; ++r) shifts[r] = broadcast(-means[r]);
  for_vectors<W::kChains>(features, [&](auto v, int chain) PEFTKERN_INLINE {
#pragma GCC unroll 4
    for (int r = 0; r < W::kRows; ++r) {
      const Float centered = add(read_vector<kDType>(rows.at[r], v, means[r]), shifts[r]);
      sums.parts[r][chain] = fma(centered, centered, sums.parts[r][chain]);
    }
  });
  return sums;
}

template <DType kDType, class W>
static inline void normalize_rows(const Norm& n, RowsOf<kDType, W::kRows> rows, const float* means, const float* rstds,
                                  RowsOf<kDType, W::kRows> y) {
  const float* const weight = n.weight;
  const float* const bias = n.bias;
  const bool round_first = n.round_first;
  const Float offset = broadcast(n.weight_offset);
  Float shifts[W::kRows], factors[W::kRows];
  for (int r = 0; r < W::kRows; ++r) {
    shifts[r] = broadcast(-means[r]);
    factors[r] = broadcast(rstds[r]);
  }
  for_vectors<W::kChains>(n.features, [&](auto v, int) PEFTKERN_INLINE {
    const Float scale = weight == nullptr ? broadcast(1.0f) : add(read_vector<DType::float32>(weight, v), offset);
    const Float shift = bias == nullptr ? zero() : read_vector<DType::float32>(bias, v);
#pragma GCC unroll 4
    for (int r = 0; r < W::kRows; ++r) {
      Float normal = mul(add(read_vector<kDType>(rows.at[r], v), shifts[r]), factors[r]);
      if (round_first) normal = round_vector<kDType>(normal);
      write_vector<kDType>(y.at[r], v, fma(normal, scale, shift));
    }
  });
}

template <DType kDType, class W>
static void norm_together(const Norm& n, int64_t first) {
  using Rows = RowsOf<kDType, W::kRows>;
  const bool centered = n.mean != nullptr, adds = n.residual != nullptr;
  const Rows x(n.x, n.x_stride, first), total(n.total, n.features, first), rows = adds ? total : x;
  RowSums<W> sums =
      adds ? add_residual<kDType, W>(x, Rows(n.residual, n.residual_stride, first), total, n.features, !centered)
           : sum_rows<kDType, W>(x, n.features, !centered);
  float means[W::kRows] = {}, rstds[W::kRows];
  if (centered) {
    for (int r = 0; r < W::kRows; ++r) n.mean[first + r] = means[r] = sums.of(r) / static_cast<float>(n.features);
    sums = sum_centered_squares<kDType, W>(rows, means, n.features);
  }
  for (int r = 0; r < W::kRows; ++r)
    n.rstd[first + r] = rstds[r] = 1.0f / __builtin_sqrtf(sums.of(r) / static_cast<float>(n.features) + n.eps);
  normalize_rows<kDType, W>(n, rows, means, rstds, Rows(n.y, n.features, first));
}

template <DType kDType>
static void norm_rows_of(const Norm& n, int64_t begin, int64_t end) {
  // float32 is bound by memory, which gives several rows faster than one after the other, 16-bit types by arithmetic
  const bool together = kDType == DType::float32 || rows_are_short<kDType>(n.features);
  for_norm_rows(begin, end, together,
                [&](int64_t first, auto walk) { norm_together<kDType, decltype(walk)>(n, first); });
}

static void norm_rows(const Norm& n, int64_t begin, int64_t end) {
  switch (n.dtype) {
    case DType::float32:
      return norm_rows_of<DType::float32>(n, begin, end);
    case DType::bfloat16:
      return norm_rows_of<DType::bfloat16>(n, begin, end);
    case DType::float16:
      return norm_rows_of<DType::float16>(n, begin, end);
  }
}

// ---- backward

// What arrives at the normalised values, summed: by itself and times those values, both over the number of features.
template <class W>
struct NormSlopes {
  float means[W::kRows], rstds[W::kRows], sum[W::kRows], along[W::kRows];
};

// The sums over a row, and those over rows that are wanted, to which are added.
template <DType kDType, class W>
static inline void sum_gradients(const NormBackward& n, int64_t first, float* weight_sums, float* bias_sums,
                                 NormSlopes<W>& slopes) {
  const RowsOf<kDType, W::kRows> total(n.total, n.total_stride, first), grad(n.grad, n.grad_stride, first);
  const float* const weight = n.weight;
  const Float offset = broadcast(n.weight_offset);
  RowSums<W> sums, along;
  Float shifts[W::kRows], factors[W::kRows];
  for (int r = 0; r < W::kRows; ++r) {
    shifts[r] = broadcast(-slopes.means[r]);
    factors[r] = broadcast(slopes.rstds[r]);
  }
  for_vectors<W::kChains>(n.features, [&](auto v, int chain) PEFTKERN_INLINE {
    const Float scale = weight == nullptr ? broadcast(1.0f) : add(read_vector<DType::float32>(weight, v), offset);
    Float weight_sum = zero(), bias_sum = zero();
#pragma GCC unroll 4
    for (int r = 0; r < W::kRows; ++r) {
      const Float arriving = read_vector<kDType>(grad.at[r], v), scaled = mul(arriving, scale);
      const Float normal = mul(add(read_vector<kDType>(total.at[r], v), shifts[r]), factors[r]);
      sums.parts[r][chain] = add(sums.parts[r][chain], scaled);
      along.parts[r][chain] = fma(scaled, normal, along.parts[r][chain]);
      weight_sum = fma(arriving, normal, weight_sum);
      bias_sum = add(bias_sum, arriving);
    }
    if (weight_sums != nullptr)
      write_vector<DType::float32>(weight_sums, v, add(read_vector<DType::float32>(weight_sums, v), weight_sum));
    if (bias_sums != nullptr)
      write_vector<DType::float32>(bias_sums, v, add(read_vector<DType::float32>(bias_sums, v), bias_sum));
  });
  for (int r = 0; r < W::kRows; ++r) {
    slopes.sum[r] = n.mean == nullptr ? 0.0f : sums.of(r) / static_cast<float>(n.features);
    slopes.along[r] = along.of(r) / static_cast<float>(n.features);
  }
}

template <DType kDType, class W>
static inline void write_gradients(const NormBackward& n, int64_t first, const NormSlopes<W>& slopes) {
  const RowsOf<kDType, W::kRows> total(n.total, n.total_stride, first), grad(n.grad, n.grad_stride, first);
  const RowsOf<kDType, W::kRows> added(n.grad_total, n.grad_total_stride, first), out(n.grad_x, n.features, first);
  const float* const weight = n.weight;
  const bool adds = n.grad_total != nullptr;
  const Float offset = broadcast(n.weight_offset);
  Float shifts[W::kRows], factors[W::kRows], sums[W::kRows], slants[W::kRows];
  for (int r = 0; r < W::kRows; ++r) {
    shifts[r] = broadcast(-slopes.means[r]);
    factors[r] = broadcast(slopes.rstds[r]);
    sums[r] = broadcast(-slopes.sum[r]);
    slants[r] = broadcast(-slopes.along[r] * slopes.rstds[r]);
  }
  for_vectors<W::kChains>(n.features, [&](auto v, int) PEFTKERN_INLINE {
    const Float scale = weight == nullptr ? broadcast(1.0f) : add(read_vector<DType::float32>(weight, v), offset);
#pragma GCC unroll 4
    for (int r = 0; r < W::kRows; ++r) {
      const Float centered = add(read_vector<kDType>(total.at[r], v), shifts[r]);
      const Float scaled = add(mul(read_vector<kDType>(grad.at[r], v), scale), sums[r]);
      const Float slope = fma(centered, slants[r], scaled);
      write_vector<kDType>(out.at[r], v, fma(slope, factors[r], adds ? read_vector<kDType>(added.at[r], v) : zero()));
    }
  });
}

template <DType kDType>
static void norm_backward_of(const NormBackward& n, int64_t begin, int64_t end, float* weight_sums, float* bias_sums) {
  for_norm_rows(begin, end, rows_are_short<kDType>(n.features), [&](int64_t first, auto walk) {
    using W = decltype(walk);
    NormSlopes<W> slopes;
    for (int r = 0; r < W::kRows; ++r) {
      slopes.means[r] = n.mean == nullptr ? 0.0f : n.mean[first + r];
      slopes.rstds[r] = n.rstd[first + r];
    }
    sum_gradients<kDType, W>(n, first, weight_sums, bias_sums, slopes);
    if (n.grad_x != nullptr) write_gradients<kDType, W>(n, first, slopes);
  });
}

static void norm_backward_rows(const NormBackward& n, int64_t begin, int64_t end, float* weight_sums,
                               float* bias_sums) {
  switch (n.dtype) {
    case DType::float32:
      return norm_backward_of<DType::float32>(n, begin, end, weight_sums, bias_sums);
    case DType::bfloat16:
      return norm_backward_of<DType::bfloat16>(n, begin, end, weight_sums, bias_sums);
    case DType::float16:
      return norm_backward_of<DType::float16>(n, begin, end, weight_sums, bias_sums);
  }
}
