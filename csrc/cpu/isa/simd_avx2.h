// The vector type of the AVX2 + FMA + F16C build: 8 floats.
// Included inside the namespace of one instruction set; the including file sets the compiler's target.
#pragma once

constexpr int kLanes = 8;
constexpr int kTileRows = 6;  // 6 x 2 accumulators, 2 columns of the panel, 1 broadcast: 15 of 16 registers
constexpr bool kNativeBfloat16 = false;
constexpr bool kNativeFloat16 = false;

using Float = __m256;
using Int = __m256i;

static inline Float zero() { return _mm256_setzero_ps(); }
static inline Float load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
static inline Float broadcast(float v) { return _mm256_set1_ps(v); }
static inline Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
static inline Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
static inline Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
static inline Float larger(Float a, Float b) { return _mm256_max_ps(a, b); }  // b where one is no number
static inline float sum_of(Float v) {
  const __m128 fours = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pairs = _mm_add_ps(fours, _mm_movehl_ps(fours, fours));
  return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)));
}

static inline Int int_zero() { return _mm256_setzero_si256(); }
static inline Int add_int(Int a, int b) { return _mm256_add_epi32(a, _mm256_set1_epi32(b)); }
static inline Int add_where_less(Int sum, Float a, Float b, int amount) {
  const __m256i less = _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LT_OQ));
  return _mm256_add_epi32(sum, _mm256_and_si256(less, _mm256_set1_epi32(amount)));
}
static inline Int as_int(Float v) { return _mm256_castps_si256(v); }
// 8 codes below 16 to 4 bytes, the even code in the high half.
static inline void store_nibbles(uint8_t* p, Int codes) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  const __m128i bytes = _mm_packus_epi16(words, words);
  const __m128i pairs = _mm_maddubs_epi16(bytes, _mm_set1_epi16(0x0110));
  const int32_t four = _mm_cvtsi128_si32(_mm_packus_epi16(pairs, pairs));
  std::memcpy(p, &four, sizeof four);
}
static inline Float as_float(Int v) { return _mm256_castsi256_ps(v); }
static inline Int load_int(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
static inline void store_int(void* p, Int v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
static inline Int and_int(Int a, uint32_t b) { return _mm256_and_si256(a, _mm256_set1_epi32(static_cast<int>(b))); }
template <int kBits>
static inline Int shift_left(Int v) {
  return _mm256_slli_epi32(v, kBits);
}
template <int kBits>
static inline Int shift_right(Int v) {
  return _mm256_srli_epi32(v, kBits);
}
template <int kBits>
static inline Int shift_right_signed(Int v) {
  return _mm256_srai_epi32(v, kBits);
}
static inline Int shift_right_by(Int v, int bits) { return _mm256_srl_epi32(v, _mm_cvtsi32_si128(bits)); }
// Zero in the lanes whose bit `kBit` is 0.
template <int kBit>
static inline Float keep_where_bit(Float v, Int bits) {
  return _mm256_blendv_ps(_mm256_setzero_ps(), v, _mm256_castsi256_ps(shift_left<31 - kBit>(bits)));
}
// Zero in lane i where bit i is 0.
static inline Float keep_lanes(Float v, const uint8_t* bits) {
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits[0]), lane_bit), lane_bit);
  return _mm256_and_ps(_mm256_castsi256_ps(kept), v);
}
static inline Float to_float(Int v) { return _mm256_cvtepi32_ps(v); }
// The low 16 bits of every lane, as float16.
static inline Float half_to_float(Int v) {
  const __m256i words = and_int(v, 0xFFFFu);
  return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
static inline void store_halves(uint16_t* p, Float v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
// Rounded to nearest even; NaN stays NaN.
static inline void store_bfloat16(uint16_t* p, Float v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256i chosen = _mm256_castps_si256(
      _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), _mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  const __m256i words = _mm256_srli_epi32(chosen, 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

// Past the caches; `p` is a multiple of 32 bytes.
static inline void stream(float* p, Float v) { _mm256_stream_ps(p, v); }
static inline void finish_streaming() { _mm_sfence(); }

static inline Float lookup256(const float* table, Int index) { return _mm256_i32gather_ps(table, index, 4); }

// The first `bytes` bytes (at most 32) and zeros.
static inline Int load_bytes(const void* p, int64_t bytes) {
  if (bytes >= 32) return load_int(p);
  alignas(32) uint8_t buffer[32] = {};
  std::memcpy(buffer, p, static_cast<size_t>(bytes));
  return load_int(buffer);
}

// A codebook of 16 values in two registers: two permutes, which read the low 3 bits of a lane, and a blend by bit 3.
struct Codebook16 {
  __m256 low, high;
};
static inline Codebook16 load_codebook16(const float* table) { return {load(table), load(table + 8)}; }
static inline Float lookup16(const Codebook16& book, Int index) {
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(book.low, index), _mm256_permutevar8x32_ps(book.high, index),
                          as_float(_mm256_slli_epi32(index, 28)));
}

// 8 consecutive elements of a row, each in a lane.
static inline Int expand_nibbles(const uint8_t* p) {  // the code is in the low 4 bits; bits above are undefined
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
  return _mm256_or_si256(_mm256_slli_epi64(bytes, 32), _mm256_srli_epi64(bytes, 4));
}
static inline Int expand_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
static inline Int expand_signed_bytes(const int8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
static inline Int expand_words(const uint16_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// r[i] lane j becomes r[j] lane i.
static inline void transpose(Int r[8]) {
  __m256i t[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  __m256i s[8];
  for (int i = 0; i < 2; ++i) {
    s[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    s[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    s[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    s[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2x128_si256(s[i], s[4 + i], 0x20);
    r[i + 4] = _mm256_permute2x128_si256(s[i], s[4 + i], 0x31);
  }
}

// Lane i becomes the sum of the lanes of r[i].
static inline Float sum_lanes(const Float r[8]) {
  const Float low = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
  const Float high = _mm256_hadd_ps(_mm256_hadd_ps(r[4], r[5]), _mm256_hadd_ps(r[6], r[7]));
  return add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}
