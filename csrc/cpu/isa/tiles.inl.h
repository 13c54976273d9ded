// Register-blocked tiles: out[rows, columns] = before + packed activations * panel + bias, in three forms of
// arithmetic.
//
// Packed activations are [k][rows], a panel is [k][columns]: each step broadcasts one activation per row and multiplies
// it with a few vectors of the panel. Rows go from 1 to the tile's height, so that any number of tokens is a sequence
// of full tiles; the compiler makes one function of each. The float32 form also reads matrices as they lie: a step is
// any number of floats, and rows of the activations are kRowStride apart.
#pragma once

static inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kTasksPerThread = 4;  // enough for a thread that is held up to lose little

struct TileArguments {
  const void* activations;
  const void* panel;
  int64_t activation_step = 0;  // floats from a step to the next; not in the float16 form
  int64_t panel_step = 0;
  int64_t steps;                  // terms; pairs of terms in the bfloat16 form
  const float* before = nullptr;  // sums of other terms; null: there are none
  int64_t before_stride = 0;
  const float* bias = nullptr;  // of the columns; null: there is none
  void* out;
  int64_t out_stride;
  DType out_dtype = DType::float32;
  const float* row_scales;  // float16 form: each row's sums are multiplied by its scale and by panel_scale
  float panel_scale;
};

using Tile = void (*)(const TileArguments&);

struct Float32Step {
  static inline Float run(const float* activation, const float* panel, Float sum) {
    return fma(broadcast(*activation), load(panel), sum);
  }
};

template <DType kDType, int kRows, int kVectors>
__attribute__((always_inline)) static inline void store_tile(const Float (&sums)[kRows][kVectors], void* out,
                                                             int64_t stride) {
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store_elements<kDType>(out, row * stride + v * kLanes, sums[row][v]);
}

template <class Step, int kRows, int kVectors, int kRowStride = 1>
static void tile(const TileArguments& arguments) {
  const float* a = static_cast<const float*>(arguments.activations);
  const float* b = static_cast<const float*>(arguments.panel);
  const int64_t activation_step = arguments.activation_step, panel_step = arguments.panel_step;
  // Every loop over the tile is unrolled, or the compiler keeps the sums in memory at both ends.
  Float sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[row][v] = zero();
  for (int64_t k = 0; k < arguments.steps; ++k) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[row][v] = Step::run(a + row * kRowStride, b + v * kLanes, sums[row][v]);
    a += activation_step;
    b += panel_step;
  }
  // Adding the block's sum to the total, instead of going on from it, keeps rounding errors of long sums apart.
  if (const float* before = arguments.before) {
    const int64_t stride = arguments.before_stride;
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[row][v] = add(load(before + row * stride + v * kLanes), sums[row][v]);
  }
  if (const float* bias = arguments.bias) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[row][v] = add(sums[row][v], load(bias + v * kLanes));
  }
  if (arguments.out_dtype == DType::float32)
    store_tile<DType::float32, kRows, kVectors>(sums, arguments.out, arguments.out_stride);
  else if (arguments.out_dtype == DType::bfloat16)
    store_tile<DType::bfloat16, kRows, kVectors>(sums, arguments.out, arguments.out_stride);
  else
    store_tile<DType::float16, kRows, kVectors>(sums, arguments.out, arguments.out_stride);
}

template <class Step, int kVectors, int kRows, int kRowStride = 1>
struct TileTable {
  static Tile get(int rows) {
    return rows == kRows ? tile<Step, kRows, kVectors, kRowStride>
                         : TileTable<Step, kVectors, kRows - 1, kRowStride>::get(rows);
  }
};
template <class Step, int kVectors, int kRowStride>
struct TileTable<Step, kVectors, 1, kRowStride> {
  static Tile get(int) { return tile<Step, 1, kVectors, kRowStride>; }
};

#ifdef PEFTKERN_VECTOR_FORMS
struct Bfloat16Step {
  static inline Float run(const float* activation, const float* panel, Float sum) {
    return dot_bfloat16(_mm512_set1_epi32(static_cast<int>(float_bits(*activation))), load_int(panel), sum);
  }
};

constexpr int kHalfChunk = 64;  // terms that are summed in float16 before the sum moves on in float

template <int kRows>
static void half_tile(const TileArguments& arguments) {
  const uint16_t* a = static_cast<const uint16_t*>(arguments.activations);
  const uint16_t* b = static_cast<const uint16_t*>(arguments.panel);
  constexpr int kColumns = 2 * kHalfLanes;
  alignas(64) float totals[kRows][kColumns] = {};  // rows of the output may share their places in the L1 cache
  for (int64_t begin = 0; begin < arguments.steps; begin += kHalfChunk) {
    const int64_t end = begin + kHalfChunk < arguments.steps ? begin + kHalfChunk : arguments.steps;
    Half sums[kRows][2];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) sums[row][0] = sums[row][1] = half_zero();
    for (int64_t k = begin; k < end; ++k) {
      const Half b0 = half_load(b), b1 = half_load(b + kHalfLanes);
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const Half value = half_broadcast(a[row]);
        sums[row][0] = half_fma(value, b0, sums[row][0]);
        sums[row][1] = half_fma(value, b1, sums[row][1]);
      }
      a += kRows;
      b += kColumns;
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        float* low = totals[row] + v * kHalfLanes;
        float* high = low + kLanes;
        store(low, add(load(low), half_low(sums[row][v])));
        store(high, add(load(high), half_high(sums[row][v])));
      }
  }
  for (int row = 0; row < kRows; ++row) {
    float* out = static_cast<float*>(arguments.out) + row * arguments.out_stride;
    const Float scale = broadcast(arguments.row_scales[row] * arguments.panel_scale);
    for (int column = 0; column < kColumns; column += kLanes) {
      const Float total = load(totals[row] + column);
      const Float before =
          arguments.before == nullptr ? zero() : load(arguments.before + row * arguments.before_stride + column);
      const Float sum = fma(total, scale, before);
      store(out + column, arguments.bias == nullptr ? sum : add(sum, load(arguments.bias + column)));
    }
  }
}

template <int kRows>
struct HalfTileTable {
  static Tile get(int rows) { return rows == kRows ? half_tile<kRows> : HalfTileTable<kRows - 1>::get(rows); }
};
template <>
struct HalfTileTable<1> {
  static Tile get(int) { return half_tile<1>; }
};
#endif
