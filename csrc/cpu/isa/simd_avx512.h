// The vector type of the AVX-512 builds: 16 floats.
// Besides float32 it has the bfloat16 and float16 forms of the product (PEFTKERN_VECTOR_FORMS).
// Included inside the namespace of one instruction set; the including file sets the compiler's target.
#pragma once

constexpr int kLanes = 16;
constexpr int kTileRows = 14;  // 14 x 2 accumulators, 2 columns of the panel, 1 broadcast: 31 of 32 registers

using Float = __m512;
using Int = __m512i;

static inline Float zero() { return _mm512_setzero_ps(); }
static inline Float load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
static inline Float broadcast(float v) { return _mm512_set1_ps(v); }
static inline Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
static inline Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
static inline Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
static inline Float larger(Float a, Float b) { return _mm512_max_ps(a, b); }  // b where one is no number
static inline float sum_of(Float v) { return _mm512_reduce_add_ps(v); }

static inline Int int_zero() { return _mm512_setzero_si512(); }
static inline Int add_int(Int a, int b) { return _mm512_add_epi32(a, _mm512_set1_epi32(b)); }
static inline Int add_where_less(Int sum, Float a, Float b, int amount) {
  return _mm512_mask_add_epi32(sum, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), sum, _mm512_set1_epi32(amount));
}
static inline Int as_int(Float v) { return _mm512_castps_si512(v); }
// 16 codes below 16 to 8 bytes, the even code in the high half.
static inline void store_nibbles(uint8_t* p, Int codes) {
  const __m128i words = _mm_maddubs_epi16(_mm512_cvtepi32_epi8(codes), _mm_set1_epi16(0x0110));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
static inline Float as_float(Int v) { return _mm512_castsi512_ps(v); }
static inline Int load_int(const void* p) { return _mm512_loadu_si512(p); }
static inline void store_int(void* p, Int v) { _mm512_storeu_si512(p, v); }
static inline Int and_int(Int a, uint32_t b) { return _mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(b))); }
template <int kBits>
static inline Int shift_left(Int v) {
  return _mm512_slli_epi32(v, kBits);
}
template <int kBits>
static inline Int shift_right(Int v) {
  return _mm512_srli_epi32(v, kBits);
}
template <int kBits>
static inline Int shift_right_signed(Int v) {
  return _mm512_srai_epi32(v, kBits);
}
static inline Int shift_right_by(Int v, int bits) { return _mm512_srl_epi32(v, _mm_cvtsi32_si128(bits)); }
// Zero in the lanes whose bit `kBit` is 0.
template <int kBit>
static inline Float keep_where_bit(Float v, Int bits) {
  return _mm512_maskz_mov_ps(_mm512_test_epi32_mask(bits, _mm512_set1_epi32(1 << kBit)), v);
}
// Zero in lane i where bit i is 0.
static inline Float keep_lanes(Float v, const uint8_t* bits) {
  uint16_t lanes;
  std::memcpy(&lanes, bits, sizeof lanes);
  return _mm512_maskz_mov_ps(lanes, v);
}
static inline Float to_float(Int v) { return _mm512_cvtepi32_ps(v); }
// The low 16 bits of every lane, as float16.
static inline Float half_to_float(Int v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
static inline Float lookup256(const float* table, Int index) { return _mm512_i32gather_ps(index, table, 4); }

// The first `bytes` bytes (at most 64) and zeros.
static inline Int load_bytes(const void* p, int64_t bytes) {
  const __mmask64 mask = bytes >= 64 ? ~0ull : (1ull << bytes) - 1;
  return _mm512_maskz_loadu_epi8(mask, p);
}

// A codebook of 16 values in one register: the look-up is one permute, which reads only the low 4 bits of a lane.
struct Codebook16 {
  __m512 values;
};
static inline Codebook16 load_codebook16(const float* table) { return {_mm512_loadu_ps(table)}; }
static inline Float lookup16(const Codebook16& book, Int index) { return _mm512_permutexvar_ps(index, book.values); }

// 16 consecutive elements of a row, each in a lane.
static inline Int expand_nibbles(const uint8_t* p) {  // the code is in the low 4 bits; bits above are undefined
  const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm512_or_si512(_mm512_slli_epi64(bytes, 32), _mm512_srli_epi64(bytes, 4));
}
static inline Int expand_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline Int expand_signed_bytes(const int8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline Int expand_words(const uint16_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// r[i] lane j becomes r[j] lane i.
static inline void transpose(Int r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  __m512i s[16];
  for (int i = 0; i < 4; ++i) {
    s[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    s[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    s[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    s[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(s[i], s[4 + i], 0x88), b = _mm512_shuffle_i32x4(s[i], s[4 + i], 0xDD);
    const __m512i c = _mm512_shuffle_i32x4(s[8 + i], s[12 + i], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(s[8 + i], s[12 + i], 0xDD);
    r[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(a, c, 0xDD);
    r[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(b, d, 0xDD);
  }
}

// Lane i becomes the sum of the lanes of r[i].
static inline Float sum_lanes(const Float r[16]) {
  __m512 pairs[8], fours[4], eights[2];
  for (int i = 0; i < 8; ++i)
    pairs[i] = add(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; ++i)
    eights[i] = add(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88),
                    _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xDD));
  return add(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88), _mm512_shuffle_f32x4(eights[0], eights[1], 0xDD));
}

// ---- bfloat16: a lane holds two consecutive terms, the first in the low half

// Rounded to nearest even, in the high half of each lane; the low half is undefined. NaN stays NaN: rounding its bits
// like a number's could carry into the sign.
static inline Int round_to_bfloat16(Float v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
  return _mm512_mask_add_epi32(quiet, _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), bits,
                               _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
}

#ifdef __AVX512BF16__
constexpr bool kNativeBfloat16 = true;
static inline Int pair_bfloat16(Float first, Float second) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  return _mm512_permutexvar_epi16(load_int(kInterleave), halves);
}
static inline Float dot_bfloat16(Int a, Int b, Float sum) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#else
constexpr bool kNativeBfloat16 = false;
static inline Int pair_bfloat16(Float first, Float second) {
  const __m512i low = _mm512_srli_epi32(round_to_bfloat16(first), 16);
  return _mm512_mask_blend_epi16(0xAAAAAAAAu, low, round_to_bfloat16(second));
}
// Emulated, for tests of the bfloat16 form on processors without the instruction.
static inline Float dot_bfloat16(Int a, Int b, Float sum) {
  sum = fma(as_float(shift_left<16>(a)), as_float(shift_left<16>(b)), sum);
  return fma(as_float(and_int(a, 0xFFFF0000u)), as_float(and_int(b, 0xFFFF0000u)), sum);
}
#endif

// Rounded to nearest even; NaN stays NaN.
static inline void store_bfloat16(uint16_t* p, Float v) {
  alignas(64) static constexpr uint16_t kHighHalves[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  const __m512i words = _mm512_permutexvar_epi16(load_int(kHighHalves), round_to_bfloat16(v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(words));
}

// Past the caches; `p` is a multiple of 64 bytes.
static inline void stream(float* p, Float v) { _mm512_stream_ps(p, v); }
static inline void finish_streaming() { _mm_sfence(); }

// ---- float16: one term of 32 outputs in a vector

constexpr int kHalfLanes = 32;
constexpr int kHalfTileRows = 12;  // 12 x 2 accumulators, 2 columns of the panel, 1 broadcast

static inline void store_halves(uint16_t* p, Float v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#ifdef __AVX512FP16__
constexpr bool kNativeFloat16 = true;
using Half = __m512h;
static inline Half half_zero() { return _mm512_setzero_ph(); }
static inline Half half_load(const uint16_t* p) { return _mm512_castsi512_ph(_mm512_loadu_si512(p)); }
static inline Half half_broadcast(uint16_t bits) {
  return _mm512_castsi512_ph(_mm512_set1_epi16(static_cast<short>(bits)));
}
static inline Half half_fma(Half a, Half b, Half c) { return _mm512_fmadd_ph(a, b, c); }
static inline __m512i half_bits(Half v) { return _mm512_castph_si512(v); }
#else
constexpr bool kNativeFloat16 = false;
using Half = __m512i;
static inline Half half_zero() { return _mm512_setzero_si512(); }
static inline Half half_load(const uint16_t* p) { return _mm512_loadu_si512(p); }
static inline Half half_broadcast(uint16_t bits) { return _mm512_set1_epi16(static_cast<short>(bits)); }
static inline __m512i half_bits(Half v) { return v; }
#endif
static inline Float half_low(Half v) { return _mm512_cvtph_ps(_mm512_castsi512_si256(half_bits(v))); }
static inline Float half_high(Half v) { return _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half_bits(v), 1)); }
#ifndef __AVX512FP16__
// The product of two float16 is exact in float, so this differs from the instruction only where rounding to float
// first and to float16 after changes a tie.
static inline Half half_fma(Half a, Half b, Half c) {
  const __m256i low = _mm512_cvtps_ph(fma(half_low(a), half_low(b), half_low(c)), _MM_FROUND_TO_NEAREST_INT);
  const __m256i high = _mm512_cvtps_ph(fma(half_high(a), half_high(b), half_high(c)), _MM_FROUND_TO_NEAREST_INT);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
#endif
