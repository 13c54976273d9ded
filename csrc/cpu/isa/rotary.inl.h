// Rotary embeddings; peftkern/ops/rotary.py has the formulas.
#pragma once

constexpr int64_t kRotaryBuffer = 128;  // pairs

// first and second become what they are turned to; cosines and sines are those of each of the two.
template <bool kInverse>
static void rotate_floats(float* __restrict first, float* __restrict second, const float* __restrict cos_first,
                          const float* __restrict cos_second, const float* __restrict sin_first,
                          const float* __restrict sin_second, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    const float a = first[j], b = second[j];
    first[j] = kInverse ? a * cos_first[j] + b * sin_second[j] : a * cos_first[j] - b * sin_first[j];
    second[j] = kInverse ? b * cos_second[j] - a * sin_first[j] : b * cos_second[j] + a * sin_second[j];
  }
}

static void split_pairs(const float* __restrict pairs, int64_t count, float* __restrict first,
                        float* __restrict second) {
  for (int64_t j = 0; j < count; ++j) {
    first[j] = pairs[2 * j];
    second[j] = pairs[2 * j + 1];
  }
}

static void join_pairs(const float* __restrict first, const float* __restrict second, int64_t count,
                       float* __restrict pairs) {
  for (int64_t j = 0; j < count; ++j) {
    pairs[2 * j] = first[j];
    pairs[2 * j + 1] = second[j];
  }
}

// Up to kRotaryBuffer pairs of one token: the two of each pair apart, and their cosines and sines.
struct RotaryBuffer {
  alignas(64) float first[kRotaryBuffer], second[kRotaryBuffer];
  alignas(64) float cos_first[kRotaryBuffer], cos_second[kRotaryBuffer];
  alignas(64) float sin_first[kRotaryBuffer], sin_second[kRotaryBuffer];
  alignas(64) float pairs[2 * kRotaryBuffer];

  // Pairs from `begin` on, of a vector of `half` pairs.
  void read(const void* data, DType dtype, int64_t base, int64_t begin, int64_t count, int64_t half, bool interleaved,
            float* one, float* two) {
    if (!interleaved) {
      read_floats(data, dtype, base + begin, count, one);
      read_floats(data, dtype, base + half + begin, count, two);
      return;
    }
    read_floats(data, dtype, base + 2 * begin, 2 * count, pairs);
    split_pairs(pairs, count, one, two);
  }

  void write(void* data, DType dtype, int64_t base, int64_t begin, int64_t count, int64_t half, bool interleaved) {
    if (!interleaved) {
      write_floats(data, dtype, base + begin, count, first);
      write_floats(data, dtype, base + half + begin, count, second);
      return;
    }
    join_pairs(first, second, count, pairs);
    write_floats(data, dtype, base + 2 * begin, 2 * count, pairs);
  }

  void rotate(int64_t count, bool inverse) {
    if (inverse)
      rotate_floats<true>(first, second, cos_first, cos_second, sin_first, sin_second, count);
    else
      rotate_floats<false>(first, second, cos_first, cos_second, sin_first, sin_second, count);
  }
};

// Rows are pairs of batch and token.
static void rotary_rows(const Rotary& r, int64_t begin, int64_t end) {
  RotaryBuffer buffer;
  const int64_t half = r.rotary_dim / 2, element = r.dtype == DType::float32 ? 4 : 2;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t batch = row / r.tokens, token = row % r.tokens;
    const int64_t cos_base = batch * r.cos_strides[0] + token * r.cos_strides[1];
    const int64_t sin_base = batch * r.sin_strides[0] + token * r.sin_strides[1];
    for (int64_t pair = 0; pair < half; pair += kRotaryBuffer) {
      const int64_t count = half - pair < kRotaryBuffer ? half - pair : kRotaryBuffer;
      buffer.read(r.cos, r.angle_dtype, cos_base, pair, count, half, r.interleaved, buffer.cos_first,
                  buffer.cos_second);
      buffer.read(r.sin, r.angle_dtype, sin_base, pair, count, half, r.interleaved, buffer.sin_first,
                  buffer.sin_second);
      for (int64_t s = 0; s < r.state_count; ++s) {
        const RotaryStates& states = r.states[s];
        for (int64_t head = 0; head < states.heads; ++head) {
          const int64_t from = batch * states.strides[0] + head * states.strides[1] + token * states.strides[2];
          const int64_t to =
              batch * states.out_strides[0] + head * states.out_strides[1] + token * states.out_strides[2];
          buffer.read(states.x, r.dtype, from, pair, count, half, r.interleaved, buffer.first, buffer.second);
          buffer.rotate(count, r.inverse);
          buffer.write(states.out, r.dtype, to, pair, count, half, r.interleaved);
          if (pair > 0 || r.rotary_dim == r.head_dim) continue;
          std::memcpy(static_cast<char*>(states.out) + (to + r.rotary_dim) * element,
                      static_cast<const char*>(states.x) + (from + r.rotary_dim) * element,
                      static_cast<size_t>((r.head_dim - r.rotary_dim) * element));
        }
      }
    }
  }
}
