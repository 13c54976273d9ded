// activation(gate) * up and its gradients; peftkern/ops/silu_mul.py has the formulas. Computed in float over short
// buffers, whose loops have a fixed length so that the compiler vectorises them.
#pragma once

constexpr int64_t kGateBuffer = 256;
constexpr float kExpLowest = -87.0f;       // below it exp counts as 0; its result there is still a normal float
constexpr float kRoundBias = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits

// Rounded once where the processor does that as fast.
static inline float multiply_add(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// exp(x) for x <= 0, or a little above; 1 + r + r^2 q(r) with |r| <= ln(2) / 2 and q fitted for the least relative
// error, 3e-9.
static inline float exp_of_negative(float x) {
  const float exponent = x < kExpLowest ? kExpLowest : x;  // NaN stays
  const float shifted = multiply_add(exponent, 1.44269504f, kRoundBias);
  const float power = shifted - kRoundBias;
  const float r = multiply_add(power, -1.42860677e-06f, multiply_add(power, -0x1.62e4p-1f, exponent));  // ln(2) in two
  float q = multiply_add(0.00138145406f, r, 0.00836874545f);
  q = multiply_add(multiply_add(q, r, 0.041668389f), r, 0.166665211f);
  q = multiply_add(q, r, 0.49999994f);
  const float scale = bits_float((float_bits(shifted) << 23) + 0x3F800000u);
  const float whole = multiply_add(r * r, q, r + 1.0f) * scale;
  return x < kExpLowest ? 0.0f : whole;
}

// sigmoid(x) and 1 - sigmoid(x), each to float's accuracy: neither overflows nor cancels, exp seeing only -|x|.
static void sigmoids(const float* x, float* sigmoid, float* complement) {
  for (int64_t j = 0; j < kGateBuffer; ++j) {
    const float e = exp_of_negative(bits_float(float_bits(x[j]) | 0x80000000u));
    const float larger = 1.0f / (1.0f + e), smaller = e * larger;
    sigmoid[j] = x[j] < 0.0f ? smaller : larger;
    complement[j] = x[j] < 0.0f ? larger : smaller;
  }
}

static void silu(const float* x, float* value, float* slope) {
  alignas(64) float sigmoid[kGateBuffer], complement[kGateBuffer];
  sigmoids(x, sigmoid, complement);
  for (int64_t j = 0; j < kGateBuffer; ++j) {
    value[j] = x[j] * sigmoid[j];
    slope[j] = sigmoid[j] * (1.0f + x[j] * complement[j]);
  }
}

// x sigmoid(u) with u = 2 sqrt(2 / pi) (x + 0.044715 x^3), which equals (1 + tanh(u / 2)) / 2. Beyond 20 the sigmoid
// has no slope left in float, and the cube stays finite.
static void gelu_tanh(const float* x, float* value, float* slope) {
  constexpr float kFactor = 1.59576912f, kCubic = 0.044715f, kFar = 20.0f;
  alignas(64) float u[kGateBuffer], sigmoid[kGateBuffer], complement[kGateBuffer];
  for (int64_t j = 0; j < kGateBuffer; ++j) {
    const float near = x[j] > kFar ? kFar : x[j] < -kFar ? -kFar : x[j];
    u[j] = kFactor * near * (1.0f + kCubic * near * near);
  }
  sigmoids(u, sigmoid, complement);
  for (int64_t j = 0; j < kGateBuffer; ++j) {
    const float near = x[j] > kFar ? kFar : x[j] < -kFar ? -kFar : x[j];
    const float rise = kFactor * (1.0f + 3.0f * kCubic * near * near);
    value[j] = x[j] * sigmoid[j];
    slope[j] = sigmoid[j] * (1.0f + near * complement[j] * rise);
  }
}

// x Phi(x). Phi(-|x|) = exp(-z^2) s p(s) / 2 with z = |x| / sqrt(2), s = 1 / (1 + 0.4 z) and p fitted to
// exp(z^2) erfc(z) for the least relative error, 6e-8.
static void gelu(const float* x, float* value, float* slope) {
  for (int64_t j = 0; j < kGateBuffer; ++j) {
    const float z = bits_float(float_bits(x[j]) & 0x7FFFFFFFu) * 0.707106781f;
    const float e = exp_of_negative(-z * z);
    const float s = 1.0f / (1.0f + 0.4f * z);
    float p = 0.041253187f * s - 0.14031994f;
    p = ((p * s + 0.08398872f) * s + 0.08796274f) * s + 0.079757564f;
    p = (((p * s + 0.19339277f) * s + 0.2018877f) * s + 0.2264431f) * s + 0.22563423f;
    const float tail = 0.5f * e * s * p;
    const float below = x[j] < 0.0f ? tail : 1.0f - tail;
    value[j] = x[j] * below;
    slope[j] = below + x[j] * e * 0.398942280f;
  }
}

static void activate(Activation activation, const float* x, float* value, float* slope) {
  switch (activation) {
    case Activation::silu:
      return silu(x, value, slope);
    case Activation::gelu_tanh:
      return gelu_tanh(x, value, slope);
    case Activation::gelu:
      return gelu(x, value, slope);
  }
}

// `count` elements as floats: in place where they are floats and fill a buffer, which the loops read as a whole.
static const float* floats_at(const void* data, DType dtype, int64_t begin, int64_t count, float* buffer) {
  if (dtype == DType::float32 && count == kGateBuffer) return static_cast<const float*>(data) + begin;
  read_floats(data, dtype, begin, count, buffer);
  return buffer;
}

static void silu_mul_elements(const SiluMul& s, int64_t begin, int64_t end) {
  alignas(64) float gates[kGateBuffer] = {}, ups[kGateBuffer] = {}, value[kGateBuffer], slope[kGateBuffer];
  alignas(64) float out[kGateBuffer];
  for (int64_t i = begin; i < end; i += kGateBuffer) {
    const int64_t count = end - i < kGateBuffer ? end - i : kGateBuffer;
    const float* gate = floats_at(s.gate, s.dtype, i, count, gates);
    const float* up = floats_at(s.up, s.dtype, i, count, ups);
    activate(s.activation, gate, value, slope);
    for (int64_t j = 0; j < kGateBuffer; ++j) out[j] = value[j] * up[j];
    write_floats(s.out, s.dtype, i, count, out);
  }
}

// All results of a buffer are computed before the first is written, which may be over an operand.
static void silu_mul_backward_elements(const SiluMul& s, int64_t begin, int64_t end) {
  alignas(64) float gates[kGateBuffer] = {}, ups[kGateBuffer] = {}, grads[kGateBuffer] = {};
  alignas(64) float value[kGateBuffer], slope[kGateBuffer];
  alignas(64) float out[kGateBuffer], grad_gate[kGateBuffer], grad_up[kGateBuffer];
  const bool needs_up = s.grad_gate != nullptr || s.out != nullptr;
  for (int64_t i = begin; i < end; i += kGateBuffer) {
    const int64_t count = end - i < kGateBuffer ? end - i : kGateBuffer;
    const float* gate = floats_at(s.gate, s.dtype, i, count, gates);
    const float* grad = floats_at(s.grad, s.dtype, i, count, grads);
    const float* up = needs_up ? floats_at(s.up, s.dtype, i, count, ups) : ups;
    activate(s.activation, gate, value, slope);
    for (int64_t j = 0; j < kGateBuffer; ++j) {
      out[j] = value[j] * up[j];
      grad_gate[j] = grad[j] * up[j] * slope[j];
      grad_up[j] = grad[j] * value[j];
    }
    if (s.out != nullptr) write_floats(s.out, s.dtype, i, count, out);
    if (s.grad_gate != nullptr) write_floats(s.grad_gate, s.dtype, i, count, grad_gate);
    if (s.grad_up != nullptr) write_floats(s.grad_up, s.dtype, i, count, grad_up);
  }
}
