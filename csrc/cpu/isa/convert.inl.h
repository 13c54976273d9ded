// Elements of a tensor to floats and back, a short buffer at a time. Loops over buffers are what the compiler
// vectorises for each instruction set.
#pragma once

constexpr int64_t kBuffer = 64;

static void read_floats(const void* data, DType dtype, int64_t begin, int64_t count, float* values) {
  if (dtype == DType::float32) {
    std::memcpy(values, static_cast<const float*>(data) + begin, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const uint16_t* halves = static_cast<const uint16_t*>(data) + begin;
  if (dtype == DType::bfloat16) {
    for (int64_t i = 0; i < count; ++i) values[i] = bfloat16_to_float(halves[i]);
    return;
  }
  int64_t i = 0;
#ifdef PEFTKERN_VECTOR_DECODE
  for (; i + kLanes <= count; i += kLanes) store(values + i, half_to_float(expand_words(halves + i)));
#endif
  for (; i < count; ++i) values[i] = float16_to_float(halves[i]);
}

// Rounds to nearest even.
static void write_floats(void* data, DType dtype, int64_t begin, int64_t count, const float* values) {
  if (dtype == DType::float32) {
    std::memcpy(static_cast<float*>(data) + begin, values, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  int64_t i = 0;
#ifdef PEFTKERN_VECTOR_DECODE
  uint16_t* halves = static_cast<uint16_t*>(data) + begin;
  for (; i + kLanes <= count; i += kLanes) {
    if (dtype == DType::bfloat16)
      store_bfloat16(halves + i, load(values + i));
    else
      store_halves(halves + i, load(values + i));
  }
#endif
  for (; i < count; ++i) store_float(data, dtype, begin + i, values[i]);
}

// The elements as floats: in place where they are floats.
static const float* floats_of(const void* data, DType dtype, int64_t begin, int64_t count, float* buffer) {
  if (dtype == DType::float32) return static_cast<const float*>(data) + begin;
  read_floats(data, dtype, begin, count, buffer);
  return buffer;
}

// As many elements as a vector has lanes.
template <DType kDType>
static inline Float load_elements(const void* data, int64_t at) {
  if constexpr (kDType == DType::float32) return load(static_cast<const float*>(data) + at);
#ifdef PEFTKERN_VECTOR_DECODE
  const Int words = expand_words(static_cast<const uint16_t*>(data) + at);
  if constexpr (kDType == DType::bfloat16) return as_float(shift_left<16>(words));
  return half_to_float(words);
#else
  alignas(64) float values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = load_float(data, kDType, at + i);
  return load(values);
#endif
}

template <DType kDType>
static inline void store_elements(void* data, int64_t at, Float v) {
  if constexpr (kDType == DType::float32) return store(static_cast<float*>(data) + at, v);
#ifdef PEFTKERN_VECTOR_DECODE
  uint16_t* halves = static_cast<uint16_t*>(data) + at;
  if constexpr (kDType == DType::bfloat16) return store_bfloat16(halves, v);
  store_halves(halves, v);
#else
  alignas(64) float values[kLanes];
  store(values, v);
  for (int i = 0; i < kLanes; ++i) store_float(data, kDType, at + i, values[i]);
#endif
}
