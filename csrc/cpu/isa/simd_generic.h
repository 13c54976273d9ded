// The vector type of the portable build: 4 floats, in the compiler's own vector extension (SSE2, NEON, VSX, ...).
// Panels are decoded element by element here.
// Included inside the namespace of one instruction set.
#pragma once

constexpr int kLanes = 4;
constexpr int kTileRows = 6;
constexpr bool kNativeBfloat16 = false;
constexpr bool kNativeFloat16 = false;

typedef float Float __attribute__((vector_size(16)));

static inline Float zero() { return Float{}; }
static inline Float load(const float* p) {
  Float v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, Float v) { std::memcpy(p, &v, sizeof v); }
static inline Float broadcast(float v) { return Float{v, v, v, v}; }
static inline Float fma(Float a, Float b, Float c) {
#ifdef __FP_FAST_FMAF
  for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}
static inline Float mul(Float a, Float b) { return a * b; }
static inline Float add(Float a, Float b) { return a + b; }
static inline Float larger(Float a, Float b) { return a > b ? a : b; }  // b where one is no number
static inline float sum_of(Float v) { return (v[0] + v[1]) + (v[2] + v[3]); }

// Lane i becomes the sum of the lanes of r[i].
static inline Float sum_lanes(const Float r[4]) {
  Float sums;
  for (int i = 0; i < kLanes; ++i) sums[i] = (r[i][0] + r[i][1]) + (r[i][2] + r[i][3]);
  return sums;
}
