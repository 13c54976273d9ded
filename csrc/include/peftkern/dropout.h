// Counter-based dropout, the same bits as peftkern/ops/dropout.py, which documents the generator.
// Everything is unsigned 32-bit arithmetic that wraps, so that loops over columns vectorise.
#pragma once
#include <cstdint>

namespace peftkern {

constexpr uint32_t kGolden = 0x9E3779B9u;

static inline uint32_t dropout_mix(uint32_t value) {
  value ^= value >> 16;
  value *= 0x7FEB352Du;
  value ^= value >> 15;
  value *= 0x846CA68Bu;
  return value ^ (value >> 16);
}

// One adapter's mask. `threshold` is round(p * 2^32) and may be 2^32 (p = 1), hence 64 bits.
struct Dropout {
  uint64_t seed = 0;
  uint32_t adapter = 0;
  uint64_t threshold = 0;
  float keep_scale = 1.0f;
};

static inline bool dropout_active(const Dropout& dropout) { return dropout.threshold != 0; }

static inline uint32_t dropout_row_key(const Dropout& dropout, uint32_t row) {
  const uint32_t low = static_cast<uint32_t>(dropout.seed), high = static_cast<uint32_t>(dropout.seed >> 32);
  return dropout_mix(row ^ low) + dropout_mix(high + dropout.adapter * kGolden);
}

// The factor of element (row, column): keep_scale or 0.
static inline float dropout_factor(const Dropout& dropout, uint32_t row_key, uint32_t column) {
  return dropout_mix(row_key + column * kGolden) >= dropout.threshold ? dropout.keep_scale : 0.0f;
}

}  // namespace peftkern
