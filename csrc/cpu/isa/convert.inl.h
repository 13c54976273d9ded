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
