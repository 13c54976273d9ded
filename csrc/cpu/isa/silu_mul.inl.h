// silu(gate) * up and its gradients; peftkern/ops/silu_mul.py has the formulas. Computed in float over short buffers,
// whose loops have a fixed length so that the compiler vectorises them.
#pragma once

constexpr int64_t kGateBuffer = 256;
constexpr float kExpLowest = -87.0f;       // below it exp counts as 0; its result there is still a normal float
constexpr float kRoundBias = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits

// sigmoid(x) and 1 - sigmoid(x), each to float's accuracy: neither overflows nor cancels, exp seeing only -|x|.
// exp(r) = 1 + r + r^2 q(r) with |r| <= ln(2) / 2 and q fitted for the least relative error, 3e-9.
static void sigmoids(const float* x, float* sigmoid, float* complement) {
  for (int64_t j = 0; j < kGateBuffer; ++j) {
    const float negative = bits_float(float_bits(x[j]) | 0x80000000u);
    const float exponent = negative > kExpLowest ? negative : kExpLowest;
    const float shifted = exponent * 1.44269504f + kRoundBias;
    const float power = shifted - kRoundBias;
    const float r = exponent - power * 0x1.62e4p-1f - power * 1.42860677e-06f;  // ln(2) in two parts
    const float q = (((0.00138145406f * r + 0.00836874545f) * r + 0.041668389f) * r + 0.166665211f) * r + 0.49999994f;
    const float scale = bits_float((float_bits(shifted) << 23) + 0x3F800000u);
    const float whole = (r * r * q + r + 1.0f) * scale;
    const float e = negative < kExpLowest ? 0.0f : whole;
    const float larger = 1.0f / (1.0f + e), smaller = e * larger;
    sigmoid[j] = x[j] < 0.0f ? smaller : larger;
    complement[j] = x[j] < 0.0f ? larger : smaller;
  }
}

// `count` elements as floats: in place where they are floats and fill a buffer, which the loops read as a whole.
static const float* floats_at(const void* data, DType dtype, int64_t begin, int64_t count, float* buffer) {
  if (dtype == DType::float32 && count == kGateBuffer) return static_cast<const float*>(data) + begin;
  read_floats(data, dtype, begin, count, buffer);
  return buffer;
}

static void silu_mul_elements(const SiluMul& s, int64_t begin, int64_t end) {
  alignas(64) float gates[kGateBuffer] = {}, ups[kGateBuffer] = {}, sigmoid[kGateBuffer], complement[kGateBuffer];
  alignas(64) float out[kGateBuffer];
  for (int64_t i = begin; i < end; i += kGateBuffer) {
    const int64_t count = end - i < kGateBuffer ? end - i : kGateBuffer;
    const float* gate = floats_at(s.gate, s.dtype, i, count, gates);
    const float* up = floats_at(s.up, s.dtype, i, count, ups);
    sigmoids(gate, sigmoid, complement);
    for (int64_t j = 0; j < kGateBuffer; ++j) out[j] = gate[j] * sigmoid[j] * up[j];
    write_floats(s.out, s.dtype, i, count, out);
  }
}

static void silu_mul_backward_elements(const SiluMul& s, int64_t begin, int64_t end) {
  alignas(64) float gates[kGateBuffer] = {}, ups[kGateBuffer] = {}, grads[kGateBuffer] = {};
  alignas(64) float sigmoid[kGateBuffer], complement[kGateBuffer], out[kGateBuffer];
  for (int64_t i = begin; i < end; i += kGateBuffer) {
    const int64_t count = end - i < kGateBuffer ? end - i : kGateBuffer;
    const float* gate = floats_at(s.gate, s.dtype, i, count, gates);
    const float* grad = floats_at(s.grad, s.dtype, i, count, grads);
    sigmoids(gate, sigmoid, complement);
    if (s.grad_gate != nullptr) {
      const float* up = floats_at(s.up, s.dtype, i, count, ups);
      for (int64_t j = 0; j < kGateBuffer; ++j)
        out[j] = grad[j] * up[j] * (sigmoid[j] * (1.0f + gate[j] * complement[j]));
      write_floats(s.grad_gate, s.dtype, i, count, out);
    }
    if (s.grad_up == nullptr) continue;
    for (int64_t j = 0; j < kGateBuffer; ++j) out[j] = grad[j] * (gate[j] * sigmoid[j]);
    write_floats(s.grad_up, s.dtype, i, count, out);
  }
}
